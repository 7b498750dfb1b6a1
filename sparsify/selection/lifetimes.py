"""The op `sparsify::expiry`: until which position each key of a key head lives, from the types of its tokens (NAtS)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define("expiry(Tensor types, int window) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
GLOBAL, LOCAL, WINDOW = range(3)


@torch.library.impl(LIBRARY, "expiry", "CompositeImplicitAutograd")
def _expiry(types: Tensor, window: int) -> Tensor:
    """The last position that sees each key, int32 (B, Hkv, N), from logits of its type (B, Hkv, N, 3), the greatest of
    which counts: global keys live on (N), local ones to the next global one of their head, others for a window."""
    kind, keys = types.detach().argmax(-1), types.shape[2]
    at = torch.arange(keys, device=types.device)
    coming = torch.where(kind == GLOBAL, at, keys).flip(-1).cummin(-1).values.flip(-1)
    following = torch.where(at == keys - 1, keys, pad(coming, (0, 1))[..., 1:])
    lives = torch.where(kind == LOCAL, following, at + window)
    return torch.where(kind == GLOBAL, keys, lives).int()


expiry = torch.ops.sparsify.expiry.default
