"""Selections that a model is trained with, and gates: MoBA, NSA, VSA, SeerAttention, NAtS."""

from __future__ import annotations

from sparsify.errors import PatternError
from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, share, whole
from sparsify.patterns.select import lifetimes, select


@preset(
    source="Lu et al., arXiv 2502.13189; MoonshotAI/MoBA",
    phase="train",
    semantics="native",
    cost="keep * chunk keys for each query, and one mean key for each chunk",
    omits="last layers that are kept dense (say so in the spec)",
    example={"keep": 3, "chunk": 64},
)
def moba(keep: int = 12, chunk: int = 4096) -> Pattern:
    """For each query and head the `keep` chunks with the greatest q·(mean key), its own chunk counted."""
    chosen = select(
        budget={"rule": "topk", "value": whole(keep, "moba.keep")}, unit={"k": whole(chunk, "moba.chunk")},
        score={"kview": "mean"}, heads={"scope": "head"}, force={"local": 1, "counted": True}, semantics="native",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Yuan et al., arXiv 2502.11089; fla-org/native-sparse-attention (mean compression)",
    phase="train",
    semantics="native",
    cost="keep * block keys for each query, and one mean key for each block",
    omits="the compressed and the window branch and their gates, and learned or overlapping compression: blocks of "
    "keys are compressed to their means, as fla does",
    example={"keep": 5, "block": 32},
)
def nsa_selection(keep: int = 16, block: int = 64) -> Pattern:
    """The `keep` blocks with the greatest softmax(q·(mean key)), summed over the kv_group; first and last two counted.

    The softmax is over blocks that lie wholly before the query.
    """
    count = whole(keep, "nsa_selection.keep", low=3)
    chosen = select(
        budget={"rule": "topk", "value": count}, unit={"k": whole(block, "nsa_selection.block")},
        score={"kview": "mean", "norm": "softmax", "causal": "past"},
        heads={"scope": "kv_group", "op": "sum", "when": "token"},
        force={"sink": 1, "local": 2, "counted": True}, semantics="native",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Zhang et al., arXiv 2505.13389; hao-ai-lab/FastVideo (video sparse attention)",
    phase="train",
    semantics="native",
    cost="1 - sparsity of the keys, and the means of tiles",
    omits="the coarse branch and its gate, the order of tokens by 4 x 4 x 4 tiles, and tiles of text that are exempt",
    example={"sparsity": 0.75, "tile": 32},
)
def vsa(sparsity: float = 0.9, tile: int = 64) -> Pattern:
    """For each tile of queries and head the share 1 - sparsity of tiles, by the product of mean queries and keys."""
    part = round(1 - share(sparsity, "vsa.sparsity"), 6)
    if part <= 0:
        raise PatternError(f"vsa.sparsity: expected a number below 1, found {sparsity}")
    size = whole(tile, "vsa.tile")
    return select(
        budget={"rule": "ratio", "value": part}, unit={"q": size, "k": size},
        score={"qview": "mean", "kview": "mean"}, heads={"scope": "head"}, semantics="native",
    )  # fmt: skip


@preset(
    source="Gao et al., arXiv 2410.13276; microsoft/SeerAttention",
    phase="prefill",
    semantics="approx",
    cost="the blocks whose gate is open, and the gate on the means of blocks",
    omits="the gate itself: the module `gate` is given with the model",
    example={"threshold": 0.05, "block": 32},
)
def seer_attention(threshold: float = 0.002, block: int = 64, gate: str = "seer_attention") -> Pattern:
    """The blocks that a learned gate scores at `threshold` or more, each head for itself; the last row keeps all."""
    size = whole(block, "seer_attention.block")
    chosen = select(
        budget={"rule": "threshold", "value": share(threshold, "seer_attention.threshold")},
        unit={"q": size, "k": size}, learned=gate, heads={"scope": "head"}, force={"last_rows": 1}, phase="prefill",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="NAtS (Neural Attention Search); automl/NeuralAttentionSearch",
    phase="train",
    semantics="native",
    cost="the global keys, the local ones since the last of those and window + 1 keys for each query, and the types",
    omits="the scorer itself: the module `types` is given with the model; its training, and dropping keys from memory "
    "(here they stay, and are skipped)",
    example={"window": 64},
)
def nats(window: int = 256, types: str = "nats") -> Pattern:
    """k <= q and (k is global, or local and q <= the next global key of its head, or q - k <= window).

    A module gives each key of each key head one of the three types.
    """
    return lifetimes(types, whole(window, "nats.window", low=0)) & causal()
