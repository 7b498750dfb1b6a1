"""Presets: the patterns of published systems by name, each one line in a spec.

    from sparsify.patterns.presets import streaming_llm
    streaming_llm(sinks=8)                      # in a spec: {streaming_llm: {sinks: 8}}, or the bare name

A preset is a constructor under `@preset(...)` whose docstring begins with the rule; it is listed in `PRESETS`, from
which specs, their schema and errors, and `sparsify show` follow.
"""

from sparsify.patterns.presets.blocks import long_lora, phi3_small, s2_attention, star_attention
from sparsify.patterns.presets.global_local import big_bird, longformer, sparse_transformer
from sparsify.patterns.presets.images import axial, gna, halo_net, natten, swin
from sparsify.patterns.presets.moa import moa_head
from sparsify.patterns.presets.pages import delta, hip, kinetics, long_heads, quest, seer_attention_decode
from sparsify.patterns.presets.permuted import pbs_attn
from sparsify.patterns.presets.prefill import (
    dhsa,
    flash_prefill,
    flex_prefill,
    minference_blocks,
    minference_lines,
    x_attention,
)
from sparsify.patterns.presets.preset import About, Preset, preset, semantics_of
from sparsify.patterns.presets.skipping import blasst, sparge_attention
from sparsify.patterns.presets.streaming import a_shape, based_window, duo_streaming, razor_head, streaming_llm
from sparsify.patterns.presets.tokens import less_is_more, tidal_decode, token_select
from sparsify.patterns.presets.trained import moba, nats, nsa_selection, seer_attention, vsa

PRESETS = (
    streaming_llm,
    moa_head,
    duo_streaming,
    razor_head,
    a_shape,
    s2_attention,
    phi3_small,
    long_lora,
    star_attention,
    based_window,
    sparse_transformer,
    longformer,
    big_bird,
    natten,
    gna,
    swin,
    halo_net,
    axial,
    quest,
    kinetics,
    delta,
    seer_attention_decode,
    long_heads,
    hip,
    tidal_decode,
    less_is_more,
    token_select,
    minference_lines,
    minference_blocks,
    flex_prefill,
    x_attention,
    flash_prefill,
    dhsa,
    sparge_attention,
    blasst,
    seer_attention,
    moba,
    nsa_selection,
    vsa,
    nats,
    pbs_attn,
)

__all__ = ["PRESETS", "About", "Preset", "preset", "semantics_of", *(constructor.__name__ for constructor in PRESETS)]
