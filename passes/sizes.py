"""Sizes: operations that read no more of a tensor than its sizes and dtype get these as arguments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparsify.passes.forms.arrange import Unplaced, number
from sparsify.passes.nodes import ATEN, argument, is_tensor, op, shape, value
from sparsify.passes.runner import Capture

SHAPED = {"expand_as": ATEN.expand.default, "view_as": ATEN.view.default, "reshape_as": ATEN.reshape.default}
MADE = {
    **dict.fromkeys(("zeros_like", "new_zeros"), ATEN.zeros.default),
    **dict.fromkeys(("ones_like", "new_ones"), ATEN.ones.default),
    **dict.fromkeys(("full_like", "new_full"), ATEN.full.default),
}


@dataclass(frozen=True)
class Sizes:
    """Masks that are shaped like the scores no longer depend on them.

    Before: expand_as(mask, scores); zeros_like(scores)
    After:  expand(mask, [2, 4, 24, 24]); zeros([2, 4, 24, 24])

    A symbolic size is taken from a node that holds it; where none does, the operation stays as it is.
    """

    def __call__(self, capture: Capture) -> None:
        for node in list(capture.graph.nodes):
            name = op(node)
            if name not in (*SHAPED, *MADE) or not is_tensor(node):
                continue
            try:
                sizes = [number(size, node) for size in shape(node)]
            except Unplaced:
                continue
            if name in SHAPED:
                node.target, node.args, node.kwargs = SHAPED[name], (node.args[0], sizes), {}
            else:
                _make(node, name, sizes)
        capture.graph.eliminate_dead_code()


def _make(node: fx.Node, name: str, sizes: list[object]) -> None:
    """A new tensor with the same number everywhere."""
    fill = [argument(node, "fill_value")] if name in ("full_like", "new_full") else []
    found = value(node)
    node.target, node.args = MADE[name], (sizes, *fill)
    node.kwargs = {"dtype": found.dtype, "device": found.device}
