"""Held out: models of diffusers that the survey page does not name, and x-transformers with many of its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.zoo.diffusers_rows import BOTH, HEADS, KEPT, STEP, diffusion
from tests.zoo.entry import Entry
from tests.zoo.hf import WORDS, draw, given, ids, padding, randomised

_words = {"encoder_hidden_states": draw(2, 7, 16), "encoder_attention_mask": KEPT}
_video = draw(2, 4, 2, 8, 8)
_DIFFUSERS = [
    diffusion("Allegro", "AllegroTransformer3DModel", {"padded": given(hidden_states=_video, timestep=STEP, **_words,
              attention_mask=torch.ones(2, 2, 8, 8), image_rotary_emb=None)}, num_attention_heads=2,
              attention_head_dim=24, num_layers=2, cross_attention_dim=48, caption_channels=16, sample_height=8,
              sample_width=8, sample_frames=2),
    diffusion("AuraFlow", "AuraFlowTransformer2DModel", {"plain": given(hidden_states=draw(2, 4, 8, 8),
              encoder_hidden_states=draw(2, 7, 16), timestep=STEP / 10)}, sample_size=8, in_channels=4,
              num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2,
              joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=64),
    diffusion("Chroma", "ChromaTransformer2DModel", {"padded": given(hidden_states=draw(2, 16, 4),
              encoder_hidden_states=draw(2, 7, 32), timestep=STEP / 10, img_ids=draw(16, 3), txt_ids=draw(7, 3),
              attention_mask=torch.ones(2, 23))}, **HEADS, in_channels=4, num_single_layers=1, joint_attention_dim=32,
              axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
    diffusion("HunyuanDiT", "HunyuanDiT2DModel", {"padded": given(hidden_states=draw(2, 4, 8, 8), timestep=STEP / 10,
              encoder_hidden_states=draw(2, 7, 16), text_embedding_mask=KEPT.long(),
              encoder_hidden_states_t5=draw(2, 7, 16),
              text_embedding_mask_t5=KEPT.long(), image_meta_size=torch.zeros(2, 6), style=torch.zeros(2).long(),
              image_rotary_emb=(draw(16, 16), draw(16, 16)))}, **HEADS, in_channels=4, patch_size=2, sample_size=8,
              hidden_size=32, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16,
              pooled_projection_dim=16, text_len=7, text_len_t5=7),
    diffusion("Kandinsky UNet", "UNet2DConditionModel", {"plain": given(sample=draw(2, 4, 8, 8), timestep=STEP,
              encoder_hidden_states=None, added_cond_kwargs={"image_embeds": draw(2, 16)})},
              block_out_channels=(16, 32), layers_per_block=1, sample_size=8, cross_attention_dim=16,
              attention_head_dim=4, norm_num_groups=8,
              down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
              up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
              mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=16, encoder_hid_dim_type="image_proj",
              resnet_time_scale_shift="scale_shift", addition_embed_type="image"),
    diffusion("Latte", "LatteTransformer3DModel", {"plain": given(hidden_states=_video, timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16))}, **HEADS, in_channels=4, out_channels=4, cross_attention_dim=32,
              sample_size=8, patch_size=2, norm_type="ada_norm_single", caption_channels=16, video_length=2,
              activation_fn="gelu-approximate", num_embeds_ada_norm=10, norm_elementwise_affine=False),
    diffusion("Lumina2", "Lumina2Transformer2DModel", {"padded": given(hidden_states=draw(2, 4, 8, 8),
              timestep=STEP / 10, encoder_hidden_states=draw(2, 7, 16), encoder_attention_mask=KEPT.bool())},
              sample_size=8, in_channels=4,
              hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
              axes_dim_rope=(4, 4, 8), axes_lens=(16, 16, 16), cap_feat_dim=16, multiple_of=8),
    diffusion("Mochi", "MochiTransformer3DModel", {"padded": given(hidden_states=_video, timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16), encoder_attention_mask=KEPT.bool())}, **HEADS, in_channels=4,
              pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8, max_sequence_length=7),
    diffusion("PixArt", "PixArtTransformer2DModel", {"padded": given(hidden_states=draw(2, 4, 8, 8), timestep=STEP,
              added_cond_kwargs={"resolution": None, "aspect_ratio": None}, **_words)}, BOTH, **HEADS, in_channels=4,
              cross_attention_dim=32, sample_size=8, caption_channels=16, use_additional_conditions=False),
    diffusion("QwenImage", "QwenImageTransformer2DModel", {"padded": given(hidden_states=draw(2, 16, 16),
              encoder_hidden_states=draw(2, 7, 16), encoder_hidden_states_mask=KEPT.bool(), timestep=STEP / 10,
              img_shapes=[[(1, 4, 4)]] * 2)}, **HEADS, in_channels=16, out_channels=4, joint_attention_dim=16,
              axes_dims_rope=(4, 4, 8)),
    diffusion("SD3", "SD3Transformer2DModel", {"plain": given(hidden_states=draw(2, 4, 8, 8), timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16), pooled_projections=draw(2, 16))}, **HEADS, sample_size=8,
              in_channels=4, out_channels=4, joint_attention_dim=16, caption_projection_dim=32,
              pooled_projection_dim=16, pos_embed_max_size=8),
    diffusion("SD3.5 dual", "SD3Transformer2DModel", {"plain": given(hidden_states=draw(2, 4, 8, 8), timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16), pooled_projections=draw(2, 16))}, **HEADS, sample_size=8,
              in_channels=4, out_channels=4, joint_attention_dim=16, caption_projection_dim=32, qk_norm="rms_norm",
              pooled_projection_dim=16, pos_embed_max_size=8, dual_attention_layers=(0,)),
    diffusion("Wan", "WanTransformer3DModel", {"plain": given(hidden_states=_video, timestep=STEP,
              encoder_hidden_states=draw(2, 7, 16))}, **HEADS, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
              ffn_dim=48, rope_max_seq_len=32),
]  # fmt: skip


def _language(causal: bool, wrapper: dict[str, Any], layers: dict[str, Any]) -> Callable[[str], nn.Module]:
    def build(implementation: str) -> nn.Module:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        torch.manual_seed(0)
        kind = Decoder if causal else Encoder
        stack = kind(dim=32, depth=2, heads=4, attn_dim_head=8, attn_flash=implementation == "sdpa", **layers)
        return randomised(TransformerWrapper(num_tokens=WORDS, max_seq_len=64, attn_layers=stack, **wrapper))

    return build


def xt(
    name: str, both: bool = True, causal: bool = True, wrapper: dict[str, Any] | None = None, **layers: Any
) -> Entry:
    """One row of x-transformers: causal ones plainly, and with padding on the right."""
    calls = {"plain": given(x=ids), "padded": given(x=ids, mask=padding(left=False).bool())}
    if layers.get("cross_attend"):
        calls = {"padded": given(x=ids, context=draw(2, 7, 32), context_mask=KEPT.bool())}
    only = ("eager", "sdpa") if both else ("eager",)
    build = _language(causal, wrapper or {}, layers)
    return Entry(f"x-transformers {name}", "x-transformers", build, calls, only, package="x_transformers")


_X = [
    xt("decoder"),
    xt("encoder", causal=False),
    xt("alibi", alibi_pos_bias=True, alibi_num_heads=2),
    xt("rel_pos_bias", both=False, rel_pos_bias=True),
    xt("dynamic_pos_bias", both=False, dynamic_pos_bias=True),
    xt("rotary", rotary_pos_emb=True),
    xt("rotary xpos", rotary_xpos=True),
    xt("qk_norm", attn_qk_norm=True),
    xt("talking heads", both=False, attn_pre_talking_heads=True, attn_post_talking_heads=True),
    xt("head_scale", attn_head_scale=True),
    xt("memory tokens", wrapper={"num_memory_tokens": 3}),
    xt("memory kv", attn_num_mem_kv=3),
    xt("sparse topk", both=False, attn_sparse_topk=4),
    xt("sink", both=False, attn_head_learned_sink=True),
    xt("zero kv", attn_add_zero_kv=True),
    xt("softclamp", both=False, attn_softclamp_logits=True),
    xt("one_kv_head", attn_one_kv_head=True),
    xt("kv_heads", attn_kv_heads=2),
    xt("macaron", macaron=True),
    xt("cross attention", cross_attend=True),
    xt("past limit", attn_max_attend_past=5),
    xt("residual attention", both=False, residual_attn=True),
    xt("gated values", attn_gate_values=True),
    xt("sigmoid", both=False, attn_sigmoid=True),
    xt("selective", both=False, attn_selective=True),
    xt("cope", both=False, attn_use_cope=True),
    xt("data dependent alibi", attn_data_dependent_alibi=True),
    xt("laser", attn_laser=True),
    xt("shift tokens", shift_tokens=1),
    xt("value residual", add_value_residual=True),
]

ROWS: list[Entry] = [replace(row, held_out=True) for row in (*_DIFFUSERS, *_X)]
