"""Neighborhoods to measure: drawn tensors on grids, and the sites of image and video models that others wrote.

A model has random weights and few layers, but the tokens, head sizes and operations of the real one. Its own q, k and v
are taken where it calls SDPA; all of its self-attentions are of one shape, so the last one stands for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from sparsify import patterns as p
from sparsify.bench.cases import NEIGHBORHOODS, Case, pick
from sparsify.bench.peers import Inputs

Made = tuple[torch.nn.Module, dict[str, torch.Tensor]]
VIDEO, IMAGE, TEXT = (8, 24, 40), (64, 64), 77


def _cogvideo() -> Made:
    import diffusers

    f, h, w = VIDEO
    made = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=1, time_embed_dim=64, text_embed_dim=64,
        sample_width=2 * w, sample_height=2 * h, sample_frames=4 * f - 3, max_text_seq_length=TEXT,
    )  # fmt: skip
    video, text = torch.randn(1, f, 16, 2 * h, 2 * w), torch.randn(1, TEXT, 64)
    return made, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([3])}


def _wan() -> Made:
    import diffusers

    f, h, w = VIDEO
    made = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=64, freq_dim=64, ffn_dim=256, num_layers=1
    )
    video, text = torch.randn(1, 16, f, 2 * h, 2 * w), torch.randn(1, TEXT, 64)
    return made, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([3])}


def _vit() -> Made:
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=16 * IMAGE[0], patch_size=16)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(1, 3, 16 * IMAGE[0], 16 * IMAGE[1])}


@dataclass(frozen=True)
class ModelSite:
    """A model with random weights, and what its self-attentions keep."""

    build: Callable[[], Made]
    pattern: p.Pattern


MODELS = {
    "CogVideoX": ModelSite(
        _cogvideo, p.neighborhood(VIDEO, [4, 12, 12], 4, start=TEXT) | p.global_tokens(f"0-{TEXT - 1}")
    ),
    "Wan": ModelSite(_wan, p.neighborhood(VIDEO, [4, 12, 12], 4)),
    "ViT": ModelSite(_vit, p.neighborhood(IMAGE, 13, start=1) | p.global_tokens(0)),
}


def inputs_of(name: str, device: str) -> Inputs:
    """q, k and v of a model's self-attention."""
    torch.manual_seed(0)
    site, found = MODELS[name], []
    made, given = site.build()
    own = F.scaled_dot_product_attention

    def record(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[2] == key.shape[2]:
            found[:] = [t.to(device) for t in (query, key, value)]
        return own(query, key, value, *args, **kwargs)

    with torch.inference_mode(), mock.patch.object(F, "scaled_dot_product_attention", record):
        made.eval()(**given)
    q, k, v = found
    case = Case(name, q.shape[2], q.shape[3], "float32", q.shape[1], k.shape[1], (site.pattern,))
    return Inputs(case, q, k, v)


def named(names: list[str] | None) -> list[Callable[[str], Inputs]]:
    """What makes the inputs of each case on a device; all without names. Raises InputError for an unknown name."""
    known: dict[str, Callable[[str], Inputs]] = {case.pattern: partial(Inputs.draw, case) for case in NEIGHBORHOODS}
    known |= {name: partial(inputs_of, name) for name in MODELS}
    return pick(known, names)
