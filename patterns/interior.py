"""Where a band needs no mask, and where it has holes: what lets a key loop be split before it runs.

`tiles` says for one tile whether it is EMPTY or FULL. A kernel that loops over a band wants the same in closed form:
the interval of keys that *every* query of the tile keeps (its tiles run without masks and without a test), and
whether tiles inside the bands can be EMPTY at all (only then is each one tested).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparsify.expr import FALSE, TRUE, And, Bound, Eq, Expr, Ge, Or, Pred, conjunction, maximum, minimum
from sparsify.patterns.tiles import MAX_BANDS, always, limits, never, solve
from sparsify.walk import data_bounds, variables

Interval = tuple[Expr | None, Expr | None]


@dataclass(frozen=True)
class Interior:
    """The keys [low, high) that every query q0..q1 keeps, provided `when` holds; None means unbounded."""

    low: Expr | None
    high: Expr | None
    when: Pred = TRUE

    def data_bounds(self) -> list[Bound]:
        """The bounds of loads that it takes to know this interval."""
        return [bound for part in (self.low, self.high, self.when) if part is not None for bound in data_bounds(part)]


@functools.lru_cache(maxsize=4096)
def interiors(pred: Pred) -> tuple[Interior, ...]:
    """Sound intervals: each pair inside one is kept. Alternatives without a closed form have none."""
    found = [_interior(parts) for parts in _alternatives(pred)[0]]
    return tuple(dict.fromkeys(one for one in found if one is not None and one.when != FALSE))


def has_gaps(pred: Pred) -> bool:
    """Whether a tile that a band touches can be EMPTY (as far as `never` can tell)."""
    if never(pred) == FALSE:
        return False
    found, complete = _alternatives(pred)
    return not complete or any("k" in variables(p) and limits(p) == (None, None) for parts in found for p in parts)


def _alternatives(pred: Pred) -> tuple[list[list[Pred]], bool]:
    """Lists of parts that together imply the predicate, and whether it implies one of them in turn.

    `tiles` may leave a condition out, which only widens a band; here it is the alternative that is left out.
    """
    match pred:
        case Or(parts):
            several = [_alternatives(part) for part in parts]
            joined, complete = [a for found, _ in several for a in found], all(whole for _, whole in several)
        case And(parts):
            joined, complete = [[]], True
            for part in parts:
                options, whole = _alternatives(part)
                joined, complete = [a + b for a in joined for b in options], complete and whole
                if len(joined) > 4 * MAX_BANDS:
                    return [], False
        case _:
            return [[pred]], True
    return (joined, complete) if len(joined) <= MAX_BANDS else ([], False)


def _interior(parts: list[Pred]) -> Interior | None:
    low: Expr | None = None
    high: Expr | None = None
    when: list[Pred] = []
    for part in parts:
        if "k" not in variables(part):
            when.append(always(part))
            continue
        limit = _kept_by_all(part)
        if limit is None:
            return None
        if limit[0] is not None:
            low = limit[0] if low is None else maximum(low, limit[0])
        if limit[1] is not None:
            high = limit[1] if high is None else minimum(high, limit[1])
    return Interior(low, high, conjunction(when))


def _kept_by_all(part: Pred) -> Interval | None:
    """The keys for which a condition holds for all queries of the tile, or None where that has no closed form."""
    match part:
        case Ge(expr):
            return _solve(expr)
        case Eq(expr):
            sides = _solve(expr), _solve(-expr)
            if None in sides:
                return None
            (low, high), (other_low, other_high) = sides  # type: ignore[misc]
            return low if low is not None else other_low, high if high is not None else other_high
    return None


def _solve(expr: Expr) -> Interval | None:
    """The keys where expr >= 0 for every query of the tile."""
    found = solve(expr, every=True)
    return None if found == (None, None) else found


@functools.lru_cache(maxsize=4096)
def by_intervals(pred: Pred) -> bool:
    """Whether the keys of each single query are all of those in its bands: nothing in them is left out."""
    found, complete = _alternatives(pred)
    return complete and all("k" not in variables(p) or limits(p) != (None, None) for parts in found for p in parts)
