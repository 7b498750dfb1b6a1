"""What candidates would give in the place of what heads give now, from one pass over an attention's scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.expr import Pred
from sparsify.planner.blocks import Block
from sparsify.planner.site_call import SiteCall, own_rows

TINY = 1e-30


@dataclass(frozen=True)
class Rows:
    """A block of query rows of all heads. first, last: which (the last excluded).

    scores: of the keys in `found`, -inf where the model drops (B, Hq, rows, columns); top: the greatest of each row.
    weights: exp(score - top); total: their sums and the sink's part (B, Hq, rows, 1); joined: that part. values: v of
    those keys (B, Hq, columns, Dv).
    """

    call: SiteCall
    first: int
    last: int
    found: Block
    weights: torch.Tensor
    total: torch.Tensor
    joined: torch.Tensor | None
    values: torch.Tensor
    top: torch.Tensor
    scores: torch.Tensor

    def shares(self) -> torch.Tensor:
        """The weights as shares of their rows (B, Hq, rows, columns)."""
        return self.weights / self.total.clamp_min(TINY)

    def keys(self) -> torch.Tensor:
        """The keys of the columns."""
        columns, device = self.found.columns, self.weights.device
        return torch.arange(self.call.at.k_len, device=device)[columns]

    def part(self, of: torch.Tensor, keep: Pred) -> torch.Tensor:
        """What of numbers (B, Hq, rows, columns) is on pairs that `keep` keeps, added (B, Hq, rows)."""
        kept = self.call.block(keep, range(self.weights.shape[1]), (self.first, self.last))
        if kept.columns is None:
            return of.new_zeros(of.shape[:3])
        mine = of[..., self._inside(kept.columns)]
        return (mine if kept.mask is None else mine * kept.mask).sum(-1)

    def dense(self) -> torch.Tensor:
        """The model's own output (B, Hq, rows, Dv)."""
        return (self.weights @ self.values) / self.total.clamp_min(TINY)

    def under(self, keep: Pred) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (B, Hq, rows, Dv) where all heads keep `keep`, and the part of the weights (B, Hq, rows) that is
        kept. What no key is left of gives 0."""
        heads = range(self.weights.shape[1])
        kept = self.call.block(keep, heads, (self.first, self.last))
        if kept.columns is None:
            shape = *self.weights.shape[:3], self.values.shape[-1]
            return self.values.new_zeros(shape), self.weights.new_zeros(shape[:3])
        where = self._inside(kept.columns)
        weights = self.weights[..., where]
        if kept.mask is not None:
            weights = weights * kept.mask
        mass = weights.sum(-1, keepdim=True)
        whole = mass if self.joined is None else mass + self.joined
        out = (weights @ self.values[:, :, where]) / whole.clamp_min(TINY)
        if self.joined is None and bool((mass < TINY).any()):
            out = torch.where(mass < TINY, self._again(kept, where), out)
        return out, (mass / self.total.clamp_min(TINY)).squeeze(-1)

    def _again(self, kept: Block, where: slice | torch.Tensor) -> torch.Tensor:
        """The same where all that is kept weighs next to nothing beside what is dropped: by a softmax of its own."""
        scores = self.scores[..., where]
        scores = scores if kept.mask is None else scores.masked_fill(~kept.mask, -torch.inf)
        return torch.softmax(scores, -1).nan_to_num(0.0) @ self.values[:, :, where]

    def count(self, keep: Pred) -> torch.Tensor:
        """How many keys of each query `keep` keeps (B or 1, Hq or 1, rows)."""
        kept = self.call.block(keep, range(self.weights.shape[1]), (self.first, self.last))
        if kept.columns is None:
            return self.weights.new_zeros(1, 1, self.last - self.first)
        if kept.mask is not None:
            return kept.mask.sum(-1).to(self.weights)
        columns = kept.columns
        size = columns.stop - columns.start if isinstance(columns, slice) else columns.numel()
        return self.weights.new_full((1, 1, self.last - self.first), size)

    def _inside(self, columns: slice | torch.Tensor) -> slice | torch.Tensor:
        """Columns of all keys as columns of those that are held."""
        mine = self.found.columns
        if isinstance(mine, slice):
            return (
                slice(columns.start - mine.start, columns.stop - mine.start)
                if isinstance(columns, slice)
                else (columns - mine.start)
            )
        assert isinstance(mine, torch.Tensor)
        asked = torch.arange(columns.start, columns.stop, device=mine.device) if isinstance(columns, slice) else columns
        return torch.searchsorted(mine, asked)


def studied(call: SiteCall) -> Iterator[Rows]:
    """All rows of a call, in blocks; memory O(N)."""
    heads = range(call.launch.q.shape[1])
    for rows in own_rows(call):
        found = call.block(call.own, heads, rows)
        if found.columns is None:
            continue
        scores, sink = call.scores(heads, rows, found), call.sink(heads, rows)
        top = scores.amax(-1, keepdim=True) if sink is None else torch.maximum(scores.amax(-1, keepdim=True), sink)
        top = top.nan_to_num(neginf=0.0)
        weights = torch.exp(scores - top)
        joined = None if sink is None else torch.exp(sink - top)
        total = weights.sum(-1, keepdim=True)
        total = total if joined is None else total + joined
        yield Rows(call, *rows, found, weights, total, joined, call.values(heads, found), top, scores)


def projections(
    call: SiteCall, now: torch.Tensor, gradients: torch.Tensor, keeps: Mapping[Any, Pred]
) -> dict[Any, torch.Tensor]:
    """For each candidate (K, B, Hq): what `gradients` (K, B, Hq, N, Dv) make of the change of a head's output from
    `now` (B, Hq, N, Dv) to the candidate's."""
    found = {name: gradients.new_zeros(gradients.shape[:3]) for name in keeps}
    for rows in studied(call):
        span = slice(rows.first, rows.last)
        here, base = gradients[:, :, :, span], now[:, :, span].float()
        for name, keep in keeps.items():
            change = rows.under(keep)[0] - base
            found[name] += torch.einsum("kbhnd,bhnd->kbh", here, change)
    return found
