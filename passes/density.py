"""How much of a site's score matrix its programs keep."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from sparsify.expr import TRUE, And, Or, Pred, conjunction, disjunction
from sparsify.patterns.count import kept_by_row, kept_pairs
from sparsify.patterns.lists import lists, passes
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.walk import loads, substitute, variables

Room = np.ndarray | int | None  # keys that each query, or any, keeps of a choice at most; None where the data say


def density_of(
    rules: Sequence[Pred], q_len: int, k_len: int, q_offset: int, rooms: Sequence[Room] | None = None
) -> float:
    """The share of all triples that the rules of a site's heads keep: the most, whatever loads and the batch say.

    rooms: of each head, for its lists of keys.
    """
    kept, place = 0, (q_len, k_len, q_offset)
    for head, (rule, room) in enumerate(zip(rules, rooms or [None] * len(rules), strict=True)):
        most = at_most(rule)
        if room is None or not lists(rule):
            kept += _kept(most, head if "h" in variables(most) else 0, *place)
        else:
            every, static = (_rows(substitute(at, {"h": head}), *place) for at in (most, at_most(passes(rule).static)))
            kept += int(np.minimum(every, static + room).sum())
    return kept / max(1, len(rules) * q_len * k_len)


@functools.lru_cache(maxsize=1024)
def _kept(rule: Pred, head: int, q_len: int, k_len: int, q_offset: int) -> int:
    """The kept pairs of one head; layers mostly ask for the same."""
    return kept_pairs(substitute(rule, {"h": head}), 1, q_len, k_len, q_offset)


@functools.lru_cache(maxsize=64)
def _rows(rule: Pred, q_len: int, k_len: int, q_offset: int) -> np.ndarray:
    """The kept keys of each query."""
    return kept_by_row(rule, 0, q_len, k_len, q_offset)


@functools.lru_cache(maxsize=1024)
def at_most(rule: Pred) -> Pred:
    """What a rule keeps at most, whatever the tensors hold that it reads and whichever batch it is asked for."""
    if isinstance(rule, And | Or):
        join = conjunction if isinstance(rule, And) else disjunction
        return join(map(at_most, rule.parts))
    return TRUE if loads(rule) or "b" in variables(rule) else rule


def room_of(choice: Choice, q_len: int, k_len: int, q_offset: int, causal: bool) -> Room:
    """What the budget of a choice leaves room for. causal: whether a query sees no key after it."""
    selector = choice.selector
    if not isinstance(selector, Selector) or selector.force.last_rows or selector.force.exempt is not None:
        return None
    unit, budget, lines, forced = selector.unit, selector.budget, selector.lines, selector.most_forced()
    if lines is not None:
        touched = (unit.q + unit.k - 2) // unit.k + 1  # units, by a diagonal in the queries that share a choice
        return None if lines.cover is not None else lines.slashes * touched * unit.k + lines.verticals
    if budget.rule == "ratio" and budget.per == "row":
        last, units = np.arange(q_len) // unit.q * unit.q + unit.q - 1 + q_offset, -(-k_len // unit.k)
        seen = np.minimum(last // unit.k + 1, units) if causal else np.full(q_len, units)
        wanted = np.clip(np.ceil(seen * budget.value - 1e-9), budget.min, budget.max).astype(np.int64)
    else:
        wanted = budget.value if budget.rule == "topk" else budget.max
    if wanted is None:
        return None
    counted = selector.force.counted and budget.rule in ("topk", "ratio")
    chosen = np.maximum(wanted, forced) if counted else wanted + forced
    return (chosen + forced * choice.reuse.by_steps) * unit.k  # a choice that is held is joined by what is forced later
