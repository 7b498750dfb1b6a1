"""The models of diffusers that the survey page names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Entry, MakeCall
from tests.zoo.hf import BATCH, draw, given, randomised

SDPA, BOTH = ("sdpa",), ("eager", "sdpa")
STEP = torch.tensor([3, 5])
KEPT = torch.ones(BATCH, 7).index_fill(1, torch.tensor([5, 6]), 0)


def _build(kind: str, config: Mapping[str, Any]) -> Callable[[str], nn.Module]:
    """Builds a model; `eager` is diffusers' processor that multiplies and normalises by hand."""

    def build(implementation: str) -> nn.Module:
        import diffusers
        from diffusers.models.attention_processor import AttnProcessor

        torch.manual_seed(0)
        made = getattr(diffusers, kind)(**config)
        if implementation == "eager":
            made.set_attn_processor(AttnProcessor())
        return randomised(made)

    return build


def diffusion(
    name: str, kind: str, calls: Mapping[str, MakeCall], only: tuple[str, ...] = SDPA, **config: Any
) -> Entry:
    return Entry(f"diffusers {name}", "diffusion", _build(kind, config), calls, only, package="diffusers")


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
JOINT = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",
         "CrossAttnUpBlock2D")}  # fmt: skip
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}

ROWS = [
    diffusion("AutoencoderKL", "AutoencoderKL", {"plain": given(sample=draw(2, 3, 16, 16))}, BOTH,
              block_out_channels=(16, 16), norm_num_groups=8, **BLOCKS),
    diffusion("CogVideoX", "CogVideoXTransformer3DModel", {"plain": given(hidden_states=draw(2, 2, 4, 8, 8),
              encoder_hidden_states=draw(2, 7, 8), timestep=STEP)}, **HEADS, in_channels=4, out_channels=4,
              time_embed_dim=8, text_embed_dim=8, sample_width=8, sample_height=8, sample_frames=5,
              max_text_seq_length=7),
    diffusion("DiT", "DiTTransformer2DModel", {"plain": given(hidden_states=draw(2, 4, 8, 8), timestep=STEP,
              class_labels=STEP)}, BOTH, **HEADS, in_channels=4, sample_size=8, norm_num_groups=4,
              num_embeds_ada_norm=8),
    diffusion("Flux", "FluxTransformer2DModel", {"plain": given(hidden_states=draw(2, 16, 4),
              encoder_hidden_states=draw(2, 7, 32), pooled_projections=draw(2, 32), timestep=STEP / 10,
              img_ids=draw(16, 3), txt_ids=draw(7, 3))}, **HEADS, **JOINT, in_channels=4, num_single_layers=2),
    diffusion("LTXVideo", "LTXVideoTransformer3DModel", {"padded": given(hidden_states=draw(2, 16, 4),
              encoder_hidden_states=draw(2, 7, 16), timestep=STEP, encoder_attention_mask=KEPT, num_frames=1,
              height=4, width=4)}, **HEADS, in_channels=4, out_channels=4, cross_attention_dim=32,
              caption_channels=16),
    diffusion("Sana (linear attn)", "SanaTransformer2DModel", {"padded": given(hidden_states=draw(2, 4, 8, 8),
              encoder_hidden_states=draw(2, 7, 8), timestep=STEP, encoder_attention_mask=KEPT)},
              num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=4,
              num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
              sample_size=8),
    diffusion("UNet2DCondition", "UNet2DConditionModel", {"plain": given(sample=draw(2, 4, 8, 8), timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16)), "padded": given(sample=draw(2, 4, 8, 8), timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16), encoder_attention_mask=KEPT)}, BOTH, block_out_channels=(16, 32),
              layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
              **CROSS),
]  # fmt: skip
