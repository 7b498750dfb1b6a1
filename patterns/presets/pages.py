"""Pages of keys: Quest, Kinetics, DELTA, SeerAttention-R at decode, LongHeads and HiP."""

from __future__ import annotations

from typing import Literal

from sparsify.errors import PatternError
from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import choice, preset, whole
from sparsify.patterns.select import select

BOUND = {"kview": "minmax", "combine": "upper_bound"}


@preset(
    source="Tang et al., arXiv 2406.10774; mit-han-lab/Quest; scope=kv_group as in sparse-frontier",
    phase="decode",
    semantics="approx",
    cost="budget + page keys for each query, and the bounds of all pages: 2/page of the keys",
    omits="the page table (pages are blocks of positions) and bounds kept from step to step",
    example={"budget": 128},
)
def quest(budget: int = 1024, page: int = 16, scope: Literal["head", "kv_group"] = "head") -> Pattern:
    """The max(3, budget / page) pages whose bound on q·k is greatest, and the last page.

    A page's bound is the sum over channels of max(q_d min_d, q_d max_d), min and max over its keys. Each head chooses
    for itself, or a kv_group by the sum of its heads' bounds. Layers 0 and 1 are dense.
    """
    size = whole(page, "quest.page")
    pages = max(3, whole(budget, "quest.budget") // size)
    group = choice(scope, "quest.scope", ("head", "kv_group")) == "kv_group"
    chosen = select(
        budget={"rule": "topk", "value": pages}, unit={"k": size}, score=BOUND,
        heads={"scope": "kv_group", "op": "sum"} if group else {"scope": "head"},
        force={"local": 1}, phase="decode", dense_layers="0-1",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Sadhukhan et al., arXiv 2506.05333; Infini-AI-Lab/Kinetics",
    phase="decode",
    semantics="approx",
    cost="(pages + 2) * page keys for each query, and one mean key for each page",
    omits="the page table (pages are blocks of positions) and means kept from step to step",
    example={"pages": 6},
)
def kinetics(pages: int = 64, page: int = 16) -> Pattern:
    """The pages with the greatest q·(mean key), averaged over a kv_group's heads, and the first and the last page.

    The first page holds the 4 sink tokens. Layer 0 is dense.
    """
    chosen = select(
        budget={"rule": "topk", "value": whole(pages, "kinetics.pages")},
        unit={"k": whole(page, "kinetics.page", low=4)}, score={"kview": "mean"},
        heads={"scope": "kv_group", "op": "mean"}, force={"sink": 1, "local": 1},
        phase="decode", dense_layers="0",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="DELTA (Dynamic Layer-Aware Token Attention); the released code's planner",
    phase="decode",
    semantics="approx",
    cost="pages * page keys for each query; at planner layers all keys, twice",
    omits="probabilities out of the planner's own kernel (they are computed again) and the page table",
    example={"pages": 10, "local": 3},
)
def delta(
    pages: int = 64, local: int = 8, page: int = 16, planners: tuple[int, ...] = (2, 14, 22), layers: int = 48
) -> Pattern:
    """The pages with the greatest sum over tokens of the greatest attention that any head pays, the last ones counted.

    Planner layers choose and are dense, as are those before the first; each layer takes the choice of the nearest
    planner before it.
    """
    kept, last = whole(pages, "delta.pages"), whole(local, "delta.local", low=0)
    if last > kept:
        raise PatternError(f"delta.local: expected at most the {kept} pages, found {last}")
    places = _planners(planners, whole(layers, "delta.layers"))
    ends = [*places[1:], layers]
    takers = {str(a): f"{a + 1}-{b - 1}" for a, b in zip(places, ends, strict=True) if b - a > 1}
    force = {"local": last, "counted": True} if last else {}
    chosen = select(
        budget={"rule": "topk", "value": kept}, unit={"k": whole(page, "delta.page")}, score={"norm": "softmax"},
        heads={"scope": "layer", "op": "max", "when": "token"}, force=force, phase="decode",
        reuse={"layers": takers, "source": "dense"}, dense_layers=f"0-{places[0] - 1}" if places[0] else None,
    )  # fmt: skip
    return chosen & causal()


def _planners(planners: object, layers: int) -> list[int]:
    places = list(planners) if isinstance(planners, list | tuple) else [planners]
    whole_numbers = [whole(place, "delta.planners", low=0) for place in places]
    if not places or whole_numbers != sorted(set(whole_numbers)) or whole_numbers[-1] >= layers:
        raise PatternError(f"delta.planners: expected ascending layers below delta.layers = {layers}, found {places}")
    return whole_numbers


@preset(
    source="Gao et al., arXiv 2506.08889; microsoft/SeerAttention (SeerAttention-R)",
    phase="decode",
    semantics="approx",
    cost="tokens + 2 * block keys for each query, and the gate's compressed keys",
    omits="the gate itself: the module `gate` is given with the model; start_layer",
    example={"tokens": 128, "block": 16},
)
def seer_attention_decode(tokens: int = 4096, block: int = 64, gate: str = "seer_attention") -> Pattern:
    """The tokens / block blocks that a learned gate scores highest for each kv_group, and the first and last block."""
    size = whole(block, "seer_attention_decode.block")
    count = max(1, whole(tokens, "seer_attention_decode.tokens") // size)
    chosen = select(
        budget={"rule": "topk", "value": count}, unit={"k": size}, learned=gate, force={"sink": 1, "local": 1},
        phase="decode",
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Lu et al., arXiv 2402.10685; LuLuLuyi/LongHeads",
    phase="both",
    semantics="approx",
    cost="tokens keys for each query, and one landmark for each chunk",
    omits="positions inside the window of training, offload, and its landmark's weights, which are those of the mean "
    "of the chunk's own attention output (here of its mean key)",
    example={"tokens": 256, "chunk": 32},
)
def long_heads(tokens: int = 4096, chunk: int = 256) -> Pattern:
    """Each head's tokens / chunk best chunks by q·landmark: the first, the last two and those with the best landmarks.

    A landmark is the sum of the chunk's keys, weighted by a softmax of their products with the mean key.
    """
    size = whole(chunk, "long_heads.chunk")
    count = whole(tokens, "long_heads.tokens") // size
    if count < 3:
        raise PatternError(f"long_heads.tokens: expected at least 3 chunks of {size}, found {tokens}")
    chosen = select(
        budget={"rule": "topk", "value": count}, unit={"k": size}, score={"kview": "attn_pool"},
        heads={"scope": "head"}, force={"sink": 1, "local": 2, "counted": True},
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Lee et al., arXiv 2406.09827 and 2502.08910 (InfiniteHiP); DeepAuto-AI/hip-attention",
    phase="both",
    semantics="approx",
    cost="tokens + sinks + local keys for each query, and 2 log2(chunk) keys of each chunk for each block of queries",
    omits="the coarser stages that leave 32768 and 8192 tokens in chunks of 256 and 32, so that all keys are searched "
    "in chunks of the last stage; choices that hold for 32, 16 and 8 steps by stage; offload, and positions inside the "
    "compacted list (length extrapolation); the last layer, which it keeps dense (name it in dense_layers)",
    example={"tokens": 96, "sinks": 16, "local": 64},
)
def hip(
    tokens: int = 2048,
    chunk: int = 8,
    queries: int = 64,
    sinks: int = 256,
    local: int = 1024,
    dense_layers: int | str | list[int | str] | None = "0-3",
) -> Pattern:
    """The tokens / chunk chunks whose representatives have the greatest q·k of any head and query of a block.

    A head finds a chunk's representative by halving: log2(chunk) times it goes on with the half whose middle key has
    the greater q·k with any query of the block. One set serves the layer; the first `sinks` and the latest `local` keys
    are kept beside it.
    """
    size = whole(chunk, "hip.chunk")
    count = whole(tokens, "hip.tokens") // size
    if count < 1:
        raise PatternError(f"hip.tokens: expected at least one chunk of {size}, found {tokens}")
    force = {"sink": whole(sinks, "hip.sinks", low=0), "local": whole(local, "hip.local", low=0)}
    chosen = select(
        budget={"rule": "topk", "value": count}, unit={"q": whole(queries, "hip.queries"), "k": size},
        score={"kview": "rep_search", "pool": "max"}, heads={"scope": "layer", "op": "max"},
        force=force | ({"of": "tokens"} if any(force.values()) else {}), dense_layers=dense_layers,
    )  # fmt: skip
    return chosen & causal()
