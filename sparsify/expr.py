"""Integer expressions and predicates over positions: the values that patterns, masks and kernels are made of.

An expression is an integer-valued function of `b, h, q, k` (batch, query head, absolute query position, key
position) and of scalars known at launch (`N` keys, `Nq` queries, sizes such as `size('N/8 + 512')`, loads from
tensors). A predicate is a boolean one. Both are frozen, hashable and canonical: building `k <= q` and `q - k >= 0`
gives equal objects, so equality is a cheap, sound (not complete) test of sameness. Division and remainder are
floored, as in Python.

Here they are built. `sparsify.text` writes and reads them, `sparsify.walk` substitutes and evaluates, and
`sparsify.patterns.tiles` asks what they do on a whole tile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, dataclass_transform

__all__ = [
    "FALSE", "TRUE", "And", "Bound", "Chosen", "Eq", "Expr", "FloorDiv", "Ge", "Listed", "Load", "Max", "Min", "Mod",
    "Mul", "Not", "Or", "Pred", "Select", "Sum", "Test", "Var", "as_expr", "as_pred", "conjunction", "disjunction",
    "eq", "floordiv", "maximum", "minimum", "mod", "negate", "select",
]  # fmt: skip


@dataclass_transform(frozen_default=True)
def node(cls: type[Any]) -> Any:
    """A frozen dataclass whose hash and text are computed once: trees are looked up and sorted again and again."""
    made: Any = dataclass(frozen=True)(cls)
    made.__hash__, made.__repr__ = _once("_hash", made.__hash__), _once("_text", made.__repr__)
    made.__reduce__ = lambda self: (made, tuple(getattr(self, name) for name in made.__match_args__))
    return made


def _once(name: str, compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def found(self: Any) -> Any:
        held = self.__dict__
        if name not in held:
            held[name] = compute(self)
        return held[name]

    return found


class Expr:
    """An integer expression. Python's arithmetic and order comparisons build new ones; use `eq` for equality."""

    __slots__ = ()

    def __add__(self, other: Expr | int) -> Expr:
        return _sum([(1, self), (1, as_expr(other))])

    def __sub__(self, other: Expr | int) -> Expr:
        return _sum([(1, self), (-1, as_expr(other))])

    def __rsub__(self, other: int) -> Expr:
        return _sum([(-1, self), (1, as_expr(other))])

    def __mul__(self, other: Expr | int) -> Expr:
        return _product(self, as_expr(other))

    def __neg__(self) -> Expr:
        return _sum([(-1, self)])

    def __floordiv__(self, other: Expr | int) -> Expr:
        return floordiv(self, other)

    def __mod__(self, other: Expr | int) -> Expr:
        return mod(self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __ge__(self, other: Expr | int) -> Pred:
        return _ge(self - other)

    def __gt__(self, other: Expr | int) -> Pred:
        return _ge(self - other - 1)

    def __le__(self, other: Expr | int) -> Pred:
        return _ge(as_expr(other) - self)

    def __lt__(self, other: Expr | int) -> Pred:
        return _ge(as_expr(other) - self - 1)

    def __str__(self) -> str:
        from sparsify.text import to_text

        return to_text(self)


@node
class Var(Expr):
    """A position (`b`, `h`, `q`, `k`), a tile bound, or a scalar known at launch."""

    name: str


@node
class Sum(Expr):
    """const + Σ coefficient · atom, atoms sorted by text and coefficients non-zero. A constant has no terms."""

    const: int
    terms: tuple[tuple[int, Expr], ...] = ()


@node
class Mul(Expr):
    """A product of two expressions neither of which is a constant."""

    left: Expr
    right: Expr


@node
class FloorDiv(Expr):
    """left // right, with right > 0."""

    left: Expr
    right: Expr


@node
class Mod(Expr):
    """left mod right in 0 .. right-1, with right > 0."""

    left: Expr
    right: Expr


@node
class Min(Expr):
    """The smaller of two."""

    left: Expr
    right: Expr


@node
class Max(Expr):
    """The larger of two."""

    left: Expr
    right: Expr


@node
class Select(Expr):
    """`then` where the predicate holds, else `other`."""

    condition: Pred
    then: Expr
    other: Expr


@node
class Load(Expr):
    """An element of a tensor known at launch: `source[index...]` (a bool counts as 0 or 1)."""

    source: str
    index: tuple[Expr, ...]


@node
class Bound(Expr):
    """The least or the greatest element of a load while its index at `axis` runs on to `last` (included).

    Only tile analysis makes these, so the other indices are scalars. A run that starts below 0 stands for the whole
    axis (a negative index counts from the end), and one that ends beyond the axis stops at its end. A kernel may
    answer with anything beyond the bound: by whole blocks of `sparsify.patterns.tiles.BLOCK` elements, say.
    """

    load: Load
    axis: int
    last: Expr
    greatest: bool


class Pred:
    """A predicate, kept in negation normal form. Combine with `&`, `|`, `~`."""

    __slots__ = ()

    def __and__(self, other: Pred) -> Pred:
        return conjunction([self, other])

    def __or__(self, other: Pred) -> Pred:
        return disjunction([self, other])

    def __invert__(self) -> Pred:
        return negate(self)

    __rand__ = __and__
    __ror__ = __or__

    def __bool__(self) -> bool:
        raise TypeError("a predicate has no truth value of its own; use &, |, ~ or evaluate(predicate, env)")

    def __str__(self) -> str:
        from sparsify.text import to_text

        return to_text(self)


@node
class And(Pred):
    """All of the parts hold; no part is itself an And. Without parts: TRUE."""

    parts: tuple[Pred, ...]


@node
class Or(Pred):
    """One of the parts holds; no part is itself an Or. Without parts: FALSE."""

    parts: tuple[Pred, ...]


@node
class Ge(Pred):
    """expr >= 0."""

    expr: Expr


@node
class Eq(Pred):
    """expr == 0."""

    expr: Expr


@node
class Not(Pred):
    """Not an Eq or a Test: everything else negates into itself."""

    part: Eq | Test


@node
class Test(Pred):
    """A load of a bool tensor."""

    load: Load
    __test__ = False  # not a test class, whatever pytest thinks of the name


@node
class Chosen(Pred):
    """What is chosen from the data; `text` is that of a `Choice` (patterns.select). Programs have `Listed` instead."""

    text: str


@node
class Listed(Pred):
    """Unit k // unit of keys is one of a list: the first `count` elements of `index` along its last axis.

    index: the list's first element, `source[list, ..., 0]`; its elements are ascending and distinct. count: how many
    there are. Neither index depends on k.
    """

    index: Load
    count: Load
    unit: int


TRUE: Pred = And(())
FALSE: Pred = Or(())


def as_expr(value: Expr | int) -> Expr:
    """The value as an expression; anything but an int or an Expr is a TypeError."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Sum(value)
    raise TypeError(f"expected an integer or an expression, found {value!r}")


def as_pred(value: Pred) -> Pred:
    """The value itself; anything but a predicate is a TypeError, which for a truth value says where it comes from."""
    if isinstance(value, Pred):
        return value
    hint = "; write eq(a, b) for a == b and ~eq(a, b) for a != b: == compares expressions as Python objects"
    raise TypeError(f"expected a predicate such as K <= Q, found {value!r}{hint if isinstance(value, int) else ''}")


def constant(expr: Expr) -> int | None:
    """The value of an expression that has no variables, else None."""
    return expr.const if isinstance(expr, Sum) and not expr.terms else None


def _sum(parts: Iterable[tuple[int, Expr]]) -> Expr:
    const, terms = 0, {}
    for factor, part in parts:
        if not isinstance(part, Sum):
            terms[part] = terms.get(part, 0) + factor
            continue
        const += factor * part.const
        for coefficient, atom in part.terms:
            terms[atom] = terms.get(atom, 0) + factor * coefficient
    kept = [(coefficient, atom) for atom, coefficient in terms.items() if coefficient]
    if len(kept) > 1:
        kept.sort(key=_by_text)
    if const == 0 and len(kept) == 1 and kept[0][0] == 1:
        return kept[0][1]
    return Sum(const, tuple(kept))


def _by_text(term: tuple[int, Expr]) -> tuple[int, str]:
    return -term[0], repr(term[1])


def _product(left: Expr, right: Expr) -> Expr:
    for one, other in ((left, right), (right, left)):
        factor = constant(one)
        if factor is not None:
            return _sum([(factor, other)])
    return Mul(*sorted((left, right), key=repr))


def floordiv(left: Expr | int, right: Expr | int) -> Expr:
    """left // right; folds constants, pulls multiples of a constant divisor out of a sum, and knows remainders."""
    left, right = as_expr(left), as_expr(right)
    divisor = constant(right)
    if divisor is None:
        return FloorDiv(left, right)
    if divisor <= 0:
        raise ValueError(f"a divisor must be positive, found {divisor}")
    whole, rest = _split(left, divisor)
    value = 0 if _is_below(rest, divisor) else constant(rest)
    return _sum([(1, whole), (1, as_expr(value // divisor) if value is not None else FloorDiv(rest, right))])


def mod(left: Expr | int, right: Expr | int) -> Expr:
    """left mod right; folds constants, drops multiples of a constant divisor, and knows remainders."""
    left, right = as_expr(left), as_expr(right)
    divisor = constant(right)
    if divisor is None:
        return Mod(left, right)
    if divisor <= 0:
        raise ValueError(f"a divisor must be positive, found {divisor}")
    rest = _split(left, divisor)[1]
    value = constant(rest)
    if value is not None:
        return as_expr(value % divisor)
    return rest if _is_below(rest, divisor) else Mod(rest, right)


def _is_below(expr: Expr, limit: int) -> bool:
    """Whether an expression is a remainder, and so one of 0 .. limit-1."""
    divisor = constant(expr.right) if isinstance(expr, Mod) else None
    return divisor is not None and divisor <= limit


def _split(expr: Expr, divisor: int) -> tuple[Expr, Expr]:
    """(whole, rest) with expr == whole * divisor + rest, whole as large as the coefficients show."""
    if divisor == 1:
        return expr, as_expr(0)
    if not isinstance(expr, Sum):
        return as_expr(0), expr
    whole = _sum([(c // divisor, a) for c, a in expr.terms if c % divisor == 0] + [(expr.const // divisor, as_expr(1))])
    rest = _sum([(c, a) for c, a in expr.terms if c % divisor] + [(expr.const % divisor, as_expr(1))])
    return whole, rest


def minimum(left: Expr | int, right: Expr | int) -> Expr:
    """The smaller of two; folds when their difference is a constant."""
    return _extreme(as_expr(left), as_expr(right), Min)


def maximum(left: Expr | int, right: Expr | int) -> Expr:
    """The larger of two; folds when their difference is a constant."""
    return _extreme(as_expr(left), as_expr(right), Max)


def _extreme(left: Expr, right: Expr, kind: type[Min] | type[Max]) -> Expr:
    gap = constant(left - right)
    if gap is None:
        return kind(*sorted((left, right), key=repr))
    return left if (gap < 0) == (kind is Min) else right


def select(condition: Pred, then: Expr | int, other: Expr | int) -> Expr:
    """`then` where the condition holds, else `other`; folds a known condition."""
    then, other = as_expr(then), as_expr(other)
    if as_pred(condition) == TRUE or then == other:
        return then
    return other if condition == FALSE else Select(condition, then, other)


def _ge(expr: Expr) -> Pred:
    value = constant(expr)
    if value is not None:
        return TRUE if value >= 0 else FALSE
    return Ge(_tightened(expr))


def _tightened(expr: Expr) -> Expr:
    """Divides `expr >= 0` by the common factor of its coefficients, rounding the constant down."""
    import math

    common = math.gcd(*(c for c, _ in expr.terms)) if isinstance(expr, Sum) else 1
    if common == 1:
        return expr
    return _sum([(c // common, a) for c, a in expr.terms] + [(expr.const // common, as_expr(1))])


def eq(left: Expr | int, right: Expr | int) -> Pred:
    """left == right."""
    gap = as_expr(left) - right
    value = constant(gap)
    if value is not None:
        return TRUE if value == 0 else FALSE
    return Eq(max(gap, -gap, key=repr))


def conjunction(parts: Iterable[Pred]) -> Pred:
    """All parts: flattened, without repeats, in a canonical order; FALSE if two parts contradict each other."""
    return _joined(map(as_pred, parts), And, TRUE, FALSE)


def disjunction(parts: Iterable[Pred]) -> Pred:
    """One part: flattened, without repeats, in a canonical order; TRUE if two parts cover everything."""
    return _joined(map(as_pred, parts), Or, FALSE, TRUE)


def _joined(parts: Iterable[Pred], kind: type[And] | type[Or], unit: Pred, zero: Pred) -> Pred:
    flat: dict[Pred, None] = {}
    for part in parts:
        flat.update(dict.fromkeys(part.parts if isinstance(part, kind) else [part]))
    flat = dict.fromkeys(_tightest(flat, kind))
    if zero in flat or any(negate(part) in flat for part in flat if not (isinstance(part, And | Or) or _bounds(part))):
        return zero
    dual = Or if kind is And else And
    kept = [p for p in flat if not (isinstance(p, dual) and any(q in flat for q in p.parts))]  # absorption
    shorter = [_without(p, flat, kind) if isinstance(p, dual) else p for p in kept]
    if shorter != kept:
        return _joined(shorter, kind, unit, zero)
    kept.sort(key=repr)
    return kept[0] if len(kept) == 1 else kind(tuple(kept)) if kept else unit


def _bounds(part: Pred) -> bool:
    """Whether it is a bound on a sum, which `_tightest` compares with the others."""
    return isinstance(part, Ge) and isinstance(part.expr, Sum)


def _tightest(parts: Iterable[Pred], kind: type[And] | type[Or]) -> list[Pred]:
    """Of several bounds on one linear form, the one that decides: the lowest in an And, the highest in an Or."""
    tighter = operator.lt if kind is And else operator.gt
    bound: dict[frozenset[tuple[int, Expr]], Ge] = {}
    rest: list[Pred] = []
    for part in parts:
        if _bounds(part):
            form = frozenset(part.expr.terms)
            if form not in bound or tighter(part.expr.const, bound[form].expr.const):
                bound[form] = part
        else:
            rest.append(part)
    for form, part in bound.items():
        other = bound.get(frozenset((-coefficient, atom) for coefficient, atom in form)) if len(bound) > 1 else None
        both = 0 if other is None else part.expr.const + other.expr.const
        if other is not None and (both < 0 if kind is And else both >= -1):
            return [FALSE if kind is And else TRUE]  # the two bounds leave nothing, or cover everything
    return rest + list(bound.values())


def _without(part: Pred, known: Mapping[Pred, None], kind: type[And] | type[Or]) -> Pred:
    """A nested part with what its surroundings already say left out.

    `x and (x and y or z)` is `x and (y or z)`; `x or (not x and y)` is `x or y`.
    """
    dual = Or if kind is And else And
    open_ = [p for p in part.parts if isinstance(p, And | Or) or negate(p) not in known]
    inner = [kind(tuple(q for q in p.parts if q not in known)) if isinstance(p, kind) else p for p in open_]
    return _joined(inner, dual, *((FALSE, TRUE) if dual is Or else (TRUE, FALSE)))


def negate(pred: Pred) -> Pred:
    """The opposite predicate, again in negation normal form."""
    held = pred.__dict__  # as hashes and texts are
    if "_negated" not in held:
        held["_negated"] = _negated(pred)
    return held["_negated"]


def _negated(pred: Pred) -> Pred:
    match pred:
        case And(parts):
            return disjunction(negate(part) for part in parts)
        case Or(parts):
            return conjunction(negate(part) for part in parts)
        case Ge(expr):
            return _ge(-expr - 1)
        case Not(part):
            return part
    return Not(pred)
