"""Steps from a softmax back that scale scores: views, casts, factors, tanh."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import forward
from sparsify.passes.forms.scores import HINT, MASKED, Scores, multiply, side_of
from sparsify.passes.nodes import COPIES, argument, dtype, is_tensor, keeps_numbers, op, same_sizes, scalar, shape

if TYPE_CHECKING:
    from sparsify.passes.forms.climb import Climb


def through(climb: Climb, node: fx.Node) -> Scores | Refusal:
    if not keeps_numbers(node):
        return Refusal(f"the scores are cast to {dtype(node)}", str(node))
    scores = climb(node.args[0])
    if scores and op(node) not in COPIES:
        scores.steps.append("to")
    return scores


def view(climb: Climb, node: fx.Node) -> Scores | Refusal:
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


def scaled(climb: Climb, node: fx.Node) -> Scores | Refusal:
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
    side = side_of(scores, right, left, node, name)
    if not side:
        return side
    if any(mask.kind == "bool" for mask in scores.masks) or scores.softcap is not None or scores.in_tanh or scores.sink:
        return Refusal("the scores are multiplied by a tensor after their mask or softcap", str(node))
    if scores.shifted:
        scores.stretched += side.layout
    for mask in scores.masks:
        mask.factors.append((name, side))
    scores.multipliers.append(side)
    return scores


def _scaled_by_number(scores: Scores, factor: Any, node: fx.Node, step: tuple[str, Any]) -> Scores | Refusal:
    """By `factor`, as `step` has it in the graph."""
    if any(mask.kind == "bool" for mask in scores.masks) and not factor > 0:
        return Refusal("the scores are multiplied by a negative number after their mask", str(node))
    multiply(scores, factor)
    for side in [*scores.masks, *([scores.sink.side] if scores.sink else [])]:
        if side.kind == "add":
            side.factors.append(step)
    return _rescaled_fill(scores, factor, node)


def _rescaled_fill(scores: Scores, factor: Any, node: fx.Node) -> Scores | Refusal:
    """Scores that were filled before a scaling must still count as masked."""
    if scores.fill == -math.inf:
        return scores
    if not isinstance(factor, int | float) or not scores.fill * factor <= MASKED:
        hint = f"only fills of {MASKED:g} or less are masks"
        return Refusal(f"scores are filled with {scores.fill:g} and then scaled", str(node), hint)
    scores.fill *= factor
    return scores


def negated(climb: Climb, node: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0])
    return _scaled_by_number(scores, -1.0, node, ("mul", -1.0)) if scores else scores


def tanh(climb: Climb, node: fx.Node) -> Scores | Refusal:
    scores = climb(node.args[0])
    if not scores:
        return scores
    if scores.masks or scores.softcap is not None or scores.in_tanh or scores.sink:
        return Refusal("tanh comes after the mask or after another tanh", str(node))
    if scores.shifted:
        return Refusal("something is added to the scores before tanh", str(node), HINT)
    scores.in_tanh = True
    scores.steps.append("tanh")
    return scores


def dropout(climb: Climb, node: fx.Node) -> Scores | Refusal:
    if argument(node, "train") and argument(node, "p"):
        return Refusal("dropout is active", str(node), "call model.eval()")
    return climb(node.args[0])
