"""Scores: what stands between the product of queries and keys and a softmax, as it is known so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import Axis, Dim, Layout, aligned, flat, leaves
from sparsify.passes.forms.products import Factor, Product
from sparsify.passes.nodes import op, same_sizes, shape

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
    maxima: what the maxima that were taken off run over: nothing to a softmax over that. shifted: there was one, or a
    number was added: nothing to a softmax, but to what does more than scale. stretched: what tensors that multiplied
    the scores after that run over.
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
    stretched: list[Dim] = field(default_factory=list)


class MixedHeads(Refusal):
    """Talking heads: certainly an attention, though no kernel can run it."""


def mixed_heads(node: fx.Node) -> Refusal:
    hint = "talking heads need the scores of all heads at once; leave this site dense"
    return MixedHeads(f"{op(node)} mixes the heads between q·k and the values (talking heads)", str(node), hint)


def of_pairs(scores: Scores, dim: Dim) -> bool:
    """Whether a dimension of scores runs over queries or keys: axes that one factor of the product alone has."""
    left, right = (set(flat(factor.layout)) for factor in scores.product.factors)
    return bool(set(leaves(dim)) & (left ^ right))


def side_of(scores: Scores, node: fx.Node, inner: Any, result: fx.Node, kind: Any) -> Side | Refusal:
    """A tensor that meets the scores `inner` in `result`."""
    if not same_sizes(shape(inner), shape(result)):
        wider, narrow = shape(result), shape(inner)
        return Refusal(f"the scores {narrow} are broadcast beyond those of q and k to {wider}", str(result))
    return Side(node, aligned(node, scores.layout), kind)


def multiply(scores: Scores, factor: Any) -> None:
    scores.scale = scores.scale * factor
    if scores.in_tanh:
        scores.softcap, scores.in_tanh = factor, False
    elif scores.softcap is not None:
        scores.softcap = scores.softcap * factor
