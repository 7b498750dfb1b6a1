"""The values that a mask's elements can have, as expressions over the mask's own indices.

An element is a `Pred` (bool), an `Expr` (integer) or `Pieces` (floating: a constant for each of a few predicates that
exclude each other and cover everything; enough for masks of 0 and -inf, and nothing else). The element functions here
do what torch does to elements, exactly; what they can't do they refuse by raising `Opaque`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsify.expr import (
    FALSE,
    TRUE,
    Eq,
    Expr,
    Load,
    Max,
    Min,
    Mul,
    Not,
    Pred,
    Select,
    Sum,
    as_expr,
    conjunction,
    disjunction,
    eq,
    negate,
    select,
)
from sparsify.passes.masks.box import Box
from sparsify.walk import substitute

DROPPED = -1e4  # what an additive mask drops: exp(-10000) is 0 in every dtype
MAX_PIECES = 8
MAX_SPLITS = 6


class Opaque(Exception):
    """An operation hid the index structure; the text says which and why."""


@dataclass(frozen=True)
class Pieces:
    """A floating element: `value` where its predicate holds.

    guessed: it was an integer of a tensor, taken for 0 or 1. That is right for a padding mask on its way to
    (1 - mask) * min and wrong for a document's number, so such an element may be scaled and shifted, but neither
    compared nor added to another one, until it has become a mask of 0 and at most DROPPED.
    """

    parts: tuple[tuple[float, Pred], ...]
    guessed: bool = False

    @classmethod
    def of(cls, parts: list[tuple[float, Pred]], guessed: bool = False) -> Pieces:
        """Pieces of equal value joined and empty ones dropped."""
        found: dict[float, Pred] = {}
        for value, where in parts:
            if math.isnan(value):
                if where != FALSE:
                    raise Opaque("the mask holds values that are not numbers")
                continue
            found[value] = found.get(value, FALSE) | where
        kept = tuple((value, where) for value, where in found.items() if where != FALSE)
        if len(kept) > MAX_PIECES:
            raise Opaque(f"more than {MAX_PIECES} different floating values: a bias, not a mask")
        return cls(kept, guessed and not all(value == 0 or value <= DROPPED for value, _ in kept))


Element = Pred | Expr | Pieces


def pick(condition: Pred, then: Element, other: Element) -> Element:
    """`then` where the condition holds, else `other`; both of the wider of the two kinds."""
    if isinstance(then, Pieces) or isinstance(other, Pieces):
        no = negate(condition)
        then, other = as_pieces(then), as_pieces(other)
        parts = [(v, p & condition) for v, p in then.parts] + [(v, p & no) for v, p in other.parts]
        return Pieces.of(parts, then.guessed or other.guessed)
    if isinstance(then, Expr) or isinstance(other, Expr):
        return select(condition, as_int(then), as_int(other))
    if then == other:
        return then
    if then in (TRUE, FALSE):
        return condition | other if then == TRUE else negate(condition) & other
    if other in (TRUE, FALSE):
        return negate(condition) | then if other == TRUE else condition & then
    return (condition & then) | (negate(condition) & other)


def as_bool(element: Element) -> Pred:
    """The element cast to bool: whether it is not 0."""
    if isinstance(element, Pred):
        return element
    if isinstance(element, Pieces):
        return disjunction(where for value, where in element.parts if value != 0)
    if isinstance(element, Mul):
        return as_bool(element.left) & as_bool(element.right)
    return negate(equal(element, as_expr(0), Box()))


def as_int(element: Element) -> Expr:
    """The element cast to int64: a bool counts as 0 or 1, a float is cut towards 0."""
    if isinstance(element, Expr):
        return element
    if isinstance(element, Pred):
        return select(element, 1, 0)
    if element.guessed:
        raise Opaque("an integer cast to floating and back")
    if any(math.isinf(value) for value, _ in element.parts):
        raise Opaque("an infinite value cast to an integer")
    result = as_expr(int(element.parts[-1][0]))
    for value, where in element.parts[:-1]:
        result = select(where, int(value), result)
    return result


def as_pieces(element: Element | float) -> Pieces:
    """The element cast to a float. An integer tensor's element counts as 0 or 1 (`assumes_binary`)."""
    match element:
        case Pieces():
            return element
        case bool() | int() | float():
            return Pieces.of([(float(element), TRUE)])
        case Pred():
            return Pieces.of([(1.0, element), (0.0, negate(element))])
        case Select(condition, then, other):
            return pick(condition, as_pieces(then), as_pieces(other))  # type: ignore[return-value]
        case Sum(const, terms):
            total = as_pieces(const)
            for factor, atom in terms:
                total = combine(lambda a, b, c=factor: a + c * b, total, as_pieces(atom))
            return total
        case Mul(left, right):
            return combine(operator.mul, as_pieces(left), as_pieces(right))
        case Load():
            return replace(as_pieces(Not(Eq(element))), guessed=True)
    raise Opaque(f"positions as floating numbers ({element})")


