"""From a softmax back to the product of queries and keys, through operations that only transform the scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import (
    EXPANDS,
    PERMUTES,
    REGROUPS,
    Axis,
    Dim,
    Layout,
    aligned,
    flat,
    forward,
    fresh,
    leaves,
)
from sparsify.passes.forms.products import MATMULS, Factor, Product, product
from sparsify.passes.nodes import (
    CASTS,
    COPIES,
    argument,
    constant,
    dtype,
    is_tensor,
    keeps_numbers,
    op,
    same,
    same_sizes,
    scalar,
    shape,
    value,
)

MASKED = -1e4  # a fill or bias at or below this leaves nothing of exp(score)
MIXERS = {"linear": -1, "conv1d": 1, "conv2d": 1, "conv3d": 1}  # and the dimension whose elements they mix
HINT = "kernels can't apply it between q·k and softmax"


@dataclass
class Side(Factor):
    """A tensor that takes part in the scores, and what it was multiplied with since then, numbers and tensors.

    kind: "bool" (True keeps), "add", "mul" or "div". negated: a bool that drops where it is True.
    """

    kind: Literal["bool", "add", "mul", "div"] = "add"
    negated: bool = False
    factors: list[tuple[str, Any]] = field(default_factory=list)


@dataclass
class Sink:
    """Logits beside the scores: `side` has them in `columns`; the keys are those of the wide axis from `start`."""

    side: Side
    columns: Dim
    wide: Axis
    keys: Dim
    start: int


@dataclass
class Scores:
    """softcap * tanh(scale * q·kᵀ / softcap) + masks: what stands in front of a softmax.

    layout: what the dimensions of the scores run over, at the node that was climbed.
    multipliers: tensors that multiply the scores before their masks.
    fill: the highest number that masked scores were filled with, scaled as they are.
    path: the nodes from the product on that hold the scores.
    maxima: what the maxima that were taken off run over: nothing to a softmax over that. shifted: there was one.
    """

    product: Product
    layout: Layout
    scale: Any = 1.0
    softcap: Any = None
    in_tanh: bool = False
    multipliers: list[Side] = field(default_factory=list)
    masks: list[Side] = field(default_factory=list)
    sink: Sink | None = None
    steps: list[str] = field(default_factory=list)
    fill: Any = -math.inf
    path: list[fx.Node] = field(default_factory=list)
    maxima: list[Dim] = field(default_factory=list)
    shifted: bool = False


@dataclass(frozen=True)
class Climb:
    """Reads scores. `is_weight`: whether a tensor is a parameter of the model; `is_key`: whether one is of the keys'
    and values' origin, which decides between several products."""

    is_weight: Callable[[fx.Node], bool]
    is_key: Callable[[fx.Node], bool]
    failed: dict[fx.Node, Refusal] = field(default_factory=dict)

    def __call__(self, node: Any) -> Scores | Refusal:
        """What the scores in `node` are made of."""
        if not isinstance(node, fx.Node) or not is_tensor(node):
            return Refusal("the scores are a constant", str(node))
        if node in self.failed:
            return self.failed[node]
        self.failed[node] = Refusal("the scores are too long a chain", str(node))  # until it is known better
        result = self._read(node)
        if result:
            del self.failed[node]
        else:
            self.failed[node] = result
        return result

    def _read(self, node: fx.Node) -> Scores | Refusal:
        found = self.pairwise(node)
        if found is not None:
            mixed = self._mixed(node, found.factors, found.layout)
            return self._begin(found, node) if mixed is None else mixed
        rule = _RULES.get(op(node))
        if rule is None:
            return self._unknown(node)
        result = rule(self, node)
        if result:
            result.path.append(node)
        return result

    def pairwise(self, node: fx.Node) -> Product | None:
        """A product of two tensors that were both computed."""
        found = product(node)
        return None if found is None or any(self.is_weight(factor.node) for factor in found.factors) else found

    def _begin(self, found: Product, node: fx.Node) -> Scores | Refusal:
        scores = Scores(found, found.layout, steps=[found.spelling], path=[node])
        if not same(found.alpha, 1):
            _multiply(scores, found.alpha)
        if found.bias is not None:
            bias = Side(found.bias, aligned(found.bias, found.layout))
            scores.masks.append(bias)
            if not same(value(found.beta), 1):
                bias.factors.append(("mul", found.beta))
        return scores

    def _mixed(self, node: fx.Node, factors: tuple[Factor, ...], made: Layout) -> Refusal | None:
        """Talking heads: a product that sums scores over something else than their queries and keys."""
        for factor in factors:
            if op(factor.node) in (*MATMULS, "einsum", *_RULES):
                inner = self(factor.node)
                summed = [i for i, dim in enumerate(factor.layout) if dim and not set(dim) & set(flat(made))]
                if inner and not any(_of_pairs(inner, inner.layout[i]) for i in summed):
                    return mixed_heads(node)
        return None

    def _unknown(self, node: fx.Node) -> Refusal:
        name = op(node)
        if name in MIXERS:
            inner = self(node.args[0])
            if inner and not _of_pairs(inner, inner.layout[MIXERS[name]]):
                return mixed_heads(node)
        if name in MATMULS or name == "einsum":
            found = product(node)
            others = [f for f in found.factors if not self.is_weight(f.node)] if found is not None else []
            mixed = self._mixed(node, tuple(others), found.layout) if found is not None else None
            if mixed is not None:
                return mixed
        return Refusal(f"the scores pass through {name or node.name}", str(node), HINT)


