"""The peers' attention, plugged into transformers: the same per-head masks, computed by others.

transformers looks attention functions up by name (`attn_implementation`). Each function here takes q (B, H, N, D),
k and v (B, Hkv, N, D) and returns (B, N, H, D), and finds its layer's patterns by `module.layer_idx`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsify.bench.peers import mask_mod
from sparsify.patterns import Pattern

Layers = Sequence[Sequence[Pattern]]  # the pattern of every head of every layer


def use(model: PreTrainedModel, name: str, attend: Callable[..., torch.Tensor]) -> PreTrainedModel:
    """Makes a model attend by a function of (layer, q, k, v, scale), without a mask of the library's own."""

    def plug(module, query, key, value, attention_mask, scaling, **others):  # type: ignore[no-untyped-def]
        return attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None

    AttentionInterface.register(name, plug)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)
    return model


def masked(layers: Layers, length: int) -> Callable[..., torch.Tensor]:
    """PyTorch's own attention, dense, under each head's boolean mask; in float64 it is the oracle."""
    masks = [
        torch.stack([pattern.mask(len(heads), length, length)[head] for head, pattern in enumerate(heads)])
        for heads in layers
    ]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[layer], scale=scale, enable_gqa=True)

    return attend


def flex(layers: Layers, length: int) -> Callable[..., torch.Tensor]:
    """FlexAttention with each layer's masks as one block mask, built beforehand."""
    blocks = [create_block_mask(mask_mod(heads, length), None, len(heads), length, length, "cpu") for heads in layers]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return flex_attention(q, k, v, block_mask=blocks[layer], scale=scale, enable_gqa=True)

    return attend
