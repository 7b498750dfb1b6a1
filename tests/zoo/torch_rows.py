"""Plain torch: its own attention modules, and code bases that write attention by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Entry, MakeCall
from tests.zoo.hf import BATCH, LENGTH, draw, given, padding, randomised
from tests.zoo.plain_models import (
    HEADS,
    WIDTH,
    FastAttention,
    NanoAttention,
    Packed,
    TimmAttention,
    TimmWindowAttention,
)

OWN = ("own",)
X = draw(BATCH, LENGTH, WIDTH)
PADDED = padding(left=False).logical_not()
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()


def plain(
    name: str,
    build: Callable[[str], nn.Module],
    calls: Mapping[str, MakeCall],
    only: tuple[str, ...] = OWN,
    family: str = "plain torch",
) -> Entry:
    def seeded(implementation: str) -> nn.Module:
        torch.manual_seed(0)
        return randomised(build(implementation))

    return Entry(name, family, seeded, calls, only, package="torch")


def _self(**call: Any) -> MakeCall:
    return given(query=X, key=X, value=X, **call)


def _attention_calls(weights: bool) -> dict[str, MakeCall]:
    return {
        "plain": _self(need_weights=weights),
        "padded": _self(need_weights=weights, key_padding_mask=PADDED),
        "causal": _self(need_weights=weights, attn_mask=CAUSAL, is_causal=True),
        "causal padded": _self(need_weights=weights, attn_mask=CAUSAL, key_padding_mask=PADDED),
    }


_ENCODED = {
    "plain": given(src=X),
    "padded": given(src=X, src_key_padding_mask=PADDED),
    "causal": given(src=X, mask=CAUSAL, is_causal=True),
    "causal padded": given(src=X, mask=CAUSAL, src_key_padding_mask=PADDED),
}


def _layers(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _transformer(_: str) -> nn.Module:
    return nn.Transformer(WIDTH, HEADS, 2, 2, 48, batch_first=True)


def _attention(_: str) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


def _windows(implementation: str) -> nn.Module:
    fused = implementation == "sdpa"
    return nn.Sequential(TimmWindowAttention(fused, 0), TimmWindowAttention(fused, 2))


_half = torch.arange(LENGTH) // 9
ROWS = [
    plain("flex_attention(direct)", lambda how: Packed(how == "flex_attention"),
          {"documents": given(x=X, documents=_half.expand(BATCH, -1))}, ("eager", "flex_attention")),
    plain("gpt-fast-style", lambda how: FastAttention(how == "gqa"),
          {"plain": given(x=X, input_pos=torch.arange(LENGTH)),
           "decode static": given(x=X[:, :1], input_pos=torch.tensor([11]))}, ("repeated", "gqa")),
    plain("nanoGPT-style", lambda how: NanoAttention(how == "sdpa"), {"plain": given(x=X)}, ("eager", "sdpa")),
    plain("nn.MultiheadAttention(need_weights=False)", _attention, _attention_calls(False)),
    plain("nn.MultiheadAttention(need_weights=True)", _attention, _attention_calls(True)),
    plain("nn.Transformer", _transformer, {"plain": given(src=X, tgt=X[:, :9]), "causal padded": given(src=X,
          tgt=X[:, :9], tgt_mask=CAUSAL[:9, :9], tgt_is_causal=True, src_key_padding_mask=PADDED,
          memory_key_padding_mask=PADDED)}),
    plain("nn.TransformerEncoder", lambda _: _layers(), _ENCODED),
    plain("nn.TransformerEncoder(no fastpath: norm_first)", lambda _: _layers(norm_first=True), _ENCODED),
    plain("timm swin (in its style)", _windows, {"plain": given(input=draw(BATCH, 8, 8, WIDTH))}, ("eager", "sdpa")),
    plain("timm vit (in its style)", lambda how: TimmAttention(how == "sdpa"), {"plain": given(x=X)},
          ("eager", "sdpa")),
]  # fmt: skip
