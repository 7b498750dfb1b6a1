"""Steps from a softmax back that mask scores or add to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import EXPANDS, Dim, leaves
from sparsify.passes.forms.scores import HINT, MASKED, Scores, side_of
from sparsify.passes.nodes import ATEN, CASTS, COPIES, argument, constant, dtype, is_tensor, op, same_sizes, shape

if TYPE_CHECKING:
    from sparsify.passes.forms.climb import Climb

UNDONE = -1e30  # no tensor that is added undoes a fill this low
MAXIMA = (ATEN.amax.default, ATEN.max.default, ATEN.max.dim)


def added(climb: Climb, node: fx.Node) -> Scores | Refusal:
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
    if max(UNDONE, torch.finfo(dtype(node)).min) < scores.fill:
        hint = "fill with -inf or the least number of the dtype"
        return Refusal(f"a tensor that may undo it is added to a fill with {scores.fill:g}", str(node), hint)
    side = side_of(scores, right, left, node, "add")
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
    if getattr(node, "target", None) not in MAXIMA or _plain(node.args[0]) is not _plain(inner):
        return None
    dims = argument(node, "dim", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:
        return ()
    dim = dims[0] % len(scores.layout)
    kept = bool(argument(node, "keepdim"))
    return leaves(scores.layout[dim]) if len(dims) == 1 and (at is None if kept else at == dim) else None


def _plain(node: Any) -> Any:
    while op(node) in COPIES:
        node = node.args[0]
    return node


def masked_fill(climb: Climb, node: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0])
    return _masked(scores, node.args[1], True, node.args[2], node.args[0], node) if scores else scores


def clamped(climb: Climb, node: fx.Node) -> Scores | Refusal:
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


def index_put(climb: Climb, node: fx.Node) -> Scores | Refusal:
    """scores[mask] = number, with a mask of as many dimensions."""
    indices, given = node.args[1:3]
    scores = climb(node.args[0])
    if not scores:
        return scores
    whole = len(indices) == 1 and is_tensor(indices[0]) and str(dtype(indices[0])) == "torch.bool"
    if not whole or argument(node, "accumulate") or len(shape(indices[0])) != len(scores.layout):
        return Refusal("a part of the scores is set", str(node), HINT)
    return _masked(scores, indices[0], True, given, node.args[0], node)


def where(climb: Climb, node: fx.Node) -> Scores | Refusal:
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
    side = side_of(scores, mask, inner, node, "bool")
    if not side:
        return side
    side.negated = drops
    scores.fill = max(scores.fill, float(number))
    scores.masks.append(side)
    scores.steps.append(op(node).rstrip("_"))
    return scores