class MixedHeads(Refusal):
    """Talking heads: certainly an attention, though no kernel can run it."""


def mixed_heads(node: fx.Node) -> Refusal:
    hint = "talking heads need the scores of all heads at once; leave this site dense"
    return MixedHeads(f"{op(node)} mixes the heads between q·k and the values (talking heads)", str(node), hint)


def _of_pairs(scores: Scores, dim: Dim) -> bool:
    """Whether a dimension of scores runs over queries or keys: axes that one factor of the product alone has."""
    left, right = (set(flat(factor.layout)) for factor in scores.product.factors)
    return bool(set(leaves(dim)) & (left ^ right))


def _through(climb: Climb, node: fx.Node) -> Scores | Refusal:
    if not keeps_numbers(node):
        return Refusal(f"the scores are cast to {dtype(node)}", str(node))
    scores = climb(node.args[0])
    if scores and op(node) not in COPIES:
        scores.steps.append("to")
    return scores


def _view(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """A view that regroups, permutes or broadcasts what the scores run over."""
    scores = climb(node.args[0])
    if not scores:
        return scores
    layout = forward(node, scores.layout)
    if layout is None:
        return Refusal("the scores change shape", str(node), "views that keep queries and keys apart are followed")
    if not same_sizes(shape(node.args[0]), shape(node)):
        scores.steps.append(op(node))
    scores.layout = layout
    return scores


def _side(scores: Scores, node: fx.Node, inner: Any, result: fx.Node, kind: Any) -> Side | Refusal:
    """A tensor that meets the scores `inner` in `result`."""
    if not same_sizes(shape(inner), shape(result)):
        wider, narrow = shape(result), shape(inner)
        return Refusal(f"the scores {narrow} are broadcast beyond those of q and k to {wider}", str(result))
    return Side(node, aligned(node, scores.layout), kind)


def _scaled(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """mul or div by a number, or by a tensor."""
    name = "div" if "div" in op(node) else "mul"
    left, right = node.args[0], node.args[1]
    if argument(node, "rounding_mode") is not None:
        return Refusal("the scores are rounded", str(node))
    if name == "mul" and scalar(left) is not None:
        left, right = right, left
    scores = climb(left)
    if not scores and name == "mul" and is_tensor(right):
        other = climb(right)
        if other:
            scores, left, right = other, right, left
    if not scores:
        return scores
    scores.steps.append(name)
    factor = scalar(right)
    if factor is not None:
        return _scaled_by_number(scores, factor if name == "mul" else 1 / factor, node, (name, right))
    side = _side(scores, right, left, node, name)
    if not side:
        return side
    if any(mask.kind == "bool" for mask in scores.masks) or scores.softcap is not None or scores.in_tanh or scores.sink:
        return Refusal("the scores are multiplied by a tensor after their mask or softcap", str(node))
    for mask in scores.masks:
        mask.factors.append((name, side))
    scores.multipliers.append(side)
    return scores


def _scaled_by_number(scores: Scores, factor: Any, node: fx.Node, step: tuple[str, Any]) -> Scores | Refusal:
    """By `factor`, as `step` has it in the graph."""
    if any(mask.kind == "bool" for mask in scores.masks) and not factor > 0:
        return Refusal("the scores are multiplied by a negative number after their mask", str(node))
    _multiply(scores, factor)
    for side in [*scores.masks, *([scores.sink.side] if scores.sink else [])]:
        if side.kind == "add":
            side.factors.append(step)
    return _rescaled_fill(scores, factor, node)


def _multiply(scores: Scores, factor: Any) -> None:
    scores.scale = scores.scale * factor
    if scores.in_tanh:
        scores.softcap, scores.in_tanh = factor, False
    elif scores.softcap is not None:
        scores.softcap = scores.softcap * factor


def _rescaled_fill(scores: Scores, factor: Any, node: fx.Node) -> Scores | Refusal:
    """Scores that were filled before a scaling must still count as masked."""
    if scores.fill == -math.inf:
        return scores
    if not isinstance(factor, int | float) or not scores.fill * factor <= MASKED:
        hint = f"only fills of {MASKED:g} or less are masks"
        return Refusal(f"scores are filled with {scores.fill:g} and then scaled", str(node), hint)
    scores.fill *= factor
    return scores


def _negated(climb: Climb, node: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0])
    return _scaled_by_number(scores, -1.0, node, ("mul", -1.0)) if scores else scores


def _tanh(climb: Climb, node: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0])
    if not scores:
        return scores
    if scores.masks or scores.softcap is not None or scores.in_tanh or scores.sink:
        return Refusal("tanh comes after the mask or after another tanh", str(node))
    scores.in_tanh = True
    scores.steps.append("tanh")
    return scores


