"""Orders without ties, and lists."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def order_key(scores: Tensor, competes: Tensor, first: Tensor | None = None) -> Tensor:
    """int64 keys, all different in a row, in whose order scores (..., U) float32 fall: of equals the first leads.

    `first` leads everything and what does not compete comes last. A plain topk leaves open which of equals it takes,
    and a stable sort costs ten times as much.
    """
    scores = torch.where(scores == 0, 0.0, scores)  # -0 and 0 are equals
    scores = torch.where(competes, scores, -torch.inf)
    if first is not None:
        scores = torch.where(first, torch.inf, scores)
    bits = scores.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    units = scores.shape[-1]
    return (bits.long() << 32) + (units - 1 - torch.arange(units, device=scores.device))


def index_of(key: Tensor, units: int) -> Tensor:
    """The index that a key was made from."""
    return units - 1 - (key & LOW)


def best_list(key: Tensor, limit: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `limit` (B, L, R) first units in the order of key (B, L, R, U), at most `most`: a list and its count."""
    units = key.shape[-1]
    index = index_of(key.topk(most).values, units)
    count = limit.clamp(max=most)
    used = torch.arange(most, device=key.device) < count.unsqueeze(-1)
    return torch.where(used, index, units).int().sort(-1).values, count.int()


def best_mask(key: Tensor, limit: Tensor) -> Tensor:
    """The same as a mask (B, L, R, U), for limits up to U."""
    ordered = key.sort(-1, descending=True).values
    cut = ordered.gather(-1, (limit - 1).clamp(min=0).unsqueeze(-1))
    return (key >= cut) & (limit > 0).unsqueeze(-1)


def listed(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """A mask (B, L, R, U) as an ascending list (B, L, R, capacity) int32, filled up with U, and its count (B, L, R)."""
    running = kept.int().cumsum(-1, dtype=torch.int32)
    place = torch.arange(1, capacity + 1, device=kept.device, dtype=torch.int32)
    place = place.expand(*kept.shape[:-1], capacity).contiguous()
    index = torch.searchsorted(running, place, out_int32=True)
    return index, running[..., -1].clamp(max=capacity)
