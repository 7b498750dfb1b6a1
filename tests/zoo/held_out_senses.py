"""Held out: models of transformers for images, sound and both that the survey page does not name."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.zoo.hf import BATCH, WORDS, draw, given, ids, image, mixed, padding, speech, vision
from tests.zoo.transformers_rows import CONVS, PICTURE, RESNET, TEXT

EAGER = ("eager",)
_sound, _heard = draw(2, 800), torch.ones(2, 800).long().index_fill(1, torch.arange(600, 800), 0)
WAVES = {"plain": given(input_values=_sound), "padded": given(input_values=_sound, attention_mask=_heard)}
BACKBONE = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False,
            "backbone_config": {"model_type": "resnet", **RESNET, "out_indices": [1, 2, 3, 4]}}  # fmt: skip
BACKBONE_3 = BACKBONE | {"backbone_config": {"model_type": "resnet", **RESNET, "out_indices": [2, 3, 4]}}
_words = {"input_ids": ids, "attention_mask": padding(left=False)}
WORDY = {**TEXT, "vocab_size": WORDS}
PAIR = {"padded": given(pixel_values=image(), **_words)}
GRID = torch.tensor([[1, 4, 4], [1, 4, 4]])

_VISION = [
    vision("aimv2_vision_model"),
    vision("cvt", only=EAGER, embed_dim=[16, 32], num_heads=[1, 2], depth=[1, 2], patch_sizes=[7, 3],
           patch_stride=[4, 2], patch_padding=[2, 1], mlp_ratio=[2.0, 2.0],
           cls_token=[False, True], attention_drop_rate=[0.0, 0.0],
           drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], qkv_projection_method=["dw_bn"] * 2,
           kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
    vision("conditional_detr", only=EAGER, size=64, num_queries=6, **BACKBONE),
    vision("dab-detr", only=EAGER, size=64, num_queries=6, **BACKBONE, hidden_size=32),
    vision("data2vec-vision", use_relative_position_bias=True),
    vision("detr", only=EAGER, size=64, num_queries=6, **BACKBONE),
    vision("dinov2_with_registers", num_register_tokens=2),
    vision("dinov3_vit", num_register_tokens=2),
    vision("donut-swin", only=EAGER, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2),
    vision("dpt", neck_hidden_sizes=[8, 8], backbone_out_indices=[0, 1], reassemble_factors=[1, 1]),
    vision("hiera", embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 4], num_query_pool=1, image_size=[32, 32],
           patch_size=[7, 7], masked_unit_size=[4, 4], only=("eager",)),
    vision("ijepa"),
    vision("levit", only=EAGER, patch_size=16, hidden_sizes=[16, 32, 32], num_attention_heads=[2, 2, 2],
           depths=[1, 1, 1], key_dim=[8, 8, 8],
           down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]]),
    vision("mask2former", only=EAGER, size=64, hidden_dim=32, num_queries=6, encoder_layers=1, decoder_layers=2,
           num_attention_heads=4, dim_feedforward=48, encoder_feedforward_dim=48, mask_feature_size=32, feature_size=32,
           **BACKBONE, others={"*.encoder.layers.*": -1}),
    vision("maskformer-swin", only=EAGER, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2),
    vision("mobilevit", only=EAGER, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8], size=64),
    vision("pvt", only=EAGER, size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32],
           num_attention_heads=[1, 2], sequence_reduction_ratios=[4, 1], patch_sizes=[4, 2], strides=[4, 2],
           mlp_ratios=[2, 2]),
    vision("pvt_v2", only=EAGER, size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32],
           num_attention_heads=[1, 2], sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2]),
    vision("rt_detr", only=EAGER, size=64, **BACKBONE_3, d_model=32, encoder_hidden_dim=32,
           encoder_in_channels=[8, 16, 16],
           num_queries=6, decoder_in_channels=[32, 32, 32], others={"*.encoder_attn": -1}),
    vision("sam", "sam_vision_model", auto="SamVisionModel", window_size=2, global_attn_indexes=[1], output_channels=16,
           mlp_dim=48, only=("eager", "sdpa")),
    vision("segformer", only=EAGER, size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32],
           num_attention_heads=[1, 2], sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2]),
    vision("swin2sr", only=EAGER, embed_dim=16, depths=[2], num_heads=[2], window_size=4, patch_size=1, size=16),
    vision("swinv2", only=EAGER, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2),
    vision("table-transformer", only=EAGER, size=64, num_queries=6, **BACKBONE),
    vision("timesformer", only=EAGER, num_frames=2, calls={"plain": given(pixel_values=image(frames=2))}),
    vision("videomae", num_frames=2, tubelet_size=2, calls={"plain": given(pixel_values=image(frames=2),
           bool_masked_pos=torch.zeros(2, 16).bool())}),
    vision("vit_mae", decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
           decoder_intermediate_size=48),
    vision("vit_msn"),
    vision("vitdet", only=EAGER, window_size=2, window_block_indices=[0], use_relative_position_embeddings=True),
    vision("vivit", only=("eager", "sdpa"), num_frames=2, tubelet_size=[2, 8, 8],
           calls={"plain": given(pixel_values=image(frames=2))}),
    vision("vjepa2", crop_size=32, frames_per_clip=2, pred_hidden_size=32, pred_num_attention_heads=4,
           pred_num_hidden_layers=1, calls={"plain": given(pixel_values_videos=image(frames=2))}),
    vision("yolos", num_detection_tokens=3, image_size=[32, 32]),
]  # fmt: skip

_SPEECH = [
    speech("encodec", {"plain": given(input_values=draw(2, 1, 640))}, only=EAGER, num_filters=4, hidden_size=16,
           codebook_size=8, upsampling_ratios=[4, 2]),
    speech("hubert", WAVES, **CONVS),
    speech("moonshine", {"plain": given(input_values=draw(2, 4000), decoder_input_ids=ids(9), use_cache=False)},
           encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
           decoder_num_attention_heads=4, encoder_num_key_value_heads=4, decoder_num_key_value_heads=4),
    speech("mimi encoder", {"plain": given(input_values=draw(2, 1, 640))}, "mimi", num_filters=4, codebook_size=8,
           upsampling_ratios=[4, 2], num_semantic_quantizers=1, num_quantizers=2, sliding_window=8, codebook_dim=16,
           vector_quantization_hidden_dimension=16, upsample_groups=32),
    speech("qwen2_audio_encoder", {"plain": given(input_features=draw(2, 16, 48))}, num_mel_bins=16,
           max_source_positions=24),
    speech("seamless_m4t_v2 text", {"padded": given(input_ids=ids, attention_mask=padding(left=False),
           decoder_input_ids=ids(9), use_cache=False)}, "seamless_m4t_v2", auto="SeamlessM4Tv2ForTextToText",
           only=EAGER,           hidden_size=32, encoder_layers=2, decoder_layers=2, num_hidden_layers=2),
    speech("sew", WAVES, **CONVS, squeeze_factor=2),
    speech("sew-d", WAVES, only=EAGER, **CONVS, squeeze_factor=2, position_buckets=8, max_position_embeddings=64),
    speech("speech_to_text", {"padded": given(input_features=draw(2, 48, 16), attention_mask=padding(False, 48),
           decoder_input_ids=ids(9), use_cache=False)}, conv_channels=32, input_feat_per_channel=16,
           max_source_positions=64, max_target_positions=32, only=EAGER),
    speech("speecht5 text", {"padded": given(input_ids=ids, attention_mask=padding(left=False), use_cache=False,
           decoder_input_values=draw(2, 9, 80))}, "speecht5", auto="SpeechT5ForTextToSpeech", only=EAGER),
    speech("unispeech", WAVES, **CONVS),
    speech("unispeech-sat", WAVES, **CONVS),
    speech("wav2vec2-bert", {"padded": given(input_features=draw(2, 24, 16), attention_mask=padding(left=False))},
           only=EAGER, feature_projection_input_dim=16, position_embeddings_type="relative_key"),
    speech("wav2vec2-conformer", WAVES, only=EAGER, **CONVS, position_embeddings_type="relative"),
    speech("wav2vec2-conformer rotary", WAVES, "wav2vec2-conformer", only=EAGER, **CONVS,
           position_embeddings_type="rotary"),
    speech("wavlm", WAVES, only=EAGER, **CONVS, num_buckets=16, max_bucket_distance=32),
    speech("parakeet_encoder", {"padded": given(input_features=draw(2, 48, 16), attention_mask=padding(False, 48))},
           num_mel_bins=16, subsampling_conv_channels=8, num_key_value_heads=4),
    speech("clap audio", {"plain": given(input_features=draw(2, 1, 64, 16))}, "clap_audio_model",
           auto="ClapAudioModel", only=EAGER, spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=16,
           depths=[1, 1], num_attention_heads=[2, 4], patch_stride=[4, 4], window_size=4, hidden_size=32),
]  # fmt: skip

_MIXED = [
    mixed("altclip", PAIR, only=EAGER, text_config=WORDY | {"project_dim": 32}, vision_config=PICTURE,
          projection_dim=32),
    mixed("blip", PAIR, text_config=WORDY, vision_config=PICTURE, only=EAGER),
    mixed("bridgetower", PAIR, only=EAGER, text_config=WORDY, hidden_size=64,
          vision_config=PICTURE | {"hidden_size": 64},
          num_hidden_layers=2, num_attention_heads=4),
    mixed("chinese_clip", PAIR, text_config=WORDY, vision_config=PICTURE),
    mixed("clipseg", PAIR, text_config=WORDY, vision_config=PICTURE, projection_dim=16),
    mixed("flava", {"plain": given(pixel_values=image(), **_words, codebook_pixel_values=None)}, only=EAGER,
          text_config=WORDY, image_config=PICTURE, multimodal_config=TEXT, hidden_size=32),
    mixed("florence2 language", {"plain": given(input_ids=ids, decoder_input_ids=ids(9), use_cache=False)}, "bart"),
    mixed("fuyu text", {"plain": given(input_ids=ids, use_cache=False)}, "fuyu", text_config={"model_type": "persimmon",
          **WORDY}),
    mixed("git", {"plain": given(pixel_values=image(), **_words, use_cache=False)}, only=EAGER,
          vision_config=PICTURE, **WORDY),
    mixed("groupvit", PAIR, only=EAGER, text_config=WORDY,
          vision_config={**PICTURE, "depths": [1, 1, 1],
          "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]}),
    mixed("idefics2 vision", {"plain": given(pixel_values=image())}, "idefics3_vision",
          auto="Idefics3VisionTransformer"),
    mixed("kosmos-2", {"padded": given(pixel_values=image(), **_words, use_cache=False, image_embeds_position_mask=
          (torch.arange(24) < 4).long().expand(2, 24))}, only=EAGER, latent_query_num=4, text_config={
          "vocab_size": WORDS, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
          vision_config=PICTURE),
    mixed("layoutlmv3", {"padded": given(**_words)}, only=EAGER, has_relative_attention_bias=True, input_size=32,
          has_spatial_attention_bias=True, visual_embed=False, coordinate_size=5, shape_size=6),
    mixed("lilt", {"padded": given(**_words)}, only=EAGER, hidden_size=48, num_attention_heads=4),
    mixed("lxmert", {"padded": given(**_words, visual_feats=draw(2, 5, 8), visual_pos=draw(2, 5, 4))}, only=EAGER,
          l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=8),
    mixed("mllama text", {"padded": given(**_words, use_cache=False)}, "mllama_text_model", auto="MllamaTextModel",
          cross_attention_layers=[]),
    mixed("owlvit", PAIR, text_config={**WORDY, "max_position_embeddings": 32}, vision_config=PICTURE),
    mixed("pixtral", {"plain": given(pixel_values=image(), image_sizes=[(32, 32), (32, 32)])}),
    mixed("qwen2_5_vl_vision", {"plain": given(hidden_states=draw(32, 3 * 2 * 8 * 8), grid_thw=GRID)}, depth=2,
          num_heads=4, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1], patch_size=8),
    mixed("qwen2_vl_text", {"padded": given(**_words, use_cache=False)}, rope_scaling={"type": "default",
          "mrope_section": [1, 1, 2], "rope_type": "default"}),
    mixed("qwen2_5_vl_text", {"padded": given(**_words, use_cache=False)}, rope_scaling={"type": "default",
          "mrope_section": [1, 1, 2], "rope_type": "default"}),
    mixed("siglip2 vision", {"padded": given(pixel_values=draw(BATCH, 16, 192), pixel_attention_mask=padding(False, 16),
          spatial_shapes=torch.tensor([[4, 4], [3, 3]]))}, "siglip2_vision_model", num_patches=16),
    mixed("udop", {"padded": given(**_words, bbox=torch.zeros(2, 24, 4), decoder_input_ids=ids(9), use_cache=False)},
          only=EAGER, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    mixed("vilt", {"padded": given(**_words, pixel_values=image(), pixel_mask=torch.ones(2, 32, 32).long())},
          only=EAGER),
    mixed("visual_bert", {"padded": given(**_words, visual_embeds=draw(2, 5, 8))}, only=EAGER, visual_embedding_dim=8),
    mixed("xclip", {"plain": given(pixel_values=image(frames=2), **_words)}, only=("eager", "sdpa"), text_config=WORDY,
          vision_config={**PICTURE, "num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 48,
          "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4}, projection_dim=32),
]  # fmt: skip

ROWS = [replace(row, held_out=True) for row in (*_VISION, *_SPEECH, *_MIXED)]
