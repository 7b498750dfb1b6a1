"""The step from a softmax back that puts sinks beside the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import Axis, Dim, aligned, flat, fresh, leaves
from sparsify.passes.forms.scores import HINT, Scores, Side, Sink
from sparsify.passes.nodes import argument, shape

if TYPE_CHECKING:
    from sparsify.passes.forms.climb import Climb


def concatenated(climb: Climb, node: fx.Node) -> Scores | Refusal:
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
    if scores.shifted:
        hint = "put the sinks beside them first, then take the maximum of both off"
        return Refusal("the scores were shifted before sinks were put beside them", str(node), hint)
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


def _is_keys(scores: Scores, dim: Dim) -> bool:
    """Whether a dimension runs over axes that one factor of the product alone has."""
    left, right = (set(flat(factor.layout)) for factor in scores.product.factors)
    return set(leaves(dim)) <= right - left or set(leaves(dim)) <= left - right
