"""Lay out: the tokens of a grid in boxes, and those of a dilation together, where kernels then visit fewer tiles."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Var
from sparsify.passes.nodes import same, shape
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.patterns.grid import grids
from sparsify.patterns.layouts.by_head import layouts_at
from sparsify.patterns.layouts.lay_out import LaidOut, lay_out


@dataclass(frozen=True)
class LayOut:
    """Layouts to sites.

    Before: site.programs are predicates over tokens, some from patterns over a grid of tokens, some dilated.
    After:  site.laid_out has them over slots, with a grid's layout that all heads share, or one for each key head by
            its stride, where that saves tiles; else, and where not all queries are there in their order, such as in
            decoding, as they are. What a selection sorts is over slots already, and its order is the layout.

    Nothing is moved in memory: kernels read the rows of a box where they are, so no permutation is to be hoisted or
    shared between neighbouring sites.
    """

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites():
            site.laid_out = _laid_out(site)


def _laid_out(site: Site) -> LaidOut:
    if site.segments is not None:
        return site.segments.laid_out(site.programs, site.bias, site.sink_bias)
    found = [grid for pattern in site.patterns or () for grid in grids(pattern)]
    q_len, k_len = shape(site.q)[2], shape(site.k)[2]
    whole = same(q_len, k_len) and isinstance(site.q_offset, int) and site.q_offset == 0
    placed = whole and site.positions_known and site.position == Var("q")
    used = found if placed else []
    by_head = layouts_at(tuple(site.programs), shape(site.k)[1], k_len) if placed else None
    return lay_out(site.programs, used, int(k_len) if used else 0, site.bias, site.sink_bias, by_head)
