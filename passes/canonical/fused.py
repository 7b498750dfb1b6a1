"""torch's fused transformer layers, opened: the same layer as linear, SDPA, norms and an activation."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsify.op import either


def open_encoder_layer(node: fx.Node, args: tuple[Any, ...], whole: torch.Tensor) -> torch.Tensor | None:
    """`torch._transformer_encoder_layer_fwd` (B, N, E), as nn.TransformerEncoderLayer states it. Nested: None."""
    source, embedding, heads, *weights = args[:7]
    gelu, before, eps, gain_1, shift_1, gain_2, shift_2, up, up_bias, down, down_bias = args[7:18]
    mask, kind = args[18:20]
    if source.is_nested or source.dim() != 3:
        return None

    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embedding,), gain_1, shift_1, eps)

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embedding,), gain_2, shift_2, eps)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return _attend(x, x, x, heads, *weights, mask, kind)

    def feed(x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, up, up_bias)
        return F.linear(F.gelu(x) if gelu else F.relu(x), down, down_bias)

    if before:
        x = source + attend(norm_1(source))
        x = x + feed(norm_2(x))
    else:
        x = norm_1(source + attend(source))
        x = norm_2(x + feed(x))
    return either(x, whole)


def open_multi_head(node: fx.Node, args: tuple[Any, ...], whole: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """`torch._native_multi_head_attention` (B, N, E). None where it is nested, or its weights are used as well."""
    query, key, value, _, heads, *weights = args[:9]
    mask, _, _, kind = args[9:13]
    weights_used = any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users)
    if weights_used or any(tensor.is_nested or tensor.dim() != 3 for tensor in (query, key, value)):
        return None
    return (either(_attend(query, key, value, heads, *weights, mask, kind), whole[0]), *whole[1:])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    mask: torch.Tensor | None,
    kind: int | None,
) -> torch.Tensor:
    """Multi-head attention (B, N, E). mask: anything but 0 drops; kind: 0 is (N, N), 1 (B, N), 2 (B, H, N, N)."""
    parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for x, w, b in parts)
    keep = None
    if mask is not None:
        dropped = mask if mask.dtype == torch.bool else mask != 0
        keep = ~(dropped[:, None, None, :] if kind == 1 else dropped)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
