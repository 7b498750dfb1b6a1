"""Remember masks: the graph before anything is spliced, so that what was recovered can be compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparsify.bias import Bias
from sparsify.expr import Pred
from sparsify.passes.check_sites import mutations, shares_storage
from sparsify.passes.nodes import ancestors, shape
from sparsify.passes.runner import Capture
from sparsify.passes.site import Mask, Site


@dataclass(frozen=True)
class MaskCheck:
    """What a site's masks are and what they were recovered as. Nodes are those of the remembered graph.

    sizes: (B, H, Nq, Nk), each a number or a symbolic one.
    """

    address: str
    text: str
    sizes: tuple[int | torch.SymInt, ...]
    causal: bool
    masks: tuple[Mask, ...]
    sink: fx.Node | None
    keep: Pred
    bias: Bias
    sink_bias: Bias | None
    q_offset: int | fx.Node
    loads: tuple[fx.Node, ...]

    def nodes(self) -> list[fx.Node]:
        """The nodes whose values decide."""
        offset = [self.q_offset] if isinstance(self.q_offset, fx.Node) else []
        sink = [] if self.sink is None else [self.sink]
        return [*(mask.node for mask in self.masks), *self.loads, *sink, *offset]


@dataclass(frozen=True)
class RememberMasks:
    """Keeps what `options={"verify": True}` runs on the first call.

    Before: sites with recovered masks.
    After:  the same; `capture.remembered` is a copy of the graph that computes only the masks, tables and offsets of
            the sites (and what writes into memory), and `capture.checks` says what each has to come to.

    enabled: whether to do so.
    """

    enabled: bool = False

    def __call__(self, capture: Capture) -> None:
        if not self.enabled:
            return
        sites = capture.open_sites()
        kept = _with_writes(capture.graph, [node for site in sites for node in _check(site, None).nodes()])
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in capture.graph.nodes:
            if node in kept or node.op == "placeholder":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        capture.checks = [_check(site, copies) for site in sites]
        graph.output(tuple(dict.fromkeys(node for check in capture.checks for node in check.nodes())))
        capture.remembered = fx.GraphModule(capture.module, graph)


def _with_writes(graph: fx.Graph, needed: list[fx.Node]) -> set[fx.Node]:
    """What nodes are computed from, and what writes in place into any of that."""
    kept = {*needed, *ancestors(*needed)}
    writers = list(mutations(graph))
    grown = True
    while grown:
        found = [w for w, written in writers if w not in kept and any(shares_storage(written, node) for node in kept)]
        kept.update(found, ancestors(*found))
        grown = bool(found)
    return kept


def _check(site: Site, copies: dict[fx.Node, fx.Node] | None) -> MaskCheck:
    """The check of a site over copies of its nodes, or over those themselves."""

    def of(node: fx.Node) -> fx.Node:
        return node if copies is None else copies[node]

    (batch, heads, q_len, _), k_len = shape(site.q), shape(site.k)[2]
    offset = site.q_offset
    return MaskCheck(
        address=site.address or str(site.anchor),
        text=site.mask_text,
        sizes=(batch, heads, q_len, k_len),
        causal=site.causal,
        masks=tuple(Mask(mask.kind, of(mask.node)) for mask in site.masks),
        sink=None if site.sink is None else of(site.sink),
        keep=site.keep,
        bias=site.bias,
        sink_bias=site.sink_bias,
        q_offset=of(offset) if isinstance(offset, fx.Node) else offset,
        loads=tuple(of(node) for node in site.loads),
    )
