"""The models of `sparsify bench --lossless`: small blocks of real architectures, random weights, fixed inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.bench.cases import pick
from sparsify.errors import InputError

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 256}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 8192, "head_dim": 64, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Example:
    """A model, its keyword arguments, and which rows (B, N) of its first output mean something (None: all)."""

    model: torch.nn.Module
    inputs: Mapping[str, Any]
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class ModelCase:
    """A model to measure: `length` tokens; zoo: one of those where nothing is to be won, and nothing may be lost."""

    name: str
    length: int
    about: str
    make: Callable[[int], Example]
    zoo: bool = False


def _made(name: str, **fields: Any) -> Any:
    """A model of transformers by its class's name, with random weights."""
    for noisy in ("torch.utils._pytree", "torchao"):  # transformers imports torchao, which warns of itself
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers
    except ImportError:
        raise InputError("bench: --lossless needs transformers: pip install 'sparsify[demo]'") from None
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**fields, attn_implementation="sdpa")).eval()


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def _mistral(length: int) -> Example:
    made = _made("MistralModel", **DECODER, sliding_window=1024)
    return Example(made, {"input_ids": _tokens(1, length), "use_cache": False})


def _gemma(length: int) -> Example:
    kinds = ["sliding_attention", "full_attention"]
    made = _made("Gemma3TextModel", **DECODER, sliding_window=512, layer_types=kinds)
    return Example(made, {"input_ids": _tokens(1, length), "use_cache": False})


def _documents(length: int) -> Example:
    """Sixteen documents in one row, told by the positions that begin anew."""
    made = _made("LlamaModel", **DECODER)
    positions = torch.arange(length)[None] % (length // 16)
    return Example(made, {"input_ids": _tokens(1, length), "position_ids": positions, "use_cache": False})


def _padded(length: int) -> Example:
    """Four sequences of an eighth to seven eighths of the length: half of all is padding."""
    made = _made("BertModel", **SIZES, num_hidden_layers=2, max_position_embeddings=length)
    ends = torch.tensor([1, 3, 5, 7])[:, None] * length // 8
    rows = torch.arange(length)[None] < ends
    return Example(made, {"input_ids": _tokens(4, length), "attention_mask": rows.long()}, rows)


def _padded_left(length: int) -> Example:
    made = _made("LlamaModel", **DECODER)
    starts = torch.tensor([1, 3, 5, 7])[:, None] * length // 8
    rows = torch.arange(length)[None] >= starts
    return Example(made, {"input_ids": _tokens(4, length), "attention_mask": rows.long(), "use_cache": False}, rows)


def _swin(length: int) -> Example:
    """An image of `length` patches, windows of 16 x 16 of them, every other layer shifted."""
    side = round(length**0.5) * 4
    made = _made("SwinModel", image_size=side, embed_dim=64, depths=[2], num_heads=[2], window_size=16)
    return Example(made, {"pixel_values": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))})


def _chunked(length: int) -> Example:
    kinds = ["chunked_attention", "full_attention"]
    fields = DECODER | {"intermediate_size_mlp": 512, "moe_layers": [], "layer_types": kinds}
    made = _made("Llama4TextModel", **fields, attention_chunk_size=512)
    return Example(made, {"input_ids": _tokens(1, length), "use_cache": False})


def _llama(length: int) -> Example:
    return Example(_made("LlamaModel", **DECODER), {"input_ids": _tokens(1, length), "use_cache": False})


def _gpt2(length: int) -> Example:
    made = _made(
        "GPT2Model", n_embd=256, n_layer=2, n_head=4, vocab_size=256, n_positions=length, bos_token_id=0, eos_token_id=0
    )
    return Example(made, {"input_ids": _tokens(1, length), "use_cache": False})


def _bert(length: int) -> Example:
    made = _made("BertModel", **SIZES, num_hidden_layers=2, max_position_embeddings=length)
    return Example(made, {"input_ids": _tokens(1, length)})


def _t5(length: int) -> Example:
    made = _made("T5Model", d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, vocab_size=256)
    return Example(made, {"input_ids": _tokens(1, length), "decoder_input_ids": _tokens(1, length), "use_cache": False})


def _vit(length: int) -> Example:
    side = round(length**0.5) * 16
    made = _made("ViTModel", **{**SIZES, "num_hidden_layers": 2}, image_size=side, patch_size=16)
    return Example(made, {"pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))})


CASES = (
    ModelCase("mistral", 4096, "sliding window 1024", _mistral),
    ModelCase("gemma", 4096, "sliding window 512, and full", _gemma),
    ModelCase("documents", 4096, "16 packed documents", _documents),
    ModelCase("padded", 4096, "half padding, bidirectional", _padded),
    ModelCase("padded_left", 4096, "half padding, causal", _padded_left),
    ModelCase("swin", 4096, "shifted windows of 256", _swin),
    ModelCase("chunked", 4096, "chunks of 512, and full", _chunked),
    ModelCase("llama", 512, "causal", _llama, zoo=True),
    ModelCase("gpt2", 512, "causal", _gpt2, zoo=True),
    ModelCase("bert", 512, "full", _bert, zoo=True),
    ModelCase("t5", 512, "biases, full and causal", _t5, zoo=True),
    ModelCase("vit", 512, "full", _vit, zoo=True),
)


def named(names: list[str] | None) -> tuple[ModelCase, ...]:
    """The cases of these names, or all. Raises InputError for an unknown one."""
    known = {case.name: case for case in CASES}
    return tuple(pick(known, names))
