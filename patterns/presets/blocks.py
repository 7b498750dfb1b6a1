"""Blocks of text: S2-Attention and Phi-3-small, LongLoRA's groups, Star Attention's context."""

from __future__ import annotations

from typing import Literal

from sparsify.errors import PatternError
from sparsify.patterns.block_window import block_window
from sparsify.patterns.causal import causal
from sparsify.patterns.expression import expr
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import Sized, choice, flag, preset, size, whole
from sparsify.patterns.same_block import same_block
from sparsify.patterns.sinks import sinks


@preset(
    source="Lin et al., arXiv 2407.17678; linxihui/dkernel (absolute form)",
    phase="both",
    semantics="native",
    cost="local_blocks blocks, and one in vert_stride of the rest",
    omits="the relative form for encoders, masks of one's own, and dropping unused keys from memory",
    example={"block": 16, "local_blocks": 8},
    heads=8,
)
def s2_attention(
    kv_heads: int = 8,
    group: int = 1,
    block: int = 64,
    local_blocks: int = 16,
    vert_stride: int = 8,
    offset: int = 0,
    homo_head: bool = False,
    num_dense_heads: int = 0,
) -> Pattern:
    """k <= q and (qb - kb < local_blocks or (kb + j step + offset) mod vert_stride = 0), with qb = q // block.

    j = h // group is the key head, step = max(1, vert_stride // kv_heads), or 0 with `homo_head`; the last
    `num_dense_heads` key heads keep everything up to q. `group` is how many query heads share a key head.
    """
    name = "s2_attention"
    count, many, wide, stride = (
        whole(value, f"{name}.{field}")
        for field, value in (("kv_heads", kv_heads), ("group", group), ("block", block), ("vert_stride", vert_stride))
    )
    step = 0 if flag(homo_head, f"{name}.homo_head") else max(1, stride // count)
    lit = expr(f"(k // {wide} + h // {many} * {step} + {whole(offset, f'{name}.offset', low=0)}) % {stride} == 0")
    kept = block_window(wide, whole(local_blocks, f"{name}.local_blocks")) | lit
    if whole(num_dense_heads, f"{name}.num_dense_heads", low=0) > count:
        raise PatternError(f"{name}.num_dense_heads: expected at most the {count} key heads, found {num_dense_heads}")
    if num_dense_heads:
        kept = kept | expr(f"h // {many} >= {count - num_dense_heads}")
    return kept & causal()


@preset(
    source="Abdin et al., arXiv 2404.14219; microsoft/Phi-3-small-128k-instruct",
    phase="both",
    semantics="native",
    cost="16 blocks of 64 keys, and an eighth of the rest",
    omits="that every second layer is dense (give those layers a rule of their own)",
    example={"block": 16},
    heads=8,
)
def phi3_small(local_blocks: int = 16, vert_stride: int = 8, block: int = 64) -> Pattern:
    """k <= q and (qb - kb < local_blocks or (kb + h + 1) mod vert_stride = 0), with qb = q // block."""
    wide, stride = whole(block, "phi3_small.block"), whole(vert_stride, "phi3_small.vert_stride")
    near = block_window(wide, whole(local_blocks, "phi3_small.local_blocks"))
    return (near | expr(f"(k // {wide} + h + 1) % {stride} == 0")) & causal()


@preset(
    source="Chen et al., arXiv 2309.12307; dvlab-research/LongLoRA",
    phase="train",
    semantics="approx",
    cost="half a group of keys for each query on average",
    omits="dense attention at evaluation; in a causal model the model's own mask also drops the future of mask=roll",
    example={"heads": 4},
    heads=4,
)
def long_lora(heads: int, variant: Literal["varlen", "roll"] = "varlen", group: Sized = "N/4") -> Pattern:
    """Groups of G tokens, causal: q // G = k // G for the first half of the heads, shifted by G / 2 for the second.

    varlen: (q + G/2) // G = (k + G/2) // G, half a group at both ends; roll: positions p' = (p - G/2) mod N, whose last
    group holds the end and the start of the text, and in which the start sees the end (declared intentional).
    """
    choice(variant, "long_lora.variant", ("varlen", "roll"))
    half, text = whole(heads, "long_lora.heads", low=2) // 2, size(group, "long_lora.group")
    whole_group, shift = f"max(size('{text}'), 1)", f"size('floor({text}) // 2')"
    plain = expr(f"h < {half}") & same_block(text) & causal()
    if variant == "varlen":
        return plain | (expr(f"h >= {half}") & same_block(text, shift=f"floor({text}) // 2") & causal())
    q, k = (f"(({position} - {shift}) % max(N, 1))" for position in "qk")
    rolled = expr(f"{q} // {whole_group} == {k} // {whole_group} and {k} <= {q}")
    return plain | (expr(f"h >= {half}") & rolled)


@preset(
    source="Acharya et al., arXiv 2411.17116; NVIDIA/Star-Attention (phase 1)",
    phase="prefill",
    semantics="approx",
    cost="anchor keys and half a block for each query on average",
    omits="phase 2 (queries and generated tokens are dense over all keys: give decode a rule) and several hosts",
)
def star_attention(block: Sized = "N/4", anchor: Sized | None = None) -> Pattern:
    """k <= q and (q // block = k // block or k < anchor); the anchor is the first block if not given."""
    wide = size(block, "star_attention.block")
    first = wide if anchor is None else size(anchor, "star_attention.anchor", low=0)
    if first.isdigit() and wide.isdigit() and int(first) > int(wide):
        raise PatternError(f"star_attention.anchor: expected at most the block of {wide}, found {first}")
    return (same_block(wide) | sinks(first)) & causal()