def _added(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """add or sub of a bias or an additive mask; of two products, the one with the keys is the attention's."""
    name, left, right, alpha = op(node).rstrip("_"), node.args[0], node.args[1], argument(node, "alpha", 1)
    scores = climb(left)
    if name == "add" and alpha == 1 and is_tensor(right) and not (scores and _has_keys(climb, scores)):
        other = climb(right)
        if other and (not scores or _has_keys(climb, other)):
            scores, left, right = other, right, left
    if not scores:
        return scores
    if scores.in_tanh:
        return Refusal("something is added to the tanh of the scores", str(node))
    scores.steps.append(name)
    if name == "sub" and alpha == 1 and (over := _maximum(right, left, scores)) is not None:
        scores.maxima.append(over)
        scores.shifted = True
        return scores
    if scores.sink:
        return Refusal("something is added to the scores after sinks were put beside them", str(node), HINT)
    if not is_tensor(right):
        scores.shifted = True
        return scores  # the same number for every score: softmax does not see it
    side = _side(scores, right, left, node, "add")
    if not side:
        return side
    factor = -alpha if name == "sub" else alpha
    if factor != 1:
        side.factors.append(("mul", factor))
    scores.masks.append(side)
    return scores


def _has_keys(climb: Climb, scores: Scores) -> bool:
    return any(climb.is_key(factor.node) for factor in scores.product.factors)


def _maximum(node: Any, inner: Any, scores: Scores) -> Dim | None:
    """What the maximum of the scores `inner` is taken over, if that is what a node is; everything is ()."""
    through = (*COPIES, *CASTS, *EXPANDS)
    while op(node) in through or (op(node) == "getitem" and node.args[1] == 0):
        node = node.args[0]
    at = None
    if op(node) == "unsqueeze":
        at, node = argument(node, "dim") % len(shape(node)), node.args[0]
        while op(node) in through or (op(node) == "getitem" and node.args[1] == 0):
            node = node.args[0]
    if op(node) not in ("amax", "max") or _plain(node.args[0]) is not _plain(inner):
        return None
    dims = argument(node, "dim", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:
        return ()
    dim = dims[0] % len(scores.layout)
    kept = bool(argument(node, "keepdim"))
    return leaves(scores.layout[dim]) if len(dims) == 1 and (at is None if kept else at == dim) else None


def _is_keys(scores: Scores, dim: Dim) -> bool:
    """Whether a dimension runs over axes that one factor of the product alone has."""
    left, right = (set(flat(factor.layout)) for factor in scores.product.factors)
    return set(leaves(dim)) <= right - left or set(leaves(dim)) <= left - right


def _plain(node: Any) -> Any:
    while op(node) in COPIES:
        node = node.args[0]
    return node


def _masked_fill(climb: Climb, node: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0])
    return _masked(scores, node.args[1], True, node.args[2], node.args[0], node) if scores else scores


def _clamped(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """max(scores, number) where the number is the least that the dtype has: it takes back infinities alone."""
    if op(node) in ("max", "maximum"):
        left, right = node.args[0], node.args[1] if len(node.args) > 1 else None
        inner, least = (right, constant(left)) if constant(left) is not None else (left, constant(right))
    else:
        inner, least = node.args[0], constant(argument(node, "min"))
        least = None if argument(node, "max") is not None else least
    if not isinstance(least, int | float) or not least <= torch.finfo(dtype(node)).min:
        return Refusal(f"the scores pass through {op(node)}", str(node), HINT)
    scores = climb(inner)
    if not scores:
        return scores
    if not same_sizes(shape(inner), shape(node)) or dtype(inner) != dtype(node) or scores.in_tanh:
        return Refusal(f"the scores pass through {op(node)}", str(node), HINT)
    scores.fill = max(scores.fill, least)
    return scores


def _index_put(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """scores[mask] = number, with a mask of as many dimensions."""
    indices, given = node.args[1:3]
    scores = climb(node.args[0])
    if not scores:
        return scores
    whole = len(indices) == 1 and is_tensor(indices[0]) and str(dtype(indices[0])) == "torch.bool"
    if not whole or argument(node, "accumulate") or len(shape(indices[0])) != len(scores.layout):
        return Refusal("a part of the scores is set", str(node), HINT)
    return _masked(scores, indices[0], True, given, node.args[0], node)


def _where(climb: Climb, node: fx.Node) -> Scores | Refusal:
    if len(node.args) != 3:
        return Refusal("the scores pass through where", str(node), HINT)
    condition, then, other = node.args
    scores = climb(then)
    if scores:
        return _masked(scores, condition, False, other, then, node)
    second = climb(other)
    if not second:
        return scores if isinstance(then, fx.Node) and is_tensor(then) and constant(then) is None else second
    return _masked(second, condition, True, then, other, node)


def _masked(scores: Scores, mask: fx.Node, drops: bool, fill: Any, inner: Any, node: fx.Node) -> Scores | Refusal:
    number = constant(fill)
    if number is None or not isinstance(number, int | float) or not number <= MASKED or math.isnan(number):
        shown = number if number is not None else fill
        return Refusal(f"scores are filled with {shown}", str(node), f"only fills of {MASKED:g} or less are masks")
    if scores.in_tanh:
        return Refusal("the scores are masked between tanh and its multiplier", str(node))
    if scores.sink:
        return Refusal("the scores are masked after sinks were put beside them", str(node), HINT)
    side = _side(scores, mask, inner, node, "bool")
    if not side:
        return side
    side.negated = drops
    scores.fill = max(scores.fill, float(number))
    scores.masks.append(side)
    scores.steps.append(op(node).rstrip("_"))
    return scores


def _concatenated(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """cat([scores, sinks]) along the keys, at either end."""
    parts = list(node.args[0])
    found = {i: scores for i, part in enumerate(parts) if (scores := climb(part))}
    if len(found) > 1:
        hint = "an attention over the concatenated keys and values is one product"
        return Refusal("scores of several products are concatenated", str(node), hint)
    if not found or len(parts) != 2:
        return climb(parts[0]) if not found else Refusal("the scores are concatenated twice", str(node), HINT)
    ((at, scores),) = found.items()
    dim = argument(node, "dim", 0) % len(scores.layout)
    other, keys = parts[1 - at], leaves(scores.layout[dim])
    if scores.in_tanh or scores.sink or not _is_keys(scores, keys):
        return Refusal("something is put beside the scores that is no sink", str(node), HINT)
    wide = Axis(shape(node)[dim])
    columns = fresh((shape(other)[dim],))[0]
    side = Side(other, aligned(other, (*scores.layout[:dim], columns, *scores.layout[dim + 1 :])))
    scores.sink = Sink(side, columns, wide, keys, 0 if at == 0 else shape(other)[dim])
    scores.layout = (*scores.layout[:dim], (wide,), *scores.layout[dim + 1 :])
    scores.steps.append("cat")
    return scores


def _dropout(climb: Climb, node: fx.Node) -> Scores | Refusal:
    if argument(node, "train") and argument(node, "p"):
        return Refusal("dropout is active", str(node), "call model.eval()")
    return climb(node.args[0])


_RULES: dict[str, Callable[[Climb, fx.Node], Scores | Refusal]] = {
    **dict.fromkeys((*CASTS, *COPIES), _through),
    **dict.fromkeys((*REGROUPS, *PERMUTES, *EXPANDS), _view),
    **dict.fromkeys(("mul", "div", "multiply", "divide", "true_divide", "mul_", "div_"), _scaled),
    **dict.fromkeys(("add", "sub", "subtract", "add_", "sub_"), _added),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
    "index_put": _index_put,
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), _clamped),
    "neg": _negated,
    "where": _where,
    "tanh": _tanh,
    "cat": _concatenated,
    "dropout": _dropout,
}


def reaches_product(node: Any, climb: Climb, limit: int = 64) -> fx.Node | None:
    """A product of two computed tensors behind a softmax, with no projection in between: an attention, then."""
    seen, queue = set(), [node]
    while queue and len(seen) < limit:
        current = queue.pop(0)
        if current in seen or not is_tensor(current) or "softmax" in op(current):
            continue
        seen.add(current)
        found = product(current)
        if found is not None and climb.pairwise(current) is None:
            continue  # a projection
        if found is not None and {0, 1} <= set(found.alone):
            return current
        if op(current) not in ("linear", "addmm", "conv1d", "conv2d", "embedding"):
            queue.extend(current.all_input_nodes)
    return None
