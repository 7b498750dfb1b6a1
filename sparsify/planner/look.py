"""Looks at what a plan's heads attend to and keep, row block by row block, with memory O(N)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsify.errors import InputError
from sparsify.patterns import Pattern
from sparsify.planner.blocks import Block
from sparsify.planner.pictures import GAMMA, Pictures, SitePicture
from sparsify.planner.plan import Plan
from sparsify.planner.probe import Probe
from sparsify.planner.site_call import SiteCall
from sparsify.planner.study import Rows, studied

CELLS = 96  # at most, along each side of a grid
TRACE = 1e-20  # less attention than this is none


def pictures(plan: Plan, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Pictures:
    """Looks at all sites of a plan while the model reads one text, `model(*args, **kwargs)`; see `pictures_of`."""
    probe = Probe(model)
    return pictures_of(plan, probe, lambda: probe(*args, **kwargs))


def pictures_of(plan: Plan, probe: Probe, run: Callable[[], Any]) -> Pictures:
    """Looks at all sites while `run` calls the probed model on one text, as it is, with dense attention.

    The first text of a batch is pictured. Raises InputError where a site of the plan isn't reached.
    """
    found: dict[tuple[str, int], SitePicture] = {}
    patterns = {(site.address, site.use): _patterns(plan, number) for number, site in enumerate(plan.sites)}

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        if call.key in patterns and call.key not in found:
            found[call.key] = _Picture(call, patterns[call.key]).made()
        return out

    with torch.no_grad(), probe.under({}, watch):
        run()
    for site in plan.sites:
        if (site.address, site.use) not in found:
            raise InputError(f"plan: pictures: the model did not reach '{site.address}', of which there is a plan")
    return Pictures(tuple(found[site.address, site.use] for site in plan.sites))


def _patterns(plan: Plan, site: int) -> list[Pattern]:
    made = {head.candidate: plan.candidates[head.candidate].pattern() for head in plan.sites[site].heads}
    return [made[head.candidate] for head in plan.sites[site].heads]


class _Picture:
    """The picture of one call, summed up row block by row block."""

    def __init__(self, call: SiteCall, patterns: Sequence[Pattern]) -> None:
        self.call = call
        self.queries, self.keys = call.at.q_len, call.at.k_len
        self.cell = max(1, -(-max(self.queries, self.keys) // CELLS))
        self.heads: dict[Any, list[int]] = {}
        for head, pattern in enumerate(patterns):
            self.heads.setdefault(call.keep(pattern), []).append(head)
        shape = len(patterns), -(-self.queries // self.cell), -(-self.keys // self.cell)
        device = call.launch.q.device
        self.attention = torch.zeros(shape, device=device)
        self.mass = torch.zeros(shape, device=device)  # of attention that is kept
        self.kept = torch.zeros(shape, device=device)  # pairs

    def made(self) -> SitePicture:
        """The picture."""
        for rows in studied(self.call):
            self.look(rows)
        queries = self.sizes(self.queries).view(1, -1, 1)
        attention = (self.attention / queries) ** GAMMA
        kept = self.kept / (queries * self.sizes(self.keys))
        dropped = 1 - (self.mass + TRACE) / (self.attention + TRACE)
        grids = [(255 * grid.clamp(0, 1)).round().byte().cpu().numpy() for grid in (attention, kept, dropped)]
        recall = (self.mass.sum((1, 2)) / self.attention.sum((1, 2)).clamp_min(TRACE)).cpu().numpy()
        return SitePicture(self.queries, self.keys, self.cell, *grids, recall)

    def sizes(self, length: int) -> torch.Tensor:
        """How many tokens each cell along a side of so many tokens has."""
        starts = torch.arange(0, length, self.cell, device=self.mass.device)
        return (length - starts).clamp_max(self.cell)

    def look(self, rows: Rows) -> None:
        """Adds a block of rows."""
        shares = self.wide((rows.weights[:1] / rows.total[:1].clamp_min(TRACE))[0], rows.found)
        every = list(range(shares.shape[0]))
        self.add(self.attention, every, shares, rows.first)
        for keep, heads in self.heads.items():
            block = self.call.block(keep, heads, (rows.first, rows.last))
            if block.columns is None:
                continue
            mask = self.mask(block)
            self.add(self.kept, heads, mask, rows.first)
            self.add(self.mass, heads, (shares if heads == every else shares[heads]) * mask, rows.first)

    def mask(self, block: Block) -> torch.Tensor:
        """float (heads or 1, rows, keys): what a block keeps of the first text."""
        if block.mask is not None:
            return self.wide(block.mask[:1].to(torch.float32)[0], block)
        rows = block.last - block.first
        if isinstance(block.columns, slice):
            whole = self.mass.new_zeros(1, rows, self.keys)
            whole[..., block.columns] = 1
            return whole
        return self.wide(self.mass.new_ones(1, rows, block.columns.numel()), block)

    def wide(self, values: torch.Tensor, block: Block) -> torch.Tensor:
        """Values (heads, rows, columns) of a block as (heads, rows, keys), 0 elsewhere."""
        if block.columns == slice(0, self.keys):
            return values.expand(-1, block.last - block.first, -1)
        whole = values.new_zeros(values.shape[0], block.last - block.first, self.keys)
        whole[..., block.columns] = values
        return whole

    def add(self, grid: torch.Tensor, heads: list[int], values: torch.Tensor, first: int) -> None:
        """Sums values (heads or 1, rows, keys), of the rows from `first` on, into the cells of a grid."""
        before, after = first % self.cell, -(first + values.shape[1]) % self.cell
        padded = torch.nn.functional.pad(values, (0, -self.keys % self.cell, before, after))
        sums = padded.unflatten(1, (-1, self.cell)).sum(2).unflatten(2, (-1, self.cell)).sum(3)
        at = first // self.cell
        grid[heads, at : at + sums.shape[1]] += sums
