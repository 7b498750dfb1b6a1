"""From a softmax back to the product of queries and keys, through operations that only transform the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.products import Product, product
from sparsify.passes.nodes import (
    ATEN,
    CASTS,
    COPIES,
    VIEWS,
    argument,
    call,
    dtype,
    is_tensor,
    keeps_numbers,
    op,
    same,
    same_sizes,
    scalar,
    shape,
    size,
)
from sparsify.passes.site import Mask

PROJECTIONS = ("linear", "addmm", "mm", "conv1d", "embedding")
MASKED = -1e4  # a fill or bias at or below this leaves nothing of exp(score)


@dataclass
class Scores:
    """softcap * tanh(scale * q·kᵀ / softcap) + masks: what stands in front of a softmax.

    multipliers: tensors without a key dimension that multiply the scores, to be moved onto q.
    fill: the highest number that masked scores were filled with, scaled as they are.
    path: the nodes from the product on that hold the scores.
    """

    product: Product
    scale: Any = 1.0
    softcap: Any = None
    in_tanh: bool = False
    multipliers: list[tuple[str, fx.Node]] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    fill: Any = -math.inf
    path: list[fx.Node] = field(default_factory=list)


def climb(node: Any, before: fx.Node) -> Scores | Refusal:
    """What the scores in `node` are made of. New nodes go in front of `before`."""
    if not isinstance(node, fx.Node):
        return Refusal("the scores are a constant", str(node))
    found = product(node, before)
    if found is not None:
        scores = Scores(found, steps=[found.spelling], path=[node])
        if found.alpha != 1:
            _multiply(scores, found.alpha)
        if found.bias is not None:
            scores.masks.append(Mask("add", found.bias))
        return scores
    rule = _RULES.get(op(node))
    if rule is None:
        hint = "kernels can't apply it between q·k and softmax"
        return Refusal(f"the scores pass through {op(node) or node.name}", str(node), hint)
    result = rule(node, before)
    if result:
        result.path.append(node)
    return result


def _through(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    if not keeps_numbers(node):
        return Refusal(f"the scores are cast to {dtype(node)}", str(node))
    scores = climb(node.args[0], before)
    if scores and op(node) not in COPIES:
        scores.steps.append("to")
    return scores


def _view(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    """A view that leaves the scores alone, or that splits (B*H, Nq, Nk) into (B, H, Nq, Nk)."""
    inner = node.args[0]
    if not regroups(inner, node):
        return Refusal("the scores change shape", str(node), "views that keep queries and keys apart are followed")
    scores = climb(inner, before)
    if not scores or len(shape(inner)) == len(shape(node)):
        return scores
    tensors = [mask.node for mask in scores.masks] + [factor for _, factor in scores.multipliers]
    if len(shape(node)) != 4 or not isinstance(shape(node)[1], int) or any(len(shape(t)) > 3 for t in tensors):
        return Refusal("the scores are masked before their heads are merged", str(node))
    heads = shape(node)[1]
    for mask in scores.masks:
        mask.node = _split(mask.node, heads, before)
    scores.multipliers = [(name, _split(factor, heads, before)) for name, factor in scores.multipliers]
    return scores


def _split(node: fx.Node, heads: int, before: fx.Node) -> fx.Node:
    """(B*H, ...) as (B, H, ...); what broadcasts over heads stays."""
    if len(shape(node)) < 3 or shape(node)[0] == 1:
        return node
    return call(before, ATEN.reshape.default, node, [-1, heads, size(before, node, 1), size(before, node, 2)])


def regroups(inner: fx.Node, node: fx.Node) -> bool:
    """Whether a view has its input's shape, or only merges or splits batch and heads."""
    ours, theirs = shape(inner), shape(node)
    if same_sizes(ours, theirs):
        return True
    return {len(ours), len(theirs)} == {3, 4} and same_sizes(ours[-2:], theirs[-2:]) and op(node) in VIEWS


def _scaled(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    """mul or div by a number, or by a tensor without a key dimension."""
    name = op(node)
    left, right = node.args[0], node.args[1]
    if argument(node, "rounding_mode") is not None:
        return Refusal("the scores are rounded", str(node))
    if name == "mul" and (scalar(left) is not None or (_is_factor(left, node) and not _is_factor(right, node))):
        left, right = right, left
    scores = climb(left, before)
    if not scores:
        return scores
    factor = scalar(right)
    scores.steps.append(name)
    if factor is not None and scores.masks and not factor > 0:
        return Refusal("the scores are multiplied by a negative number after their mask", str(node))
    if factor is not None:
        factor = factor if name == "mul" else 1 / factor
        _multiply(scores, factor)
        _rescale_masks(scores, name, right, before)
        return _rescaled_fill(scores, factor, node)
    if not _is_factor(right, node):
        return Refusal("the scores are multiplied by a tensor that differs from key to key", str(node))
    if scores.masks or scores.softcap is not None or scores.in_tanh:
        return Refusal("the scores are multiplied by a tensor after their mask or softcap", str(node))
    scores.multipliers.append((name, right))
    return scores


def _is_factor(node: Any, scores: fx.Node) -> bool:
    """Whether a tensor that multiplies the scores is the same for all keys."""
    if not is_tensor(node):
        return False
    sizes = shape(node)
    return not sizes or (sizes[-1] == 1 and not same(shape(scores)[-1], 1))


def _multiply(scores: Scores, factor: Any) -> None:
    scores.scale = scores.scale * factor
    if scores.in_tanh:
        scores.softcap, scores.in_tanh = factor, False
    elif scores.softcap is not None:
        scores.softcap = scores.softcap * factor


def _rescale_masks(scores: Scores, name: str, factor: Any, before: fx.Node) -> None:
    """Masks that were added before a scaling are scaled with the scores."""
    target = ATEN.mul if name == "mul" else ATEN.div
    for mask in scores.masks:
        if mask.kind == "add":
            overload = target.Tensor if is_tensor(factor) else target.Scalar
            mask.node = call(before, overload, mask.node, factor)


def _rescaled_fill(scores: Scores, factor: Any, node: fx.Node) -> Scores | Refusal:
    """Scores that were filled before a scaling must still count as masked."""
    if scores.fill == -math.inf:
        return scores
    if not isinstance(factor, int | float) or not scores.fill * factor <= MASKED:
        hint = f"only fills of {MASKED:g} or less are masks"
        return Refusal(f"scores are filled with {scores.fill:g} and then scaled", str(node), hint)
    scores.fill *= factor
    return scores


def _tanh(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0], before)
    if not scores:
        return scores
    if scores.masks or scores.softcap is not None or scores.in_tanh:
        return Refusal("tanh comes after the mask or after another tanh", str(node))
    scores.in_tanh = True
    scores.steps.append("tanh")
    return scores


