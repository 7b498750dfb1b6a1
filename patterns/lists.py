"""Predicates with lists of keys: what closed forms can loop over, and what is reached through each list.

A head's predicate P may say `Listed`: a unit of keys is in a list that was chosen from the data. Kernels never ask that
of a pair. They run the static part first, P with every list empty, by its bands; then each list's entries, with P where
that list has the key, less the static part. So no pair is met twice, whatever a list is combined with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.expr import (
    FALSE,
    TRUE,
    And,
    Chosen,
    FloorDiv,
    Listed,
    Not,
    Or,
    Pred,
    conjunction,
    constant,
    disjunction,
    negate,
)  # fmt: skip
from sparsify.walk import variables


@dataclass(frozen=True)
class ListPass:
    """The keys of one list: of those, a head keeps the pairs for which `keep` holds."""

    listed: Listed
    keep: Pred


@dataclass(frozen=True)
class Passes:
    """A predicate without lists, and the passes over each list that reach the rest of what it keeps."""

    static: Pred
    lists: tuple[ListPass, ...]


def lists(pred: Pred) -> tuple[Listed, ...]:
    """The distinct lists in a predicate, in order of appearance."""
    match pred:
        case Listed():
            return (pred,)
        case And(parts) | Or(parts):
            return tuple(dict.fromkeys(found for part in parts for found in lists(part)))
        case Not(part) if isinstance(part, Listed):
            raise AssertionError(f"a list can't be negated: {pred}")
    return ()


def choices(pred: Pred) -> tuple[Chosen, ...]:
    """The distinct choices in a predicate, in order of appearance. Raises PatternError for a negated one."""
    match pred:
        case Chosen():
            return (pred,)
        case And(parts) | Or(parts):
            return tuple(dict.fromkeys(found for part in parts for found in choices(part)))
        case Not(Chosen()):
            raise PatternError("a selection can't be negated: a kernel only goes where a list leads")
    return ()


def with_choices(pred: Pred, made: Mapping[Chosen, Pred]) -> Pred:
    """The predicate with each choice replaced."""
    match pred:
        case Chosen():
            return made[pred]
        case And(parts):
            return conjunction(with_choices(part, made) for part in parts)
        case Or(parts):
            return disjunction(with_choices(part, made) for part in parts)
    return pred


@functools.lru_cache(maxsize=1024)
def passes(pred: Pred) -> Passes:
    """The static part and the list passes. The lists of one predicate have no key in common, and none is negated."""
    found = lists(pred)
    static = _assuming(pred, None)
    rest = negate(static)
    return Passes(static, tuple(ListPass(one, conjunction([_assuming(pred, one), rest])) for one in found))


def _assuming(pred: Pred, member: Listed | None) -> Pred:
    """The predicate for keys of one list, or of none."""
    match pred:
        case Listed():
            return TRUE if pred == member else FALSE
        case And(parts):
            return conjunction(_assuming(part, member) for part in parts)
        case Or(parts):
            return disjunction(_assuming(part, member) for part in parts)
    return pred


def row_unit(listed: Listed) -> int:
    """How many queries, counted from the launch's first, share a list; 0 where all of them do."""
    found = 0
    for part in listed.index.index:
        if "q" in variables(part):
            size = constant(part.right) if isinstance(part, FloorDiv) else None
            found = math.gcd(found, size or 1)
    return found


def tile_rows(preds: tuple[Pred, ...], most: int) -> int:
    """The most queries, `most` at most, that a query tile may have so that each of its lists is one."""
    shared = functools.reduce(math.gcd, (row_unit(one) for pred in preds for one in lists(pred)), 0)
    return most if shared == 0 else next(rows for rows in range(min(most, shared), 0, -1) if shared % rows == 0)
