"""Remember masks: the graph before anything is spliced, so that masks and outputs can be compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsify.bias import Bias
from sparsify.expr import Pred
from sparsify.passes.check_sites import mutations, shares_storage
from sparsify.passes.nodes import ATEN, ancestors, call, dtype, op, shape
from sparsify.passes.runner import Capture
from sparsify.passes.site import Mask, Site
from sparsify.passes.splice import rewritten, same_kind


@dataclass(frozen=True)
class MaskCheck:
    """What a site's masks are and what they were recovered as. Nodes are those of the remembered graph.

    sizes: (B, H, Nq, Nk), each a number or a symbolic one. outputs: the attention's own, that of the op, and that of
    the op with 1 for every value, which is 0 in rows that keep nothing; () where a spec changes the site. coarsest: of
    the dtypes that the attention computes in.
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
    outputs: tuple[fx.Node, ...]
    coarsest: torch.dtype

    def over(self, copies: Mapping[fx.Node, fx.Node]) -> MaskCheck:
        """The same over copies of its nodes."""

        def of(node: Any) -> Any:
            return copies[node] if isinstance(node, fx.Node) else node

        return replace(
            self,
            masks=tuple(Mask(mask.kind, of(mask.node)) for mask in self.masks),
            sink=of(self.sink),
            q_offset=of(self.q_offset),
            loads=tuple(map(of, self.loads)),
            outputs=tuple(map(of, self.outputs)),
        )

    def nodes(self) -> list[fx.Node]:
        """The nodes whose values decide."""
        offset = [self.q_offset] if isinstance(self.q_offset, fx.Node) else []
        sink = [] if self.sink is None else [self.sink]
        return [*(mask.node for mask in self.masks), *self.loads, *sink, *offset, *self.outputs]


@dataclass(frozen=True)
class RememberMasks:
    """Keeps what `options={"verify": True}` runs on the first call.

    Before: sites with recovered masks.
    After:  the same; `capture.remembered` is a copy of the graph that computes only the masks, tables, offsets and
            outputs of the sites (and what writes into memory), each output by the op as well, from the same q, k and
            v; `capture.checks` says what each has to come to.

    enabled: whether to do so.
    """

    enabled: bool = False

    def __call__(self, capture: Capture) -> None:
        if not self.enabled:
            return
        sites = capture.open_sites()
        given = [_check(site, _outputs(site)) for site in sites]
        kept = _with_writes(capture.graph, [node for check in given for node in check.nodes()])
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in capture.graph.nodes:
            if op(node) == "sparsify::either" and node in kept:
                copies[node] = copies[node.args[0]]
            elif node in kept or node.op == "placeholder":
                copies[node] = graph.node_copy(node, copies.__getitem__)
        capture.checks = [check.over(copies) for check in given]
        graph.output(tuple(dict.fromkeys(node for check in capture.checks for node in check.nodes())))
        graph.eliminate_dead_code()
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


def _check(site: Site, outputs: tuple[fx.Node, ...]) -> MaskCheck:
    (batch, heads, q_len, _), k_len = shape(site.q), shape(site.k)[2]
    return MaskCheck(
        address=site.address or str(site.anchor),
        text=site.mask_text,
        sizes=(batch, heads, q_len, k_len),
        causal=site.causal,
        masks=tuple(site.masks),
        sink=site.sink,
        keep=site.keep,
        bias=site.bias,
        sink_bias=site.sink_bias,
        q_offset=site.q_offset,
        loads=site.loads,
        outputs=outputs,
        coarsest=max(map(dtype, (site.q, site.k, site.v, site.output)), key=lambda found: torch.finfo(found).eps),
    )


def _outputs(site: Site) -> tuple[fx.Node, ...]:
    """See `MaskCheck.outputs`."""
    if any(program != site.keep for program in site.programs):
        return ()
    made = rewritten(site, site.v)
    if not same_kind(made, site.output):
        return ()
    return site.output, made, rewritten(site, call(site.output, ATEN.ones_like.default, site.v))