def _added(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    """add or sub of a bias or an additive mask."""
    left, right, alpha = node.args[0], node.args[1], argument(node, "alpha", 1)
    scores = climb(left, before)
    if not scores and op(node) == "add" and alpha == 1:
        other = climb(right, before)
        if other:
            scores, left, right = other, right, left
    if not scores:
        return scores
    if scores.in_tanh:
        return Refusal("something is added to the tanh of the scores", str(node))
    scores.steps.append(op(node))
    if op(node) == "sub" and alpha == 1 and _is_row_maximum(right, left):
        return scores
    if not is_tensor(right):
        return scores  # the same number for every score: softmax does not see it
    factor = -alpha if op(node) == "sub" else alpha
    bias = right if factor == 1 else call(before, ATEN.mul.Scalar, right, factor)
    scores.masks.append(Mask("add", bias))
    return scores


def _is_row_maximum(node: Any, scores: Any) -> bool:
    """softmax(x - max(x)) is softmax(x)."""
    while op(node) in (*COPIES, *CASTS) or (op(node) == "getitem" and node.args[1] == 0):
        node = node.args[0]
    if op(node) not in ("amax", "max") or node.args[0] is not scores:
        return False
    dims = argument(node, "dim", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    over_keys = any(dim in (-1, len(shape(scores)) - 1) for dim in dims) and argument(node, "keepdim") is True
    return over_keys or not dims  # without dimensions it is the maximum of everything


def _masked_fill(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0], before)
    if not scores:
        return scores
    keep = call(before, ATEN.logical_not.default, node.args[1])
    return _masked(scores, keep, node.args[2], node)


def _where(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    condition, then, other = node.args[:3]
    scores = climb(then, before)
    if scores:
        return _masked(scores, condition, other, node)
    scores = climb(other, before)
    if not scores:
        return scores
    return _masked(scores, call(before, ATEN.logical_not.default, condition), then, node)


def _masked(scores: Scores, keep: fx.Node, fill: Any, node: fx.Node) -> Scores | Refusal:
    number = scalar(fill)
    if number is None or not isinstance(number, int | float) or not number <= MASKED or math.isnan(number):
        shown = number if number is not None else fill
        return Refusal(f"scores are filled with {shown}", str(node), f"only fills of {MASKED:g} or less are masks")
    if scores.in_tanh:
        return Refusal("the scores are masked between tanh and its multiplier", str(node))
    scores.fill = max(scores.fill, float(number))
    scores.masks.append(Mask("bool", keep))
    scores.steps.append(op(node))
    return scores


def _dropout(node: fx.Node, before: fx.Node) -> Scores | Refusal:
    if argument(node, "train") and argument(node, "p"):
        return Refusal("dropout is active", str(node), "call model.eval()")
    return climb(node.args[0], before)


_RULES = {
    **dict.fromkeys((*CASTS, *COPIES), _through),
    **dict.fromkeys((*VIEWS, "expand", "slice"), _view),
    **dict.fromkeys(("mul", "div", "multiply", "divide", "true_divide", "mul_", "div_"), _scaled),
    **dict.fromkeys(("add", "sub", "add_", "sub_"), _added),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
    "where": _where,
    "tanh": _tanh,
    "dropout": _dropout,
}


def reaches_product(node: Any, limit: int = 64) -> fx.Node | None:
    """A product of two computed tensors behind a softmax, with no projection in between: an attention, then."""
    seen, queue = set(), [node]
    while queue and len(seen) < limit:
        current = queue.pop(0)
        if current in seen or not is_tensor(current) or op(current) in PROJECTIONS:
            continue
        seen.add(current)
        if op(current) in ("matmul", "bmm", "baddbmm", "einsum") and _is_pairwise(current):
            return current
        queue.extend(current.all_input_nodes)
    return None


def _is_pairwise(node: fx.Node) -> bool:
    """Whether a product is one of two batched tensors: a weight has two dimensions."""
    factors = {"baddbmm": node.args[1:3], "einsum": node.args[1]}.get(op(node), node.args[:2])
    return len(factors) == 2 and all(is_tensor(factor) and len(shape(factor)) >= 3 for factor in factors)
