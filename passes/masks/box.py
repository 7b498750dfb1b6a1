"""What is known about a mask's indices (0 <= b < B, 0 <= h < H, 0 <= q < Q, 0 <= k < K), and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsify.expr import (
    FALSE,
    TRUE,
    And,
    Eq,
    Expr,
    FloorDiv,
    Ge,
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
    constant,
    disjunction,
    floordiv,
    mod,
    negate,
)  # fmt: skip

Interval = tuple[int | None, int | None]


@dataclass(frozen=True)
class Box:
    """`size` of each index (a constant or an expression in N, Nq and other scalars), `low` of each scalar."""

    size: dict[str, Expr] = field(default_factory=dict)
    low: Mapping[str, int] = field(default_factory=dict)

    def interval(self, expr: Expr) -> Interval:
        """Numbers that bound the expression on both sides, None where there is none. Sound, not tight."""
        match expr:
            case Var(name) if name in self.size:
                high = self.interval(self.size[name] - 1)[1]
                return 0, high
            case Var(name):
                return self.low.get(name), None
            case Load(source):
                return self.low.get(source), None
            case Sum():
                return self._sum_interval(expr)
            case FloorDiv(left, right) | Mod(left, right) if constant(right) is not None:
                return self._division_interval(expr, left, constant(right) or 1)
            case Min(left, right) | Max(left, right):
                return _extreme_interval(self.interval(left), self.interval(right), isinstance(expr, Min))
            case Select(_, then, other):
                a, b = self.interval(then), self.interval(other)
                return _both(a[0], b[0], min), _both(a[1], b[1], max)
        return None, None

    def _sum_interval(self, expr: Sum) -> Interval:
        low: int | None = expr.const
        high: int | None = expr.const
        for factor, atom in expr.terms:
            found = self.interval(atom)
            first, last = found if factor > 0 else found[::-1]
            low = None if low is None or first is None else low + factor * first
            high = None if high is None or last is None else high + factor * last
        return low, high

    def _division_interval(self, expr: Expr, left: Expr, divisor: int) -> Interval:
        low, high = self.interval(left)
        if isinstance(expr, Mod):
            return 0, divisor - 1
        return None if low is None else low // divisor, None if high is None else high // divisor

    def at_least(self, expr: Expr, limit: int) -> bool:
        """Whether the expression is certainly >= limit: first in symbols (k <= N - 1), then in numbers."""
        for candidate in (expr, self._at_corner(expr)):
            low = self.interval(candidate)[0]
            if low is not None and low >= limit:
                return True
        return False

    def _at_corner(self, expr: Expr) -> Expr:
        """The linear terms in the indices replaced by what makes them least."""
        if not isinstance(expr, Sum):
            return expr
        total = as_expr(expr.const)
        for factor, atom in expr.terms:
            size = self.size.get(atom.name) if isinstance(atom, Var) else None
            total = total + (atom * factor if size is None else as_expr(0) if factor > 0 else (size - 1) * factor)
        return total

    def below(self, expr: Expr, limit: Expr) -> bool:
        """Whether 0 <= expr < limit certainly."""
        return self.at_least(expr, 0) and self.at_least(limit - expr - 1, 0)

    def decide(self, pred: Pred) -> Pred:
        """The predicate with comparisons that hold everywhere, or nowhere, replaced by TRUE or FALSE."""
        match pred:
            case And(parts):
                return conjunction(map(self.decide, parts))
            case Or(parts):
                return disjunction(map(self.decide, parts))
            case Ge(expr):
                return TRUE if self.at_least(expr, 0) else FALSE if self.at_least(-expr, 1) else pred
            case Eq(expr):
                return FALSE if self.at_least(expr, 1) or self.at_least(-expr, 1) else pred
            case Not(Eq() as part):
                return negate(self.decide(part))
            case Not() | Test():
                return pred
        raise TypeError(f"not a predicate: {pred!r}")

    def pinned(self, pred: Pred) -> dict[str, Expr]:
        """The index and its value, if a comparison holds only at the least value of one index (k < 1 says k == 0)."""
        for name in self.size:
            if isinstance(pred, Ge) and pred.expr == -Var(name):
                return {name: as_expr(0)}
        return {}

    def floordiv(self, left: Expr, right: Expr) -> Expr:
        """left // right, 0 where left is certainly below right. Multiples of the divisor come out of a sum."""
        return as_expr(0) if self.below(left, right) else self._pulled(left, right)[0]

    def mod(self, left: Expr, right: Expr) -> Expr:
        """left mod right, left itself where it is certainly below right."""
        return left if self.below(left, right) else self._pulled(left, right)[1]

    def _pulled(self, left: Expr, right: Expr) -> tuple[Expr, Expr]:
        whole, rest = _split(left, right)
        if whole != as_expr(0) and self.below(rest, right):
            return whole, rest
        return floordiv(left, right), mod(left, right)


def _split(left: Expr, right: Expr) -> tuple[Expr, Expr]:
    """(whole, rest) with left == whole * right + rest, by the look of the terms."""
    divisor = constant(right)
    terms = left.terms if isinstance(left, Sum) else ((1, left),)
    whole, rest = as_expr(0), as_expr(left.const if isinstance(left, Sum) else 0)
    if divisor is not None:
        number = constant(rest) or 0
        whole, rest = as_expr(number // divisor), as_expr(number % divisor)
    for factor, atom in terms:
        if divisor is not None and factor % divisor == 0:
            whole = whole + atom * (factor // divisor)
        elif atom == right:
            whole = whole + factor
        elif isinstance(atom, Mul) and right in (atom.left, atom.right):
            whole = whole + (atom.right if atom.left == right else atom.left) * factor
        else:
            rest = rest + atom * factor
    return whole, rest


def _both(a: int | None, b: int | None, pick) -> int | None:  # type: ignore[no-untyped-def]
    return None if a is None or b is None else pick(a, b)


def _extreme_interval(a: Interval, b: Interval, least: bool) -> Interval:
    """Of a minimum, the upper bound is known if one side's is; of a maximum, the lower bound."""
    lows = [x for x in (a[0], b[0]) if x is not None]
    highs = [x for x in (a[1], b[1]) if x is not None]
    if least:
        return min(lows) if len(lows) == 2 else None, min(highs, default=None)
    return max(lows, default=None), max(highs) if len(highs) == 2 else None
