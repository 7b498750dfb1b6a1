"""The values that a mask's elements can have, as expressions over the mask's own indices.

An element is a `Pred` (bool), an `Expr` (integer), `Pieces` (floating: a constant for each of a few predicates that
exclude each other and cover everything; enough for masks of 0 and -inf) or a `Tree` (floating: an operation over other
elements, or an element of a floating tensor). The element functions here do what torch does to elements, exactly; what
they can't do they refuse by raising `Opaque`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.expr import (
    FALSE,
    TRUE,
    Expr,
    Max,
    Min,
    Mul,
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
from sparsify.passes.nodes import dtype, is_tensor, op
from sparsify.walk import substitute

DROPPED = -1e4  # what an additive mask drops: exp(-10000) is 0 in every dtype
MAX_PIECES = 8
MAX_SPLITS = 6
MAX_CHOICES = 4


class Opaque(Exception):
    """An operation hid the index structure; the text says which and why."""


@dataclass(frozen=True)
class Pieces:
    """A floating element: `value` where its predicate holds."""

    parts: tuple[tuple[float, Pred], ...]

    @classmethod
    def of(cls, parts: list[tuple[float, Pred]]) -> Pieces:
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
        return cls(kept)


@dataclass(frozen=True, eq=False)
class Tree:
    """A floating element that no constants describe.

    node, index: where the graph holds it. None and () for a choice, whose operands are a condition and two elements.
    operands: None for an element of a tensor; else what the operation of `node` takes at this index, in place of each
    of its tensor arguments: an element, or a node where it takes the tensor as a whole.
    """

    node: fx.Node | None
    index: tuple[Expr, ...]
    operands: tuple[Any, ...] | None = None

    @property
    def name(self) -> str:
        """The operation; "" for an element of a tensor."""
        return "" if self.operands is None else "choice" if self.node is None else op(self.node).removesuffix("_")

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the node's call with the operands in their places."""
        assert self.node is not None and self.operands is not None
        rest = iter(self.operands)
        return fx.map_arg((self.node.args, self.node.kwargs), lambda n: next(rest) if is_tensor(n) else n)  # type: ignore[return-value]


Element = Pred | Expr | Pieces | Tree
CASTS = ("to", "_to_copy", "type_as")
WHOLE_FLOATS = (torch.float32, torch.float64)  # those that hold positions and document numbers exactly (below 2**24)
_WHOLE: dict[str, Callable[..., Expr]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "rsub": lambda a, b: b - a,
    "neg": operator.neg,
}


def whole(element: Element | float) -> Expr | None:
    """A floating element that is a whole number by the way it was made, as an integer; else None."""
    match element:
        case Expr():
            return element
        case Pred():
            return select(element, 1, 0)
        case bool() | int() | float():
            return as_expr(int(element)) if abs(element) < 2**24 and element == int(element) else None
        case Pieces(parts):
            return as_int(element) if all(whole(value) is not None for value, _ in parts) else None
        case Tree() if element.name in (*CASTS, *_WHOLE) and dtype(element.node) in WHOLE_FLOATS:
            args, kwargs = element.arguments()
            if element.name in CASTS:
                return whole(args[0])
            found = [whole(arg) for arg in args if not isinstance(arg, fx.Node)]
            if kwargs or len(found) != len(args) or any(part is None for part in found) or len(args) > 2:
                return None
            return _WHOLE[element.name](*found)
    return None


def pick(condition: Pred, then: Element, other: Element) -> Element:
    """`then` where the condition holds, else `other`; both of the wider of the two kinds."""
    if isinstance(then, Tree) or isinstance(other, Tree):
        if condition in (TRUE, FALSE) or then is other:
            return other if condition == FALSE else then
        return Tree(None, (), (condition, then, other))
    if isinstance(then, Pieces) or isinstance(other, Pieces):
        no = negate(condition)
        then, other = as_pieces(then), as_pieces(other)
        parts = [(v, p & condition) for v, p in then.parts] + [(v, p & no) for v, p in other.parts]
        return Pieces.of(parts)
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
    if isinstance(element, Tree):
        return as_bool(as_int(element))
    if isinstance(element, Mul):
        return as_bool(element.left) & as_bool(element.right)
    return negate(equal(element, as_expr(0), Box()))


def as_int(element: Element) -> Expr:
    """The element cast to int64: a bool counts as 0 or 1, a float is cut towards 0."""
    if isinstance(element, Expr):
        return element
    if isinstance(element, Pred):
        return select(element, 1, 0)
    if isinstance(element, Tree):
        return _whole_numbers(element)
    if any(math.isinf(value) for value, _ in element.parts):
        raise Opaque("an infinite value cast to an integer")
    result = as_expr(int(element.parts[-1][0]))
    for value, where in element.parts[:-1]:
        result = select(where, int(value), result)
    return result


def as_pieces(element: Element | float) -> Pieces:
    """The element cast to a float. Raises Opaque for what constants don't describe."""
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
    raise Opaque("floating numbers made of positions or data")


def combine(function: Callable[..., float], *parts: Pieces) -> Pieces:
    """A function of floats, applied to every combination of pieces."""
    found: list[tuple[tuple[float, ...], Pred]] = [((), TRUE)]
    for pieces in parts:
        found = [((*values, v), where & p) for values, where in found for v, p in pieces.parts]
    return Pieces.of([(_float(function, values), where) for values, where in found if where != FALSE])


def rounded(element: Element, dtype: torch.dtype | None) -> Element:
    """An element in a floating dtype; in any other it is what it was. Raises Opaque for what constants can't say."""
    if dtype is None or not dtype.is_floating_point:
        return element
    if isinstance(element, Pieces):
        return combine(lambda x: torch.tensor(x, dtype=torch.float64).to(dtype).item(), element)
    if dtype in WHOLE_FLOATS:
        return element  # whole numbers, or as exact as the element's own dtype
    return rounded(as_pieces(element), dtype)


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
    """left == right, with choices taken apart; a bool tensor's element compared with 0 or 1 is a test.

    Many choices stay, as in numbers of regions that are compared: taken apart they are a case for each combination.
    """
    gap = left - right
    many = isinstance(gap, Sum) and sum(isinstance(atom, Select) for _, atom in gap.terms) > MAX_CHOICES
    split = _splittable(gap, (Select,)) if splits and not many else None
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
    if isinstance(left, Tree) or isinstance(right, Tree):
        left, right = _whole_numbers(left), _whole_numbers(right)
    if isinstance(left, Pieces) or isinstance(right, Pieces):
        return as_bool(combine(_ORDER[name], as_pieces(left), as_pieces(right)))
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


def _whole_numbers(element: Element) -> Expr:
    found = whole(element)
    if found is None:
        raise Opaque("floating numbers")
    return found


_ORDER: dict[str, Callable[[float, float], float]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
