"""Settle: plain operators where their attention was rewritten, the operator that hid them where it was not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import fx

from sparsify.passes.nodes import ancestors, op
from sparsify.passes.runner import Capture
from sparsify.passes.splice import forget_strides

OURS = ("sparsify::attention", "sparsify::probed")


@dataclass(frozen=True)
class Settle:
    """One of each two.

    Before: either(linear(sparsify.attention(linear(x), ...)), _transformer_encoder_layer_fwd(x, ...))
    After:  linear(sparsify.attention(linear(x), ...)); the layer as a whole where its attention was refused.
    """

    def __call__(self, capture: Capture) -> None:
        for node in capture.graph.nodes:
            if op(node) != "sparsify::either":
                continue
            plain, whole = cast(tuple[fx.Node, fx.Node], node.args)
            rewritten = any(op(part) in OURS for part in {plain} | ancestors(plain) - ancestors(whole))
            node.replace_all_uses_with(plain if rewritten else whole)
            if rewritten:
                forget_strides(plain)
        capture.graph.eliminate_dead_code()
