"""From a softmax on to the product with the values, through operations that only hand the weights on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import EXPANDS, PERMUTES, REGROUPS, Layout, aligned, bind, flat, forward, leaves
from sparsify.passes.forms.products import MATMULS, Factor, Product, product
from sparsify.passes.forms.scores import MIXERS, Side, Sink, mixed_heads
from sparsify.passes.forms.softmaxes import Softmax
from sparsify.passes.nodes import (
    CASTS,
    COPIES,
    argument,
    constant,
    is_tensor,
    keeps_numbers,
    module_kind,
    op,
    same,
    same_sizes,
    scalar,
    shape,
    value,
)

PRODUCTS = (*MATMULS, "einsum", "tensordot", "baddbmm", "addmm")
TORCH_MODULE = "torch.nn.modules.activation.MultiheadAttention"


@dataclass
class Descent:
    """The way from a softmax to the node that holds the attention's output.

    path: the nodes that hold the weights, from the softmax to the product. at: the place of the weights in it.
    divisor: by what the product is divided, if the weights were not.
    """

    path: list[fx.Node]
    product: Product
    at: int
    output: fx.Node
    steps: list[str] = field(default_factory=list)
    divisor: fx.Node | None = None

    @property
    def values(self) -> fx.Node:
        return self.product.factors[1 - self.at].node


@dataclass
class Weighted:
    """What the product with the values makes: the values' layout, the output's, what multiplies the output, and the
    masks by which weights were set to 0 after the softmax."""

    values: Factor
    layout: Layout
    multipliers: list[Side]
    emptying: list[Side]


def descend(found: Softmax) -> Descent | Refusal | None:
    """Follows the weights to their product; None where nothing says that they are weights of an attention."""
    node, path, steps = found.node, [found.node], []
    while True:
        users = [user for user in node.users if user not in found.inside and not _is_guard(user)]
        ends = [end for user in users if (end := _product(user, node)) is not None]
        if ends and len(users) > 1:
            return _used_elsewhere(node, users, ends[0][0])
        if ends:
            return _ended(found, Descent(path, ends[0][1], ends[0][2], ends[0][0], steps))
        if len(users) > 1:
            return _used_elsewhere(node, users, None) if any(map(leads_to_product, users)) else None
        if not users:
            return None
        problem = _step(users[0], node, steps)
        if problem is not None:
            return problem if leads_to_product(users[0]) else None
        node = users[0]
        path.append(node)


def _step(user: fx.Node, node: fx.Node, steps: list[str]) -> Refusal | None:
    """Why a node does not hand the weights on."""
    name = op(user)
    if name == "dropout":
        if argument(user, "train") and argument(user, "p"):
            return Refusal("dropout is active", str(user), "call model.eval()")
        steps.append("dropout(eval)")
        return None
    if name in CASTS and keeps_numbers(user):
        steps.append("to")
        return None
    if name in (*COPIES, *REGROUPS, *PERMUTES, *EXPANDS) and user.args[0] is node:
        return None
    if name in ("mul", "div") or _fills_nan(user, node) or _emptied(user, node) is not None:
        return None
    if name in MIXERS or name in PRODUCTS:
        return mixed_heads(user)
    return Refusal(f"the weights pass through {name or user.name}", str(user))


def _is_guard(user: fx.Node) -> bool:
    """Whether a node reads no more of the weights than their sizes, or which of them are NaN."""
    return op(user).startswith(("sym_", "zeros_like", "full_like", "isnan"))


def _fills_nan(user: fx.Node, node: fx.Node) -> bool:
    """0 in place of NaN: what the weights of a row that keeps nothing are in every kernel."""
    if op(user) == "nan_to_num":
        return not argument(user, "nan")
    found = _emptied(user, node)
    return found is not None and op(found[0]) == "isnan" and found[0].args[0] is node and found[1]


def _emptied(user: fx.Node, node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The mask by which weights are set to 0, and whether it is where it holds that they are."""
    if op(user) in ("masked_fill", "masked_fill_") and user.args[0] is node:
        return (user.args[1], True) if constant(user.args[2]) == 0 else None
    if op(user) != "where" or len(user.args) != 3 or not is_tensor(user.args[0]):
        return None
    mask, then, other = user.args
    if other is node and constant(then) == 0:
        return mask, True
    return (mask, False) if then is node and constant(other) == 0 else None


def _product(user: fx.Node, node: fx.Node) -> tuple[fx.Node, Product, int] | None:
    """The product of the weights in `node` with something else that `user` is or that it begins."""
    if op(user) == "mul" and len(user.users) == 1 and op(next(iter(user.users))) == "sum":
        user = next(iter(user.users))
    elif op(user) not in PRODUCTS:
        return None
    found = product(user)
    if found is None or not same(found.alpha, 1) or found.bias is not None:
        return None
    mine = [i for i, factor in enumerate(found.factors) if factor.node is node]
    if len(mine) != 1:
        return None
    factor, other = found.factors[mine[0]], found.factors[1 - mine[0]]
    shared = set(flat(factor.layout)) & set(flat(other.layout)) - set(flat(found.layout))
    return (user, found, mine[0]) if {0, 1} <= set(found.alone) and (shared or _sums_one(found, factor)) else None


