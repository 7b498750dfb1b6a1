"""Whether a decode step goes on with the sequence of the step before, so that what was kept then still holds.

It does where its query is the next one and the keys of before are still there. These are looked at in a few places,
from the first to that of the last query: another sequence in the same cache, or rows of a batch in another order, have
other keys there, whatever their lengths are.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLACES = 16


def buffers(batch: int, kv_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
    """What is kept of a step for each row of a batch: the position of its query, and keys (B, J, PLACES, D)."""
    return {
        "last": torch.full((batch,), -2, dtype=torch.int64, device=device),
        "seen": torch.zeros(batch, kv_heads, PLACES, head_dim, dtype=torch.float32, device=device),
    }


def begins(k: Tensor, at: Tensor, last: Tensor, seen: Tensor) -> Tensor:
    """(B,) bool: the rows whose queries, at position `at` (B,), begin another sequence than that of `last` and `seen`,
    which are then those of this step. k: (B, J, M, D)."""
    goes_on = (at == last + 1) & (_keys(k, last) == seen).flatten(1).all(-1)
    last.copy_(at)
    seen.copy_(_keys(k, at))
    return ~goes_on


def _keys(k: Tensor, last: Tensor) -> Tensor:
    """(B, J, PLACES, D) float32: the keys in places from 0 to `last` (B,)."""
    step = torch.arange(PLACES, device=k.device)
    place = (last[:, None] * step // (PLACES - 1)).clamp(0, k.shape[2] - 1)
    return k.gather(2, place[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])).float()
