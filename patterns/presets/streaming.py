"""Heads with sinks and the latest keys: StreamingLLM, DuoAttention, RazorAttention, MInference's A-shape, BASED."""

from __future__ import annotations

from typing import Literal

from sparsify.patterns.block_window import block_window
from sparsify.patterns.causal import causal
from sparsify.patterns.expression import expr
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import Sized, choice, flag, preset, size, whole
from sparsify.patterns.select import compensation as mean_key
from sparsify.patterns.sinks import sinks as first
from sparsify.patterns.window import window

TRAIN_BLOCK = 128  # DuoAttention trains its gates with a block-sparse kernel of this granularity


@preset(
    source="Xiao et al., arXiv 2309.17453; mit-han-lab/streaming-llm",
    phase="both",
    semantics="approx",
    cost="sinks + recent keys for each query, whatever N is",
    omits="positions inside the cache (here keys keep their own positions) and dropping keys from memory",
    example={"sinks": 4, "recent": 256},
)
def streaming_llm(sinks: Sized = 4, recent: Sized = 2000) -> Pattern:
    """k <= q and (k < sinks or q - k < recent): the first keys and the latest."""
    near = window(size(recent, "streaming_llm.recent"))
    return (first(size(sinks, "streaming_llm.sinks", low=0)) | near) & causal()


@preset(
    source="Xiao et al., arXiv 2410.10819; mit-han-lab/duo-attention",
    phase="both",
    semantics="approx",
    cost="sinks + recent keys for each query; with mask=chunked its own chunk, too",
    omits="which heads these are (the learned gates) and the cache of sinks + recent keys",
)
def duo_streaming(
    mask: Literal["deploy", "train", "chunked"] = "deploy",
    sinks: int | None = None,
    recent: int = 256,
    chunk: int = 32768,
) -> Pattern:
    """k <= q and (k < sinks or q - k < recent), the paper's streaming head; `mask` names one of its three masks.

    deploy: that rule, sinks 64; train: sinks 128, in blocks of 128 keys; chunked: what the deployed code runs at
    prefill, k < sinks or k >= c - recent where c is the first position of q's chunk, so that a prompt of one chunk is
    dense.
    """
    choice(mask, "duo_streaming.mask", ("deploy", "train", "chunked"))
    kept = (128 if mask == "train" else 64) if sinks is None else whole(sinks, "duo_streaming.sinks", low=0)
    near, long = whole(recent, "duo_streaming.recent"), whole(chunk, "duo_streaming.chunk")
    if mask == "train":
        blocks = block_window(TRAIN_BLOCK, -(-near // TRAIN_BLOCK))
        return (first(-(-kept // TRAIN_BLOCK) * TRAIN_BLOCK) | blocks) & causal()
    tail = window(near) if mask == "deploy" else expr(f"k >= q // {long} * {long} - {near}")
    return (first(kept) | tail) & causal()


@preset(
    source="Tang et al., arXiv 2407.15891; ports in msModelSlim and MindSpore golden-stick (4, 256)",
    phase="decode",
    semantics="approx",
    cost="sinks + recent keys for each query: a fifth of N, and 4000 at least; compensation reads all keys and values",
    omits="which heads these are and dropping keys from memory (the system takes the means once, after the prefill; "
    "here each step does, of all keys that its window has left behind)",
    example={"sinks": 4, "recent": "max(64, N/5)"},
)
def razor_head(sinks: Sized = 4, recent: Sized = "max(4000, N/5)", compensation: bool = True) -> Pattern:
    """k <= q and (k < sinks or q - k < recent): a head that is no retrieval head.

    With `compensation` the dropped keys join as one: their mean, with the mean of their values, weighted by their
    number.
    """
    near = window(size(recent, "razor_head.recent"))
    kept = (first(size(sinks, "razor_head.sinks", low=0)) | near) & causal()
    return kept & mean_key() if flag(compensation, "razor_head.compensation") else kept


@preset(
    source="Jiang et al., arXiv 2407.02490; microsoft/MInference (n_init, n_local)",
    phase="prefill",
    semantics="approx",
    cost="sinks + local keys for each query",
    omits="the search that gives a head this shape",
    example={"sinks": 64, "local": 192},
)
def a_shape(sinks: Sized = 128, local: Sized = 3968) -> Pattern:
    """k <= q and (k < sinks or q - k < local): MInference's A-shape head."""
    near = window(size(local, "a_shape.local"))
    return (first(size(sinks, "a_shape.sinks", low=0)) | near) & causal()


@preset(
    source="Arora et al., arXiv 2402.18668; HazyResearch/based (window_size 128 left of the query)",
    phase="both",
    semantics="native",
    cost="window keys for each query",
    omits="the linear attention and the convolutions of the other layers",
)
def based_window(window_size: int = 128) -> Pattern:
    """0 <= q - k <= window_size: the query and `window_size` keys before it, 129 in the released code."""
    return window(whole(window_size, "based_window.window_size", low=0) + 1)