def assumes_binary(element: Element) -> list[Load]:
    """The integer loads that `as_pieces` takes for 0 or 1: a mask given as numbers."""
    match element:
        case Load():
            return [element]
        case Sum(_, terms):
            return [load for _, atom in terms for load in assumes_binary(atom)]
        case Select(_, then, other) | Mul(then, other):
            return assumes_binary(then) + assumes_binary(other)
    return []


def combine(function: Callable[..., float], *parts: Pieces) -> Pieces:
    """A function of floats, applied to every combination of pieces."""
    guessed = sum(pieces.guessed for pieces in parts)
    if guessed > 1 and function is not operator.mul:
        raise Opaque("numbers of two tensors that may not be 0 or 1")
    found: list[tuple[tuple[float, ...], Pred]] = [((), TRUE)]
    for pieces in parts:
        found = [((*values, v), where & p) for values, where in found for v, p in pieces.parts]
    return Pieces.of([(_float(function, values), where) for values, where in found if where != FALSE], guessed > 0)


def _float(function: Callable[..., float], values: tuple[float, ...]) -> float:
    try:
        return float(function(*values))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise Opaque("a division by zero or an overflow in a mask's floating values") from None


def at_least_zero(expr: Expr, box: Box, splits: int = MAX_SPLITS) -> Pred:
    """expr >= 0, with choices, minima and maxima in it taken apart, so that it is made of linear bounds."""
    split = _splittable(expr, (Select, Min, Max)) if splits else None
    if split is None:
        return box.decide(expr >= 0)
    factor, atom = split
    rest = expr - atom * factor
    first, second = _branches(atom)
    low, high = (at_least_zero(rest + part * factor, box, splits - 1) for part in (first, second))
    if isinstance(atom, Select):
        return (atom.condition & low) | (negate(atom.condition) & high)
    both = isinstance(atom, Min) == (factor > 0)
    return conjunction([low, high]) if both else disjunction([low, high])


def equal(left: Expr, right: Expr, box: Box, splits: int = MAX_SPLITS) -> Pred:
    """left == right, with choices taken apart; a bool tensor's element compared with 0 or 1 is a test."""
    gap = left - right
    split = _splittable(gap, (Select,)) if splits else None
    if split is None:
        return box.decide(eq(gap, 0))
    factor, atom = split
    rest = gap - atom * factor
    then, other = (rest + part * factor for part in _branches(atom))
    if isinstance(atom, Select):
        then = substitute(then, box.pinned(atom.condition))
        other = substitute(other, box.pinned(negate(atom.condition)))
    then, other = (equal(branch, as_expr(0), box, splits - 1) for branch in (then, other))
    return (atom.condition & then) | (negate(atom.condition) & other)


def _branches(atom: Expr) -> tuple[Expr, Expr]:
    return (atom.then, atom.other) if isinstance(atom, Select) else (atom.left, atom.right)  # type: ignore[attr-defined]


def _splittable(expr: Expr, kinds: tuple[type, ...]) -> tuple[int, Expr] | None:
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    return next(((factor, atom) for factor, atom in terms if isinstance(atom, kinds)), None)


def compare(name: str, left: Element, right: Element, box: Box) -> Pred:
    """One of eq ne lt le gt ge, elementwise."""
    if isinstance(left, Pieces) or isinstance(right, Pieces):
        a, b = as_pieces(left), as_pieces(right)
        with_zero = name in ("eq", "ne") and any([value for value, _ in side.parts] == [0.0] for side in (a, b))
        if (a.guessed or b.guessed) and not with_zero:
            raise Opaque("a comparison of numbers that may not be 0 or 1")
        return as_bool(combine(_ORDER[name], a, b))
    if isinstance(left, Pred) and isinstance(right, Pred) and name in ("eq", "ne"):
        same = (left & right) | (negate(left) & negate(right))
        return same if name == "eq" else negate(same)
    a, b = as_int(left), as_int(right)
    match name:
        case "eq":
            return equal(a, b, box)
        case "ne":
            return negate(equal(a, b, box))
        case "ge":
            return at_least_zero(a - b, box)
        case "gt":
            return at_least_zero(a - b - 1, box)
        case "le":
            return at_least_zero(b - a, box)
    return at_least_zero(b - a - 1, box)


_ORDER: dict[str, Callable[[float, float], float]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
