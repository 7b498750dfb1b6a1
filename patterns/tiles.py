"""What a predicate does on a whole tile, as predicates and expressions over the tile's corners.

A tile is the box q0 <= q <= q1, k0 <= k <= k1 (ends included) at one batch `b` and head `h`. Everything here is sound
interval arithmetic on the predicate, done once at compile time; what comes out are scalar expressions over
`b, h, q0, q1, k0, k1` and launch scalars, which the reference interpreter evaluates and each target prints. So no
table is built at run time, nothing depends on N, and all targets agree. What depends on data is asked of a load's
least and greatest element in the range of its index (`Bound`), which kernels read from summaries of O(N) size.

- `always(p)`: true only if p holds for every pair of the tile (a FULL tile needs no mask);
- `never(p)`: true only if p holds for no pair (an EMPTY tile is skipped);
- `bands(p)`: intervals of k outside which p never holds for queries q0..q1 (the bounds of the key loop).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sparsify.expr import (
    FALSE,
    TRUE,
    And,
    Bound,
    Chosen,
    Eq,
    Expr,
    FloorDiv,
    Ge,
    Listed,
    Load,
    Max,
    Min,
    Mod,
    Mul,
    Not,
    Or,
    Pred,
    Select,
    Sum,
    Test,
    Var,
    as_expr,
    conjunction,
    disjunction,
    eq,
    floordiv,
    maximum,
    minimum,
    mod,
    negate,
    select,
)
from sparsify.walk import data_bounds, loads, variables

KEY = Var("k")
Q0, Q1, K0, K1 = Var("q0"), Var("q1"), Var("k0"), Var("k1")
MAX_BANDS = 16
Unknown = Callable[[Expr | Pred], bool]  # whether a reader doesn't know something that a part is made of
BLOCK = 64  # elements of a load, along the axis of a bound, that share one least and one greatest in a summary

Bounds = tuple[Expr, Expr]


def always(pred: Pred) -> Pred:
    """A predicate over tile corners that is true only if `pred` is true on the whole tile."""
    match pred:
        case And(parts):
            return conjunction(map(always, parts))
        case Or(parts):
            return disjunction(map(always, parts))
        case Ge(expr):
            found = bounds(expr)
            return FALSE if found is None else found[0] >= 0
        case Eq(expr):
            found = bounds(expr)
            return FALSE if found is None else eq(found[0], 0) & eq(found[1], 0)
        case Not(part):
            return never(part)
        case Test(load):
            return _tested(load, lambda least, greatest: least >= 1)
        case Listed() | Chosen():
            return FALSE  # a list says where to go, and is not asked of tiles: see `lists`
    raise TypeError(f"not a predicate: {pred!r}")


def never(pred: Pred) -> Pred:
    """A predicate over tile corners that is true only if `pred` is false on the whole tile."""
    match pred:
        case And(parts):
            return disjunction(map(never, parts))
        case Or(parts):
            return conjunction(map(never, parts))
        case Eq(expr):
            found = bounds(expr)
            return FALSE if found is None else (found[0] > 0) | (found[1] < 0)
        case Not(part):
            return always(part)
        case Test(load):
            return _tested(load, lambda least, greatest: eq(least, 0) & eq(greatest, 0))
        case Listed() | Chosen():
            return FALSE
    return always(negate(pred))


def _tested(load: Load, rule: Callable[[Expr, Expr], Pred]) -> Pred:
    """A rule on the bounds of a load that is tested, where it has bounds: they are 0 or 1."""
    found = bounds(load)
    return FALSE if found is None else rule(*found)


def _is_scalar(node: Expr) -> bool:
    return not variables(node) & {"q", "k"}


def bounds(expr: Expr) -> Bounds | None:
    """The least and the greatest value on the tile (sound, and exact where each position occurs once), or None."""
    match expr:
        case Var("q"):
            return Q0, Q1
        case Var("k"):
            return K0, K1
        case Var():
            return expr, expr
        case Load():
            return _load_bounds(expr)
        case Sum(const, terms):
            return _sum_bounds(const, terms)
        case Mul(left, right):
            return _combine(left, right, lambda a, b: _spread([x * y for x in a for y in b]))
        case FloorDiv(left, right):
            return _combine(left, right, _quotient_bounds)
        case Mod(left, right):
            return _combine(left, right, _remainder_bounds)
        case Min(left, right):
            return _combine(left, right, lambda a, b: (minimum(a[0], b[0]), minimum(a[1], b[1])))
        case Max(left, right):
            return _combine(left, right, lambda a, b: (maximum(a[0], b[0]), maximum(a[1], b[1])))
        case Select(condition, then, other):
            return _combine(then, other, lambda a, b: _choice_bounds(condition, a, b))
    raise TypeError(f"not an expression: {expr!r}")


def _load_bounds(load: Load) -> Bounds | None:
    """Those of the run of elements that the one index which varies on the tile passes over; with two there are none."""
    moving = [axis for axis, part in enumerate(load.index) if not _is_scalar(part)]
    if not moving:
        return load, load
    found = bounds(load.index[moving[0]]) if len(moving) == 1 else None
    if found is None:
        return None
    axis, (first, last) = moving[0], found
    run = Load(load.source, (*load.index[:axis], first, *load.index[axis + 1 :]))
    return Bound(run, axis, last, False), Bound(run, axis, last, True)


def _combine(left: Expr, right: Expr, rule) -> Bounds | None:
    a, b = bounds(left), bounds(right)
    return None if a is None or b is None else rule(a, b)


def _sum_bounds(const: int, terms: Iterable[tuple[int, Expr]]) -> Bounds | None:
    low = high = as_expr(const)
    for coefficient, atom in terms:
        found = bounds(atom)
        if found is None:
            return None
        first, last = found if coefficient > 0 else found[::-1]
        low, high = low + first * coefficient, high + last * coefficient
    return low, high


def _spread(values: list[Expr]) -> Bounds:
    return functools.reduce(minimum, values), functools.reduce(maximum, values)


def _quotient_bounds(a: Bounds, b: Bounds) -> Bounds:
    if b[0] == b[1]:
        return floordiv(a[0], b[0]), floordiv(a[1], b[0])
    return _spread([floordiv(x, y) for x in a for y in b])


def _remainder_bounds(a: Bounds, b: Bounds) -> Bounds:
    """Within one period the remainder is increasing; across periods it is anything below the divisor."""
    if b[0] != b[1] or a[0] == a[1]:
        return (mod(a[0], b[0]),) * 2 if b[0] == b[1] else (as_expr(0), b[1] - 1)
    one_period = eq(floordiv(a[0], b[0]), floordiv(a[1], b[0]))
    return select(one_period, mod(a[0], b[0]), 0), select(one_period, mod(a[1], b[0]), b[0] - 1)


def _choice_bounds(condition: Pred, then: Bounds, other: Bounds) -> Bounds:
    low, high = minimum(then[0], other[0]), maximum(then[1], other[1])
    yes, no = always(condition), never(condition)
    return select(yes, then[0], select(no, other[0], low)), select(yes, then[1], select(no, other[1], high))


@dataclass(frozen=True)
class Band:
    """An interval of keys for the queries q0..q1: what it covers is a superset of what one alternative keeps.

    `low` (included) and `high` (excluded) bound the keys that any query of the tile keeps; None means unbounded.
    `unless` is true only when the alternative keeps nothing for these queries at all.
    """

    low: Expr | None
    high: Expr | None
    unless: Pred = FALSE


@functools.lru_cache(maxsize=4096)
def bands(pred: Pred) -> tuple[Band, ...]:
    """Intervals whose union covers every key kept for q0..q1; they may overlap. No band: nothing is kept."""
    found = _alternatives(pred)
    if found is None:
        return (Band(None, None),)
    return tuple(dict.fromkeys(_band(parts) for parts in found))


def _alternatives(pred: Pred) -> list[list[Pred]] | None:
    """The predicate as alternatives, each a list of parts that all hold; None if there are too many."""
    match pred:
        case Or(parts):
            found = [_alternatives(part) for part in parts]
            joined = None if None in found else [a for group in found for a in group]
        case And(parts):
            joined = [[]]
            for part in parts:
                options = _alternatives(part)
                if options is None or not any(map(_decides, options)):
                    continue  # leaving a condition out only widens the bands
                joined = [a + b for a in joined for b in options]
                if len(joined) > 4 * MAX_BANDS:
                    return None
        case _:
            joined = [[pred]]
    return None if joined is None or len(joined) > MAX_BANDS else joined


def _decides(parts: list[Pred]) -> bool:
    """Whether an alternative bounds the keys, or is one of the queries alone."""
    return any("k" not in variables(part) or limits(part) != (None, None) for part in parts)


def _band(parts: list[Pred]) -> Band:
    low: Expr | None = None
    high: Expr | None = None
    rest = []
    for part in parts:
        limit = limits(part)
        if limit == (None, None):
            rest.append(part)
        if limit[0] is not None:
            low = limit[0] if low is None else maximum(low, limit[0])
        if limit[1] is not None:
            high = limit[1] if high is None else minimum(high, limit[1])
    unless = disjunction(never(part) for part in rest if "k" not in variables(part))
    return Band(low, high, unless)


def limits(part: Pred) -> tuple[Expr | None, Expr | None]:
    """(low, high) of the keys for which a condition can hold for some query of the tile."""
    match part:
        case Ge(expr):
            return solve(expr)
        case Eq(expr):
            low, high = solve(expr), solve(-expr)
            return low[0] if low[0] is not None else high[0], low[1] if low[1] is not None else high[1]
    return None, None


def solve(expr: Expr, every: bool = False) -> tuple[Expr | None, Expr | None]:
    """Solves expr >= 0, for some query of the tile or for every one, where k occurs once, alone or inside floored
    divisions: (low, high excluded)."""
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    with_k = [(c, atom) for c, atom in terms if "k" in variables(atom)]
    if len(with_k) != 1 or abs(with_k[0][0]) != 1:
        return None, None
    coefficient, atom = with_k[0]
    limit = bounds(expr - atom * coefficient)
    if limit is None:
        return None, None
    side = limit[0] if every else limit[1]
    return unwrap(atom, -side, None) if coefficient == 1 else unwrap(atom, None, side)


def unwrap(atom: Expr, low: Expr | None, high: Expr | None, variable: Expr = KEY) -> tuple[Expr | None, Expr | None]:
    """From low <= atom <= high to the interval of k, through `(k + c) // divisor` with a divisor free of q and k."""
    if atom == variable:
        return low, None if high is None else high + 1
    if not isinstance(atom, FloorDiv) or not _is_scalar(atom.right):
        return None, None
    inner, divisor = atom.left, atom.right
    shift = inner - variable
    if not _is_scalar(shift):
        return None, None
    return None if low is None else low * divisor - shift, None if high is None else (high + 1) * divisor - shift


@functools.lru_cache(maxsize=4096)
def analyse(pred: Pred) -> TileRule:
    """The three answers for one predicate, computed once."""
    return TileRule(pred, always(pred), never(pred), bands(pred))


@dataclass(frozen=True)
class TileRule:
    """A predicate with what it does on tiles: all that a tile program needs to know about one head."""

    keep: Pred
    full: Pred
    empty: Pred
    bands: tuple[Band, ...]

    def without_data(self) -> TileRule:
        """The rule for a reader that knows no bounds of loads: sound, but tiles that depend on data are PARTIAL."""
        return self._without(lambda node: bool(data_bounds(node)))

    def of_any_batch(self) -> TileRule:
        """The rule for a reader that has no tensors at all and doesn't know the batch: tiles that depend on them, be it
        by one element for each head, are PARTIAL, too."""
        return self._without(lambda node: bool(data_bounds(node) or loads(node)) or "b" in variables(node))

    def _without(self, unknown: Unknown) -> TileRule:
        if not loads(self.keep) and "b" not in variables(self.keep):  # so there is nothing to look for
            return replace(self, bands=tuple(dict.fromkeys(self.bands)))
        limits = [one for band in self.bands for one in (band.low, band.high, band.unless) if one is not None]
        if not any(unknown(one) for one in (self.full, self.empty, *limits)):
            return replace(self, bands=tuple(dict.fromkeys(self.bands)))
        bands = tuple(
            Band(_known(band.low, Max, unknown), _known(band.high, Min, unknown), _surely(band.unless, unknown))
            for band in self.bands
        )
        full, empty = (_surely(pred, unknown) for pred in (self.full, self.empty))
        return TileRule(self.keep, full, empty, tuple(dict.fromkeys(bands)))


def _surely(pred: Pred, unknown: Unknown) -> Pred:
    """A predicate that implies this one and has nothing unknown in it."""
    match pred:
        case And(parts):
            return conjunction(_surely(part, unknown) for part in parts)
        case Or(parts):
            return disjunction(_surely(part, unknown) for part in parts)
    return FALSE if unknown(pred) else pred


def _known(limit: Expr | None, kind: type[Min] | type[Max], unknown: Unknown) -> Expr | None:
    """A limit that is the tightest (by `kind`) of several, without those that have something unknown in them."""
    if limit is None or not unknown(limit):
        return limit
    if not isinstance(limit, kind):
        return None
    left, right = _known(limit.left, kind, unknown), _known(limit.right, kind, unknown)
    if left is None or right is None:
        return right if left is None else left
    return (minimum if kind is Min else maximum)(left, right)


__all__ = ["BLOCK", "FALSE", "TRUE", "Band", "TileRule", "always", "analyse", "bands", "bounds", "never"]
