"""A site: one attention in the captured graph, and what the passes find out about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from sparsify.bias import Bias
from sparsify.errors import Refusal
from sparsify.expr import TRUE, Expr, Pred, Var
from sparsify.patterns.layouts.lay_out import LaidOut
from sparsify.patterns.layouts.segments import Segments
from sparsify.program import Skip


@dataclass(frozen=True)
class Mask:
    """One mask of a site, as the graph has it. `node` broadcasts to (B, H, Nq, Nk).

    kind: "bool" (True keeps) or "add" (added to the scaled scores, whatever its dtype).
    """

    kind: Literal["bool", "add"]
    node: fx.Node


@dataclass
class Site:
    """What is known about one attention: filled in by `find_sites`, then by each pass after it.

    address: the module's path; layer: its number, of so many layers; use: which attention of that module in the graph.
    anchor: the SDPA or softmax node. output: the node whose value is the attention's output, in any layout.
    q (B, Hq, Nq, D), k and v (B, Hkv, Nk, ...): nodes, with repeated KV heads taken back.
    heads_known: dimension 1 of q is the heads, for all that can be seen; they may be in the batch.
    restore: makes the output of the op's result (B, Hq, Nq, Dv), with new nodes in front of the output, of the result
    and the nodes `restored_with`.
    scale: a float or a symbolic float; causal: SDPA's flag, k <= row.
    keep: the model's own mask over b, h, q (absolute), k, N, Nq and loads, once it is recovered.
    q_offset: the absolute position of query row 0, an int or a node; position: a query's position for patterns, over
    q and loads, where that is not q itself (static caches).
    loads: the tensors that `_0`, `_1`, ... name there; load_names: what a reader calls them.
    sink: a node (B, H, Nq, 1), or what broadcasts to it: a logit that joins each row's softmax and has no value.
    bias, sink_bias: what the program adds to scores and what it takes for the sink, over the names of `keep`.
    programs: the final predicate of every query head; where `segments` is an order of the keys, over its slots (keep
    and bias stay over tokens). skips: what a kernel may leave out by its weight, for each query head; () for nothing.
    dropped: which keys join as one, for each query head, over the names of `keep`; () for none of any head.
    dense: why the attention is left to Inductor as it stands, for it is faster there; "" if it isn't. notes: what a
    reader should know of a site. misfit: it is refused as the spec is wrong about its tokens.
    """

    anchor: fx.Node
    output: fx.Node
    form: str
    address: str = ""
    layer: int | None = None
    layers: int | None = None
    use: int = 0
    kind: Literal["self", "cross"] = "self"
    q: fx.Node | None = None
    k: fx.Node | None = None
    v: fx.Node | None = None
    scale: Any = None
    softcap: Any = None
    causal: bool = False
    heads_known: bool = True
    restore: Callable[[fx.Node], fx.Node] | None = None
    restored_with: list[fx.Node] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    keep: Pred = TRUE
    loads: tuple[fx.Node, ...] = ()
    load_names: tuple[str, ...] = ()
    sink: fx.Node | None = None
    bias: Bias = ()
    sink_bias: Bias | None = None
    q_offset: Any = 0
    position: Expr = Var("q")
    positions_known: bool = True
    mask_text: str = ""
    patterns: tuple[Any, ...] | None = None
    programs: tuple[Pred, ...] = ()
    segments: Segments | None = None
    laid_out: LaidOut | None = None
    skips: tuple[Skip | None, ...] = ()
    dropped: tuple[Pred, ...] = ()
    target: str = ""
    dense: str = ""
    refusal: Refusal | None = None
    misfit: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether the site is to be rewritten, as far as is known."""
        return self.refusal is None and not self.dense

    def refuse(self, reason: str, hint: str = "", node: fx.Node | None = None) -> None:
        """Marks the site as refused; the first reason stays."""
        if self.refusal is None:
            self.refusal = Refusal(reason, str(node or self.anchor), hint)