def _sums_one(found: Product, factor: Factor) -> bool:
    """Whether what is summed has size 1."""
    return not factor.layout[-1] or not factor.layout[-2]


def _ended(found: Softmax, way: Descent) -> Descent | Refusal:
    """With the sum of the exponentials taken off behind the product."""
    if found.norm is None or found.divisor is not None:
        return way
    held = way.output
    while True:
        users = list(held.users)
        if len(users) != 1:
            return Refusal("the exponentials of the scores are used before they are divided by their sum", str(held))
        if (divisor := found.norm.divisor(users[0], held)) is not None:
            way.output, way.divisor = users[0], divisor
            return way
        if op(users[0]) not in (*CASTS, *COPIES):
            return Refusal("the exponentials of the scores are used before they are divided by their sum", str(held))
        held = users[0]


def _used_elsewhere(node: fx.Node, users: list[fx.Node], product: fx.Node | None) -> Refusal:
    others = [user for user in users if user is not product]
    if {op(user) for user in others} == {"sum", "div"}:
        return Refusal("the attention weights are normalised again after the softmax", str(node), "mask before it")
    names = ", ".join(user.name for user in others)
    way = "give it need_weights=False" if module_kind(node) == TORCH_MODULE else "turn off output_attentions"
    hint = f"{way}: a kernel that never stores the weights can't return them"
    return Refusal(f"the attention weights are also used by {names}", str(node), hint)


def leads_to_product(node: fx.Node, depth: int = 6) -> bool:
    """Whether a value that comes from the weights is soon multiplied with something: an attention, then."""
    if depth == 0:
        return False
    return any(_product(user, node) is not None or leads_to_product(user, depth - 1) for user in node.users)


def weighted(way: Descent, layout: Layout, sink: Sink | None) -> Weighted | Refusal:
    """Carries the layout of the scores along the weights to the values and the output."""
    multipliers: list[Side] = []
    emptying: list[Side] = []
    for node, user in zip(way.path, way.path[1:], strict=False):
        name = op(user)
        if sink is not None and name in ("slice", "narrow") and not same_sizes(shape(node), shape(user)):
            cut = _cut(node, user, layout, sink)
            if cut is None:
                return Refusal(f"the weights pass through {name} that does not cut off the sinks alone", str(user))
            layout = cut
        elif name in ("mul", "div"):
            side = _multiplier(node, user, layout)
            if not isinstance(side, Side):
                return side
            multipliers.append(side)
        elif (emptied := _emptied(user, node)) is not None:
            if not _fills_nan(user, node) and not same_sizes(shape(user), shape(node)):
                return Refusal(f"the weights pass through {name} that broadcasts them", str(user))
            if not _fills_nan(user, node):
                emptying.append(Side(emptied[0], aligned(emptied[0], layout), "bool", emptied[1]))
        elif name in (*REGROUPS, *PERMUTES, *EXPANDS):
            seen = forward(user, layout)
            if seen is None:
                return Refusal(f"the weights pass through {name}", str(user))
            layout = seen
    mine, values = way.product.factors[way.at], way.product.factors[1 - way.at]
    if sink is not None and sink.wide in flat(layout):
        return Refusal("the weights of the sinks are not cut off before the values", str(way.path[-1]))
    bind(mine.layout, layout)
    return Weighted(values, way.product.layout, multipliers, emptying)


def _cut(node: fx.Node, user: fx.Node, layout: Layout, sink: Sink) -> Layout | None:
    """The layout without the sinks, where a slice leaves the keys and nothing else."""
    dims = [i for i, dim in enumerate(layout) if dim == (sink.wide,)]
    if len(dims) != 1 or argument(user, "dim", 0) % len(layout) != dims[0] or argument(user, "step", 1) != 1:
        return None
    (at,) = dims
    begin = argument(user, "start") or 0
    if isinstance(begin, int) and begin < 0:
        begin = shape(node)[at] + begin
    size = math.prod(axis.size for axis in leaves(sink.keys))
    if not same(value(begin), sink.start) or not same(shape(user)[at], size):
        return None
    return tuple(leaves(sink.keys) if i == at else dim for i, dim in enumerate(layout))


def _multiplier(node: fx.Node, user: fx.Node, layout: Layout) -> Side | Refusal:
    """A number or a tensor that multiplies the weights, whatever the key: it multiplies the output."""
    name = op(user)
    left, right = user.args[0], user.args[1]
    other = right if left is node else left
    if (name == "div" and left is not node) or argument(user, "rounding_mode") is not None:
        return Refusal(f"the weights pass through {name}", str(user))
    if scalar(other) is None and (not is_tensor(other) or not same_sizes(shape(user), shape(node))):
        return Refusal(f"the weights pass through {name}", str(user))
    held = aligned(other, layout) if is_tensor(other) and shape(other) else ()
    return Side(other, held, name)
