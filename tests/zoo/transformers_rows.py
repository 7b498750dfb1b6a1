"""The models of transformers that the survey page names."""

from __future__ import annotations

import torch

from tests.zoo.hf import (
    LENGTH,
    TINY,
    WINDOW,
    WORDS,
    decoder,
    draw,
    encoder,
    given,
    ids,
    image,
    mixed,
    padding,
    speech,
    translator,
    vision,
)

BOTH, EAGER, FLEX = ("eager", "sdpa"), ("eager",), ("eager", "sdpa", "flex_attention")
ROUTER = {"*.gate": -1, "*.router": -1, "*.mlp": -1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
TEXT = {k: TINY[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
PICTURE = {**TEXT, "image_size": 32, "patch_size": 8}
IMAGE_TOKEN, PATCHES = WORDS - 1, 16
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}

DECODERS = [
    decoder("bloom", only=EAGER, n_layer=2, n_head=4, hidden_size=32),
    decoder("cohere"),
    decoder("deepseek_v3", n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4,
            **MLA, others=ROUTER),
    decoder("deepseek_v32_dsa", "deepseek_v32", n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
            num_key_value_heads=4, index_topk=8, index_n_heads=2, index_head_dim=16, **MLA, others=ROUTER),
    decoder("falcon", alibi=False),
    decoder("gemma"),
    decoder("gemma2", caches=True, only=("eager", "flex_attention")),
    decoder("gemma3_text", caches=True, layer_types=["sliding_attention", "full_attention"]),
    decoder("gpt2", caches=True),
    decoder("gpt_neo_local", "gpt_neo", only=EAGER, attention_types=[[["global", "local"], 1]], num_layers=2,
            window_size=WINDOW),
    decoder("gpt_neox"),
    decoder("gpt_oss", caches=True, only=EAGER, others=ROUTER),
    decoder("gptj", only=EAGER, rotary_dim=4),
    decoder("llama", caches=True, only=FLEX),
    decoder("mistral_w32", "mistral", caches=True, only=FLEX),
    decoder("mixtral", others=ROUTER),
    decoder("olmo2"),
    decoder("opt", word_embed_proj_dim=32, ffn_dim=48),
    decoder("phi"),
    decoder("phi3"),
    decoder("qwen2"),
    decoder("qwen2_sw", "qwen2", use_sliding_window=True, max_window_layers=1),
    decoder("qwen3", caches=True),
    decoder("qwen3_moe", others=ROUTER),
    decoder("recurrent_gemma", attention_window_size=WINDOW, block_types=("recurrent", "attention"), lru_width=32),
]  # fmt: skip

ENCODERS = [
    encoder("albert", embedding_size=16),
    encoder("bert"),
    encoder("big_bird", only=EAGER, attention_type="block_sparse", block_size=2, num_random_blocks=1),
    encoder("big_bird_full", "big_bird", only=EAGER, attention_type="original_full"),
    encoder("deberta", only=EAGER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    encoder("distilbert", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    encoder("fnet", only=EAGER),
    encoder("layoutlm", only=BOTH),
    encoder("longformer", only=EAGER, attention_window=WINDOW),
    encoder("modernbert", local_attention=WINDOW, global_attn_every_n_layers=2),
    encoder("rembert", only=EAGER),
    encoder("roberta"),
    encoder("xlm_roberta", "xlm-roberta"),
]

TRANSLATORS = [
    translator("bart"),
    translator("m2m_100"),
    translator("mbart"),
    translator("pegasus"),
    translator("t5", d_kv=8, d_ff=48, num_layers=2, num_heads=4, only=BOTH),
]

VISION = [
    vision("beit", use_relative_position_bias=True, use_mask_token=False),
    vision("clip_vision", "clip_vision_model"),
    vision("deformable_detr", only=EAGER, use_timm_backbone=False, backbone_config={"model_type": "resnet", **RESNET},
           num_queries=6, num_feature_levels=2, backbone=None, use_pretrained_backbone=False,
           size=64, others={"*.encoder_attn": -1, "encoder.*.self_attn": -1}),
    vision("deit"),
    vision("dinov2"),
    vision("siglip_vision", "siglip_vision_model"),
    vision("swin", embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2),
    vision("vit"),
]  # fmt: skip

_words = {"input_ids": ids, "attention_mask": padding(left=False)}
_marked = torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), ids()[:, :8].clamp(max=WORDS - 2)], dim=1)
_types = (_marked == IMAGE_TOKEN).long()
MIXED = [
    mixed("blip2", {"plain": given(pixel_values=image(), input_ids=_marked, attention_mask=torch.ones_like(_marked))},
          "blip-2", vision_config=PICTURE, text_config={"model_type": "opt", **TEXT, "vocab_size": WORDS, "ffn_dim": 48,
          "word_embed_proj_dim": 32}, qformer_config={**TEXT, "encoder_hidden_size": 32, "vocab_size": WORDS},
          num_query_tokens=PATCHES, image_token_index=IMAGE_TOKEN),
    mixed("clip", {"padded": given(pixel_values=image(), **_words)}, text_config={**TEXT, "vocab_size": WORDS},
          vision_config=PICTURE, projection_dim=16),
    mixed("siglip", {"padded": given(pixel_values=image(), **_words)}, text_config={**TEXT, "vocab_size": WORDS},
          vision_config=PICTURE),
    mixed("gemma3_mm", {"plain": given(pixel_values=image(), input_ids=_marked, token_type_ids=_types, use_cache=False),
          "padded": given(pixel_values=image(), input_ids=_marked, token_type_ids=_types, use_cache=False,
          attention_mask=torch.cat([torch.zeros(2, 3), torch.ones(2, 21)], dim=1).long())}, "gemma3",
          text_config={**TEXT, "vocab_size": WORDS, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW,
          "layer_types": ["sliding_attention", "full_attention"]}, vision_config={**PICTURE,
          "model_type": "siglip_vision_model"}, mm_tokens_per_image=PATCHES, image_token_index=IMAGE_TOKEN,
          image_token_id=IMAGE_TOKEN),
    mixed("llava", {"plain": given(pixel_values=image(), input_ids=_marked, use_cache=False)},
          text_config={"model_type": "llama", **TEXT, "vocab_size": WORDS}, image_token_index=IMAGE_TOKEN,
          image_token_id=IMAGE_TOKEN, vision_config={"model_type": "clip_vision_model", **PICTURE},
          vision_feature_select_strategy="default"),
]  # fmt: skip

_sound = draw(2, 800)
_heard = torch.ones(2, 800).long().index_fill(1, torch.arange(600, 800), 0)
CONVS = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
SPEECH = [
    speech("audio_spectrogram_tf", {"plain": given(input_values=draw(2, 48, 16))}, "audio-spectrogram-transformer",
           max_length=48, num_mel_bins=16, frequency_stride=8, time_stride=8),
    speech("wav2vec2", {"plain": given(input_values=_sound),
                        "padded": given(input_values=_sound, attention_mask=_heard)}, **CONVS, mask_time_prob=0.0),
    speech("whisper", {"plain": given(input_features=draw(2, 16, 2 * LENGTH), decoder_input_ids=ids(9),
           use_cache=False)}, num_mel_bins=16, max_source_positions=LENGTH, max_target_positions=32,
           decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
]  # fmt: skip

ROWS = [*DECODERS, *ENCODERS, *TRANSLATORS, *VISION, *MIXED, *SPEECH]
