"""Attention in plain torch, as small code bases write it: nanoGPT, gpt-fast and timm, in their styles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, CONTEXT = 32, 4, 32


class NanoAttention(nn.Module):
    """One projection for q, k and v; a tril buffer and masked_fill, or SDPA with is_causal."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.flash = flash
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (part.view(B, T, HEADS, C // HEADS).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(scores, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class FastAttention(nn.Module):
    """A cache that is written at `input_pos`, KV heads repeated, and rows of one big causal mask."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped, self.kv_heads = grouped, HEADS // 2
        size = WIDTH // HEADS
        self.wqkv, self.wo = nn.Linear(WIDTH, WIDTH + 2 * self.kv_heads * size), nn.Linear(WIDTH, WIDTH)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(2, self.kv_heads, CONTEXT, size))
        self.register_buffer("causal_mask", torch.tril(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)))

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        B, T, C = x.shape
        size = C // HEADS
        q, k, v = self.wqkv(x).split([C, self.kv_heads * size, self.kv_heads * size], dim=-1)
        q, k, v = (part.view(B, T, -1, size).transpose(1, 2) for part in (q, k, v))
        mask = self.causal_mask[None, None, input_pos]
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        k, v = self.k_cache, self.v_cache
        if not self.grouped:
            k, v = (part.repeat_interleave(HEADS // self.kv_heads, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, enable_gqa=self.grouped)
        return self.wo(y.transpose(1, 2).contiguous().view(B, T, C))


class TimmAttention(nn.Module):
    """ViT's attention: qkv in one, q scaled before the product."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.scale = fused, (WIDTH // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            x = self.attn_drop(attn) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class TimmWindowAttention(nn.Module):
    """Swin's window attention on a (B, H, W, C) map: windows in the batch, a bias table, a mask for shifted windows."""

    def __init__(self, fused: bool, shift: int, size: int = 8, window: int = 4) -> None:
        super().__init__()
        self.fused, self.shift, self.window, self.scale = fused, shift, window, (WIDTH // HEADS) ** -0.5
        self.qkv, self.proj, self.attn_drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]) + window - 1
        self.register_buffer("relative_position_index", apart[0] * (2 * window - 1) + apart[1])
        self.register_buffer("attn_mask", self._mask(size) if shift else None)

    def _mask(self, size: int) -> Tensor:
        regions = torch.zeros(1, size, size, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            regions[:, rows, columns] = number
        regions = self._windows(regions).squeeze(-1)
        apart = regions.unsqueeze(1) - regions.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)

    def _windows(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        x = x.view(B, H // self.window, self.window, W // self.window, self.window, C)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window * self.window, C)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self._attend(self._windows(x))
        windows = windows.view(-1, H // self.window, W // self.window, self.window, self.window, C)
        x = windows.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, H, W, C)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2)) if self.shift else x

    def _attend(self, x: Tensor) -> Tensor:
        B_, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B_, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        mask = self.attn_mask
        if self.fused:
            if mask is not None:
                mask = mask.view(1, mask.shape[0], 1, N, N).expand(B_ // mask.shape[0], -1, HEADS, -1, -1)
                bias = bias + mask.reshape(-1, HEADS, N, N)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1) + bias
            if mask is not None:
                attn = attn.view(-1, mask.shape[0], HEADS, N, N) + mask.unsqueeze(1).unsqueeze(0)
                attn = attn.view(-1, HEADS, N, N)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(B_, N, C))


class Packed(nn.Module):
    """flex_attention with causal masking inside documents and a score mod, or the same by hand."""

    def __init__(self, flex: bool) -> None:
        super().__init__()
        self.flex = flex
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

        def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (q_idx >= kv_idx) & (documents[b, q_idx] == documents[b, kv_idx])

        def near(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score - (q_idx - kv_idx) * 0.125

        if not self.flex:
            at = torch.arange(T)
            kept = (at[:, None] >= at) & (documents[:, :, None] == documents[:, None])
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 - (at[:, None] - at) * 0.125
            weights = torch.where(kept[:, None], scores, -torch.inf).softmax(dim=-1)
            return (weights @ v).transpose(1, 2).reshape(B, T, C)
        block_mask = create_block_mask(keep, B, None, T, T, device="cpu")
        y = flex_attention(q, k, v, score_mod=near, block_mask=block_mask)
        return y.transpose(1, 2).reshape(B, T, C)
