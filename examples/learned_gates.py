"""Three modules that score the units of a selection: SeerAttention's two gates, and AttentionPredictor.

    python -m examples.learned_gates

A spec says `learned: gate`, and the backend is given `options={"learned": {"gate": modules by layer}}`. A module takes
q (B, Hq, Nq, D) and k (B, Hkv, Nk, D) as the attention has them and gives scores of units, (B, L, rows, units) with L
one of 1, Hkv and Hq; budget, forced units and kernels are those of every other selection. Weights come from safetensors
files. Here they are random, so what is kept means nothing; that it is what the modules say is what the run shows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

BLOCK = 64


def blocks(x: Tensor, size: int = BLOCK) -> Tensor:
    """(B, H, N, D) in blocks of tokens: (B, H, ceil(N / size), size, D), the last filled up with zeros."""
    count = (x.shape[2] + size - 1) // size
    return F.pad(x, (0, 0, 0, count * size - x.shape[2])).unflatten(2, (count, size))


class SeerGate(nn.Module):
    """Prefill: means of query blocks against the max, min and mean of key blocks, through a linear map for each head.

    Left out of the published gate: rotary positions of blocks.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, gate_dim: int = 32) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(heads, head_dim, gate_dim) / head_dim**0.5)
        self.k = nn.Parameter(torch.randn(kv_heads, 3 * head_dim, gate_dim) / head_dim**0.5)

    def keys(self, k: Tensor) -> Tensor:
        """(B, Hkv, units, gate dim)."""
        parts = blocks(k)
        pooled = torch.cat([parts.amax(-2), parts.amin(-2), parts.mean(-2)], -1)
        return pooled @ self.k

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, Hq, rows, units), a softmax over units."""
        keys = self.keys(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.softmax(blocks(q).mean(-2) @ self.q @ keys.mT, -1)


class SeerDecodeGate(SeerGate):
    """Decode: the query heads of a group become one gate query, and their key head chooses for all of them."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, gate_dim: int = 32) -> None:
        super().__init__(heads, kv_heads, head_dim, gate_dim)
        self.q = nn.Parameter(torch.randn(kv_heads, heads // kv_heads * head_dim, gate_dim) / head_dim**0.5)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, Hkv, 1, units), a softmax over units."""
        group = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(3)
        return torch.softmax(group @ self.q @ self.keys(k).mT, -1)


class AttentionPredictor(nn.Module):
    """Decode: a small convolution over the last steps' greatest attention in each block says what the next step needs.

    `history` is a buffer that each step moves on by its own attention, which is computed whole here; the published
    system computes it every few steps only, and takes what its sparse steps saw in between.
    """

    def __init__(self, heads: int, steps: int = 64, units: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.out = nn.Conv1d(32, 1, 1)
        self.register_buffer("history", torch.zeros(1, heads, steps, units))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, Hq, 1, units); the batch is one sequence, of at most as many blocks as the history has."""
        seen = self.net(self.history.flatten(0, 1)[:, None]).mean(2)
        scores = self.out(seen).unflatten(0, (1, -1)).squeeze(2)[:, :, None]
        weights = torch.softmax(q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5, -1)
        now = blocks(weights.transpose(2, 3)).amax(-2).transpose(2, 3)
        now = F.pad(now, (0, self.history.shape[-1] - now.shape[-1]))
        self.history.copy_(torch.cat([self.history[:, :, 1:], now], 2))
        return scores[..., : (k.shape[2] + BLOCK - 1) // BLOCK]


def loaded(module: nn.Module, path: Path) -> nn.Module:
    """The module with the weights of a file, which is made here if there is none."""
    if not path.exists():
        save_model(module, str(path))
    load_model(module, str(path))
    return module.requires_grad_(False).eval()


def main() -> None:
    """Prefill by SeerGate, then three steps by the two decode gates."""
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=256)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    folder = Path(tempfile.mkdtemp())
    gates = {"prefill": [SeerGate(4, 2, 16) for _ in range(2)],
             "decode": {0: SeerDecodeGate(4, 2, 16), 1: AttentionPredictor(4)}}  # fmt: skip
    for name, modules in gates.items():
        for layer, module in enumerate(modules if isinstance(modules, list) else modules.values()):
            loaded(module, folder / f"{name}-{layer}.safetensors")
    choose = {"budget": {"rule": "topk", "value": 2}, "unit": {"q": BLOCK, "k": BLOCK}, "force": {"local": 1}}
    head, group = {"heads": {"scope": "head"}}, {"heads": {"scope": "kv_group"}}
    spec = {"version": 1, "sites": [
        {"phase": "decode", "layers": 0, "heads": {"select": choose | group | {"learned": "decode"}}},
        {"phase": "decode", "layers": 1, "heads": {"select": choose | head | {"learned": "decode"}}},
        {"heads": {"select": choose | head | {"learned": "prefill"}}},
    ]}  # fmt: skip
    sparse = torch.compile(model, backend="sparsify", options={"spec": spec, "learned": gates, "strict": True})
    tokens = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = sparse(tokens, use_cache=True)
        change = float((out.logits - model(tokens).logits).abs().max())
        print(f"prefill of {tokens.shape[1]} tokens: the largest logit changes by {change:.3f}")
        for step in range(3):
            out = sparse(tokens[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        print(f"three steps, with the history of {int(gates['decode'][1].history.any(-1).any(1).sum())} in a buffer")


if __name__ == "__main__":
    main()
