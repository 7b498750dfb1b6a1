"""Tiles skipped by their weight: SpargeAttn's selection and BLASST."""

from __future__ import annotations

from sparsify.errors import PatternError
from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, share, whole
from sparsify.patterns.select import online, select


@preset(
    source="Zhang et al., arXiv 2502.18137; thu-ml/SpargeAttn",
    phase="prefill",
    semantics="approx",
    cost="the blocks that hold `mass` of the pooled attention, those of low self-similarity, and the means of blocks",
    omits="the second stage, int8 and fp8 products, the subtraction of the mean key and the table by head; the block "
    "that takes a row's sum past `mass` is kept, too (the released code leaves it out)",
    example={"mass": 0.6, "similarity": 0.05, "queries": 64, "block": 32},
)
def sparge_attention(mass: float = 0.98, similarity: float = 0.6, queries: int = 128, block: int = 64) -> Pattern:
    """The fewest blocks that hold `mass` of softmax(mean q · mean k) in a row, and all that are little like themselves.

    A block of queries or keys whose mean cosine to itself is below `similarity` keeps its row or column, and its column
    is left out of the softmax. Each head chooses for itself; not causal by itself.
    """
    if isinstance(similarity, bool) or not isinstance(similarity, int | float) or not -1 <= similarity <= 1:
        raise PatternError(f"sparge_attention.similarity: expected a number from -1 to 1, found {similarity!r}")
    return select(
        budget={"rule": "topp", "value": share(mass, "sparge_attention.mass"), "min": 1},
        unit={"q": whole(queries, "sparge_attention.queries"), "k": whole(block, "sparge_attention.block")},
        score={"qview": "mean", "kview": "mean", "norm": "softmax", "domain": "middle"}, heads={"scope": "head"},
        force={"exempt": similarity}, phase="prefill",
    )  # fmt: skip


@preset(
    source="BLASST, arXiv 2512.12087; skip-softmax in TensorRT-LLM (scale 1000 at prefill, 500 at decode)",
    phase="both",
    semantics="approx",
    cost="all keys; values and softmax only of tiles that weigh enough",
    omits="the calibration of the scale",
)
def blasst(scale: float = 1000.0) -> Pattern:
    """k <= q, but a tile of keys whose greatest score is below the running maximum + log(scale / N) is skipped."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise PatternError(f"blasst.scale: expected a number above 0, found {scale!r}")
    return online(float(scale), by_length=True) & causal()
