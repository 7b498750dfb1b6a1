"""Blocks and lines at prefill: MInference, FlexPrefill, XAttention, FlashPrefill, DHSA."""

from __future__ import annotations

from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, share, whole
from sparsify.patterns.select import select

HEAD = {"scope": "head"}
MEANS = {"qview": "mean", "kview": "mean"}


@preset(
    source="Jiang et al., arXiv 2407.02490; microsoft/MInference (vertical_and_slash)",
    phase="prefill",
    semantics="approx",
    cost="the blocks that the slashes touch and verticals keys for each query, and all keys for the last queries",
    omits="the search that gives a head its class and numbers; its ranges begin anywhere, these at multiples of 64",
    example={"verticals": 30, "slashes": 100, "first": 8, "last_slashes": 40},
)
def minference_lines(
    verticals: int = 1000, slashes: int = 6096, queries: int = 64, first: int = 30, last_slashes: int = 100
) -> Pattern:
    """Whole columns and whole diagonals with the greatest attention of the last 64 queries, the same for every query.

    At least 30 columns, the first 30 among them, and 50 diagonals, the 100 nearest to the query among them. A diagonal
    is kept in blocks of 64 x 64.
    """
    columns = max(whole(verticals, "minference_lines.verticals"), 30)
    diagonals = max(whole(slashes, "minference_lines.slashes"), 50)
    lines = {
        "verticals": columns, "slashes": diagonals,
        "first": min(whole(first, "minference_lines.first", low=0), columns),
        "last": min(whole(last_slashes, "minference_lines.last_slashes", low=0), diagonals),
    }  # fmt: skip
    score = {"qview": f"last({whole(queries, 'minference_lines.queries')})", "norm": "softmax"}
    return select(lines=lines, unit={"q": 64, "k": 64}, score=score, heads=HEAD, phase="prefill") & causal()


@preset(
    source="Jiang et al., arXiv 2407.02490; microsoft/MInference (block_sparse)",
    phase="prefill",
    semantics="approx",
    cost="blocks * block keys for each query, and the means of blocks",
    omits="the search that gives a head this class",
    example={"blocks": 5, "block": 32},
)
def minference_blocks(blocks: int = 100, block: int = 64) -> Pattern:
    """The `blocks` blocks with the greatest product of mean queries and mean keys, the diagonal one counted."""
    size = whole(block, "minference_blocks.block")
    chosen = select(
        budget={"rule": "topk", "value": whole(blocks, "minference_blocks.blocks", low=2)},
        unit={"q": size, "k": size}, score=MEANS, heads=HEAD, force={"local": 1, "counted": True}, phase="prefill",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Lai et al., arXiv 2502.20766; bytedance/FlexPrefill",
    phase="prefill",
    semantics="approx",
    cost="whatever holds gamma of the attention, least keys of columns and diagonals at least",
    omits="nothing; block heads keep the block that takes their sum past gamma, too (the released code leaves it out)",
    example={"gamma": 0.5, "least": 64, "block": 32},
)
def flex_prefill(gamma: float = 0.9, tau: float = 0.1, least: int = 1024, block: int = 128) -> Pattern:
    """Columns and diagonals of blocks, as many as cover gamma of the last queries' attention, or the blocks that do.

    A head takes the blocks where the root of the Jensen-Shannon divergence between the last block's attention and that
    of its mean query to mean keys is below tau: the fewest that hold gamma of softmax(mean q · mean k) over all rows
    together, and `least` keys of columns and diagonals. The first column and the diagonal are kept by all.
    """
    size = whole(block, "flex_prefill.block")
    lines = {
        "cover": share(gamma, "flex_prefill.gamma"), "first": 1, "last": 1,
        "least": -(-whole(least, "flex_prefill.least") // size),
        "switch": share(tau, "flex_prefill.tau", low=0.0),
    }  # fmt: skip
    chosen = select(
        budget={"rule": "topp", "value": gamma, "per": "head"}, lines=lines, unit={"q": size, "k": size},
        score={"qview": f"last({size})", "norm": "softmax"}, heads=HEAD, phase="prefill",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Xu et al., arXiv 2503.16428; mit-han-lab/x-attention",
    phase="prefill",
    semantics="approx",
    cost="the blocks that hold tau of the estimate, and all keys against 1/stride of the queries' products",
    omits="the table of tau by head that its dynamic programme finds",
    example={"tau": 0.6, "stride": 8, "block": 32},
)
def x_attention(tau: float = 0.9, stride: int = 16, block: int = 128) -> Pattern:
    """The fewest blocks that hold tau of the estimated attention, the first and the diagonal one counted first.

    The estimate is a softmax over groups of `stride` keys of the sum of an anti-diagonal of q·k in each pair of groups,
    over sqrt(d) * stride, summed over a block.
    """
    size = whole(block, "x_attention.block")
    score = {"kview": f"strided({whole(stride, 'x_attention.stride')})", "norm": "softmax"}
    chosen = select(
        budget={"rule": "topp", "value": share(tau, "x_attention.tau")}, unit={"q": size, "k": size}, score=score,
        heads=HEAD, force={"sink": 1, "local": 1, "counted": True}, phase="prefill",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="FlashPrefill, qhfan/FlashPrefill (alpha 0.08 Qwen2, 0.12 Qwen3-MoE, 0.18 Llama)",
    phase="prefill",
    semantics="approx",
    cost="the blocks that reach alpha of the best, and the mean keys of blocks for every query; no sort",
    example={"alpha": 0.4, "block": 32},
)
def flash_prefill(
    alpha: float = 0.12, block: int = 128, sinks: int = 2, local: int = 4, last_rows: int = 2, least: int = 0
) -> Pattern:
    """Blocks whose sum of exp(q·(mean key)) over a block of queries is at least alpha of the row's greatest.

    Only blocks that lie wholly before a query count for it. The first `sinks` and the latest `local` blocks are kept
    beside them, `least` blocks at least, and everything in the last rows of blocks.
    """
    size = whole(block, "flash_prefill.block")
    force = {
        name: whole(value, f"flash_prefill.{field}", low=0)
        for name, field, value in (
            ("sink", "sinks", sinks), ("local", "local", local), ("last_rows", "last_rows", last_rows)
        )
    }  # fmt: skip
    chosen = select(
        budget={
            "rule": "relmax", "value": share(alpha, "flash_prefill.alpha"),
            "min": whole(least, "flash_prefill.least", low=0),
        },
        unit={"q": size, "k": size}, score={"kview": "mean", "norm": "exp_rowmax", "causal": "past"}, heads=HEAD,
        force=force, phase="prefill",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="DHSA, the training-free second version",
    phase="prefill",
    semantics="approx",
    cost="density of the keys, and the means of blocks",
    omits="the first version's learned boundaries, and its A-shape and line variants (a_shape, minference_lines)",
    example={"density": 0.25},
)
def dhsa(density: float = 0.125, queries: int = 128, block: int = 32) -> Pattern:
    """The share `density` of the blocks by the product of mean queries and mean keys, averaged over all heads.

    One set serves the layer; the first block and those of the queries themselves are counted.
    """
    chosen = select(
        budget={"rule": "ratio", "value": share(density, "dhsa.density")},
        unit={"q": whole(queries, "dhsa.queries"), "k": whole(block, "dhsa.block")}, score=MEANS,
        heads={"scope": "layer", "op": "mean"}, force={"sink": 1, "local": 1, "counted": True}, phase="prefill",
    )  # fmt: skip
    return chosen & causal()
