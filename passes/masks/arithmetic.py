"""Elementwise operations on mask elements, in torch's own promotion: bool, then integer, then floating."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsify.expr import Expr, Pred, Select, as_expr, constant, maximum, minimum, negate, select
from sparsify.passes.masks.indices import Index, Rule, argument
from sparsify.passes.masks.values import (
    Element,
    Opaque,
    Pieces,
    Tree,
    as_bool,
    as_int,
    as_pieces,
    combine,
    compare,
    pick,
    rounded,
)  # fmt: skip
from sparsify.passes.nodes import value

if TYPE_CHECKING:
    from sparsify.passes.masks.elements import Elements


def _operands(el: Elements, node: fx.Node, index: Index, count: int) -> list[Element]:
    """The first arguments, broadcast, promoted to one kind and rounded as torch rounds them before it computes."""
    return _promoted(el, _given(el, node, index, count, computes_in=el.is_float(node)))


def _given(el: Elements, node: fx.Node, index: Index, count: int, computes_in: bool) -> list[Element]:
    """The first arguments, broadcast, in the dtype that torch promotes them to; arithmetic on halves is in float32."""
    given = [argument(node, i, ("self", "other")[i % 2]) for i in range(count)]
    dtype = common_dtype(given)
    if computes_in and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    return [rounded(el.broadcast(arg, node, index), dtype) for arg in given]


def common_dtype(given: list[Any]) -> torch.dtype | None:
    """What torch promotes the arguments of an elementwise operation to: numbers give way to tensors of their kind."""
    values = [_plain(value(arg)) for arg in given]
    if not any(isinstance(found, torch.Tensor) for found in values):
        return None
    return torch.result_type(values[0], values[-1])


def _plain(found: Any) -> Any:
    """A symbolic number as some number of its type."""
    return 1 if isinstance(found, torch.SymInt) else 1.0 if isinstance(found, torch.SymFloat) else found


def _promoted(el: Elements, found: list[Element]) -> list[Element]:
    if any(isinstance(x, Tree) for x in found):
        raise Opaque("floating numbers made of positions or data")  # the caller keeps the operation as it is
    if any(isinstance(x, Pieces) for x in found):
        return [as_pieces(x) for x in found]
    if any(isinstance(x, Expr) for x in found):
        return [as_int(x) for x in found]
    return found


def comparison(name: str) -> Rule:
    def rule(el: Elements, node: fx.Node, index: Index) -> Element:
        found = _given(el, node, index, 2, computes_in=False)
        return compare(name, *(found if any(isinstance(x, Tree) for x in found) else _promoted(el, found)), el.box)

    return rule


def logical(function: Callable[..., Pred]) -> Rule:
    def rule(el: Elements, node: fx.Node, index: Index) -> Element:
        count = len([a for a in node.args if a is not None])
        names = ("self", "other")
        return function(*(as_bool(el.broadcast(argument(node, i, names[i]), node, index)) for i in range(count)))

    return rule


def bitwise(function: Callable[..., Pred]) -> Rule:
    """As `logical`, on bools only."""

    def rule(el: Elements, node: fx.Node, index: Index) -> Element:
        found = _operands(el, node, index, len(node.args))
        if not all(isinstance(x, Pred) for x in found):
            raise Opaque("bits of integers")
        return function(*found)

    return rule


def _xor(a: Pred, b: Pred) -> Pred:
    return (a & negate(b)) | (negate(a) & b)


def arithmetic(on_ints: Callable[[Elements, Expr, Expr], Expr], on_floats: Callable[..., float]) -> Rule:
    def rule(el: Elements, node: fx.Node, index: Index) -> Element:
        a, b = _operands(el, node, index, 2)
        alpha = node.kwargs.get("alpha", 1)
        if isinstance(a, Pieces):
            scaled = on_floats if alpha == 1 else lambda x, y: on_floats(x, alpha * y)
            return combine(scaled, a, b)  # type: ignore[arg-type]
        b = as_int(b) if alpha == 1 else as_int(b) * el.scalar(alpha)
        return on_ints(el, as_int(a), b)

    return rule


def product(el: Elements, a: Expr, b: Expr) -> Expr:
    """With a choice on one side the product is a choice of products: masks made of 0 and 1 stay predicates."""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Select):
            return select(x.condition, product(el, x.then, y), product(el, x.other, y))
    return a * b


def _quotient(el: Elements, a: Expr, b: Expr) -> Expr:
    return el.box.floordiv(a, _positive(el, b))


def _remainder(el: Elements, a: Expr, b: Expr) -> Expr:
    return el.box.mod(a, _positive(el, b))


def _positive(el: Elements, divisor: Expr) -> Expr:
    if not el.box.at_least(divisor, 1):
        raise Opaque(f"a division by {divisor}, which may not be positive")
    return divisor


def divide(el: Elements, node: fx.Node, index: Index) -> Element:
    mode = argument(node, 2, "rounding_mode")
    a, b = _operands(el, node, index, 2)
    if mode is None:
        return combine(lambda x, y: x / y, as_pieces(a), as_pieces(b))
    if isinstance(a, Pieces):
        rounded = math.floor if mode == "floor" else math.trunc
        return combine(lambda x, y: rounded(x / y), a, b)  # type: ignore[arg-type]
    a, b = as_int(a), as_int(b)
    if mode == "trunc" and not el.box.at_least(a, 0):
        raise Opaque("a division rounded towards 0 of what may be negative")
    return _quotient(el, a, b)


def fmod(el: Elements, node: fx.Node, index: Index) -> Element:
    a, b = _operands(el, node, index, 2)
    if isinstance(a, Pieces):
        return combine(math.fmod, a, b)  # type: ignore[arg-type]
    a, b = as_int(a), as_int(b)
    if not el.box.at_least(a, 0):
        raise Opaque("fmod of what may be negative")
    return _remainder(el, a, b)


def negative(el: Elements, node: fx.Node, index: Index) -> Element:
    (x,) = _operands(el, node, index, 1)
    return combine(lambda v: -v, x) if isinstance(x, Pieces) else -as_int(x)


def absolute(el: Elements, node: fx.Node, index: Index) -> Element:
    (x,) = _operands(el, node, index, 1)
    return combine(abs, x) if isinstance(x, Pieces) else maximum(as_int(x), -as_int(x))


def clamp(el: Elements, node: fx.Node, index: Index) -> Element:
    name = el.name(node)
    low = argument(node, 1, "min") if name != "clamp_max" else None
    high = argument(node, 2, "max") if name != "clamp_max" else argument(node, 1, "max")
    result = el.broadcast(node.args[0], node, index)
    for limit, on_ints, on_floats in ((low, maximum, max), (high, minimum, min)):
        if limit is not None:
            a, b = _promoted(el, [result, el.broadcast(limit, node, index)])
            result = combine(on_floats, a, b) if isinstance(a, Pieces) else on_ints(as_int(a), as_int(b))  # type: ignore[arg-type]
    return result


def test(function: Callable[[float], bool]) -> Rule:
    """A test of a floating element; an integer is taken as it is."""
    return lambda el, node, index: as_bool(combine(function, as_pieces(_operands(el, node, index, 1)[0])))


def where(el: Elements, node: fx.Node, index: Index) -> Element:
    if len(node.args) != 3:
        raise Opaque("where with one argument (the positions that hold)")
    condition, then, other = (el.broadcast(arg, node, index) for arg in node.args)
    if isinstance(then, Tree) or isinstance(other, Tree):
        return pick(as_bool(condition), then, other)
    return pick(as_bool(condition), *_promoted(el, [then, other]))


def masked_fill(el: Elements, node: fx.Node, index: Index) -> Element:
    mask = as_bool(el.broadcast(node.args[1], node, index))
    then = el.cast(el.broadcast(node.args[2], node, index), node)
    return pick(mask, then, el.broadcast(node.args[0], node, index))


def right_minus_left(el: Elements, node: fx.Node, index: Index) -> Element:
    a, b = _operands(el, node, index, 2)
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise Opaque("rsub with a factor")
    return combine(lambda x, y: y - x, a, b) if isinstance(a, Pieces) else as_int(b) - as_int(a)  # type: ignore[arg-type]


def shift_right(el: Elements, node: fx.Node, index: Index) -> Element:
    a, b = (as_int(x) for x in _operands(el, node, index, 2))
    bits = constant(b)
    if bits is None or not 0 <= bits < 63:
        raise Opaque("a shift by something unknown")
    return el.box.floordiv(a, as_expr(2**bits))


def _table(*rows: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names.split()}


_ints: dict[str, Any] = {
    "add": lambda el, a, b: a + b,
    "sub": lambda el, a, b: a - b,
    "minimum": lambda el, a, b: minimum(a, b),
    "maximum": lambda el, a, b: maximum(a, b),
}

ARITHMETIC_RULES: dict[str, Rule] = _table(
    ("eq", comparison("eq")),
    ("ne not_equal", comparison("ne")),
    ("lt less", comparison("lt")),
    ("le less_equal", comparison("le")),
    ("gt greater", comparison("gt")),
    ("ge greater_equal", comparison("ge")),
    ("logical_and", logical(lambda a, b: a & b)),
    ("logical_or", logical(lambda a, b: a | b)),
    ("logical_xor", logical(_xor)),
    ("logical_not", logical(negate)),
    ("bitwise_and __and__ __iand__", bitwise(lambda a, b: a & b)),
    ("bitwise_or __or__ __ior__", bitwise(lambda a, b: a | b)),
    ("bitwise_xor __xor__ __ixor__", bitwise(_xor)),
    ("bitwise_not", bitwise(negate)),
    ("add", arithmetic(_ints["add"], lambda x, y: x + y)),
    ("sub subtract", arithmetic(_ints["sub"], lambda x, y: x - y)),
    ("mul multiply", arithmetic(product, operator.mul)),
    ("minimum", arithmetic(_ints["minimum"], min)),
    ("maximum", arithmetic(_ints["maximum"], max)),
    ("floor_divide", arithmetic(_quotient, lambda x, y: x // y)),
    ("remainder", arithmetic(_remainder, lambda x, y: x % y)),
    ("div divide true_divide", divide),
    ("fmod", fmod),
    ("rsub", right_minus_left),
    ("neg negative", negative),
    ("abs absolute", absolute),
    ("clamp clip clamp_min clamp_max", clamp),
    ("isinf", test(math.isinf)),
    ("isneginf", test(lambda x: x == -math.inf)),
    ("isnan", test(math.isnan)),
    ("isfinite", test(math.isfinite)),
    ("where", where),
    ("masked_fill", masked_fill),
    ("__rshift__ bitwise_right_shift __irshift__", shift_right),
)
