"""Entries of transformers: a config in code, an auto class, and the calls of its kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Call, Entry, MakeCall

BATCH, LENGTH, SHORT, WORDS, WINDOW = 2, 24, 7, 99, 8
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, WORDS, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def padding(left: bool, length: int = LENGTH) -> torch.Tensor:
    """1 for tokens, 0 for the padding of the first row."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, slice(0, SHORT) if left else slice(length - SHORT, None)] = 0
    return mask


def settings(model_type: str, given: Mapping[str, Any]) -> Any:
    """The config: the tiny sizes that its class knows, and what the row gives."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    mapped = {kind.attribute_map.get(name, name) for name in given}
    tiny = {n: v for n, v in TINY.items() if n in known and kind.attribute_map.get(n, n) not in mapped}
    return kind(**{**tiny, **given})


def randomised(model: nn.Module) -> nn.Module:
    """Weights that let every score, bias and scale matter, where a model's own start from near or at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.dim() > 1:
                weight.normal_(std=weight.shape[1:].numel() ** -0.5)
            elif weight.is_floating_point():
                weight.nan_to_num_().clamp_(-2, 2).add_(torch.randn_like(weight), alpha=0.1)
    return model.eval()


def model_of(auto: str, config: Callable[[], Any]) -> Callable[[str], nn.Module]:
    """Builds a model: `auto` is an auto class or the name of the class itself."""

    def build(implementation: str) -> nn.Module:
        import transformers

        kind = getattr(transformers, auto)
        torch.manual_seed(0)
        made = config()
        if auto.startswith("AutoModel"):
            return randomised(kind.from_config(made, attn_implementation=implementation))
        return randomised(kind._from_config(made, attn_implementation=implementation))

    return build


def given(**call: Any) -> MakeCall:
    """A call with these tensors each time; what can be called makes its value."""
    return lambda _model: {name: value() if callable(value) else value for name, value in call.items()}


def hf(
    name: str,
    family: str,
    calls: Mapping[str, MakeCall],
    model_type: str = "",
    auto: str = "AutoModel",
    only: tuple[str, ...] = ("eager", "sdpa"),
    others: Mapping[str, int] | None = None,
    **config: Any,
) -> Entry:
    """One row: the model type is the name unless it is given."""
    build = model_of(auto, lambda: settings(model_type or name, config))
    return Entry(name, family, build, calls, only, others or {})


def decoder(name: str, model_type: str = "", caches: bool = False, **row: Any) -> Entry:
    """A causal language model: without and with left padding, and decoding one token with each cache."""
    calls: dict[str, MakeCall] = {
        "plain": given(input_ids=ids, use_cache=False),
        "padded": given(input_ids=ids, attention_mask=padding(left=True), use_cache=False),
    }
    if caches:
        calls |= {"decode dynamic": _decode("dynamic"), "decode static": _decode("static")}
    return hf(name, "decoder", calls, model_type, **row)


def _decode(kind: str) -> MakeCall:
    """One token after a prefill of all others, left-padded, with a cache of this kind."""

    def call(model: nn.Module) -> Call:
        from transformers import DynamicCache, StaticCache

        past = DynamicCache(config=model.config)
        if kind == "static":
            past = StaticCache(config=model.config, max_cache_len=LENGTH + 8)
        tokens, mask = ids(), padding(left=True)
        with torch.no_grad():
            model(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=past, use_cache=True)
        return {"input_ids": tokens[:, -1:], "attention_mask": mask, "past_key_values": past, "use_cache": True}

    return call


def encoder(name: str, model_type: str = "", **row: Any) -> Entry:
    """An encoder of text: without and with padding on the right."""
    calls = {"plain": given(input_ids=ids), "padded": given(input_ids=ids, attention_mask=padding(left=False))}
    return hf(name, "encoder", calls, model_type, **row)


def translator(name: str, model_type: str = "", **row: Any) -> Entry:
    """An encoder and a decoder with cross attention; the source is padded."""
    target = ids(length=9, seed=1)
    both = {"input_ids": ids, "decoder_input_ids": target, "use_cache": False}
    calls = {"plain": given(**both), "padded": given(**both, attention_mask=padding(left=False))}
    return hf(name, "encoder-decoder", calls, model_type, **row)


def image(size: int = 32, channels: int = 3, frames: int = 0) -> torch.Tensor:
    return draw(BATCH, *([frames] if frames else []), channels, size, size)


def vision(name: str, model_type: str = "", size: int = 32, calls: Mapping[str, MakeCall] | None = None, **row: Any):
    """A model of images."""
    return hf(name, "vision", calls or {"plain": given(pixel_values=image(size))}, model_type, **row)


def speech(name: str, calls: Mapping[str, MakeCall], model_type: str = "", **row: Any) -> Entry:
    return hf(name, "speech", calls, model_type, **row)


def mixed(name: str, calls: Mapping[str, MakeCall], model_type: str = "", **row: Any) -> Entry:
    return hf(name, "multimodal", calls, model_type, **row)
