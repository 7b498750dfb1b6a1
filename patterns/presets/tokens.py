"""Single keys: TidalDecode, LessIsMore, TokenSelect."""

from __future__ import annotations

from typing import Any

from sparsify.errors import PatternError
from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, share, whole
from sparsify.patterns.select import select


def _skeleton(name: str, reselect: int, layers: int) -> dict[str, Any]:
    """TidalDecode's layers: 0 and 1 dense, 2 and one more choose and are dense, all others take the latest choice."""
    count, middle = whole(layers, f"{name}.layers", low=4), whole(reselect, f"{name}.reselect", low=4)
    if middle >= count - 1:
        raise PatternError(f"{name}.reselect: expected a layer before the last, {count - 1}, found {middle}")
    takers = {"2": f"3-{middle - 1}", str(middle): f"{middle + 1}-{count - 1}"}
    return {"dense_layers": "0-1", "reuse": {"layers": takers, "source": "dense"}}


@preset(
    source="Yang et al., arXiv 2410.05076; DerrickYLJ/TidalDecode",
    phase="decode",
    semantics="approx",
    cost="tokens keys for each query; at the two selecting layers all keys, twice",
    omits="the correction of the cache, which is off in its experiments",
    example={"tokens": 64},
)
def tidal_decode(tokens: int = 256, reselect: int = 13, layers: int = 32) -> Pattern:
    """The tokens with the greatest q·k, each head for itself.

    Layers 0 and 1 are dense; layer 2 and layer `reselect` choose and are dense; all others take the latest choice.
    """
    chosen = select(
        budget={"rule": "topk", "value": whole(tokens, "tidal_decode.tokens")}, heads={"scope": "head"},
        phase="decode", **_skeleton("tidal_decode", reselect, layers),
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Yang et al., arXiv 2508.07101 (LessIsMore); its released code",
    phase="decode",
    semantics="approx",
    cost="tokens keys for each query; at the two selecting layers all keys, twice",
    omits="nothing but the optional sinks, which compose: less_is_more() | sinks(4)",
    example={"tokens": 96},
)
def less_is_more(tokens: int = 1024, recent: float = 0.25, reselect: int = 13, layers: int = 32) -> Pattern:
    """The latest recent * tokens keys, and from the rest each head's best in turn until `tokens` are kept by all.

    Heads are merged rank by rank: every head's best key, then every head's second, without repeats; one set serves the
    layer. Layers as in tidal_decode.
    """
    count = whole(tokens, "less_is_more.tokens", low=2)
    local = int(share(recent, "less_is_more.recent") * count)
    if not 0 < local < count:
        raise PatternError(f"less_is_more.recent: {recent} of {count} tokens leaves nothing for one of the two parts")
    chosen = select(
        budget={"rule": "topk", "value": count - local}, score={"domain": "middle"}, force={"local": local},
        heads={"scope": "layer", "op": "best_rank"}, phase="decode", **_skeleton("less_is_more", reselect, layers),
    )  # fmt: skip
    return chosen & causal()


@preset(
    source="Wu et al., arXiv 2411.02886; pzs19/TokenSelect",
    phase="both",
    semantics="approx",
    cost="tokens + sinks + local keys for each query, and all keys once for each chunk of queries",
    omits="keys stored without rotation and turned at their place in the compacted list (length extrapolation)",
    example={"tokens": 64, "sinks": 16, "local": 48, "chunk": 64},
)
def token_select(
    tokens: int = 2048,
    sinks: int = 128,
    local: int = 512,
    chunk: int = 512,
    smooth: int = 1,
    cosine: float | None = None,
) -> Pattern:
    """The tokens with the greatest sum over heads of softmax(q·k), the softmax over those between sinks and local ones.

    A chunk of queries has one mean query; one set serves the layer. The first `sinks` and the latest `local` keys are
    kept beside it. smooth: the greatest of so many neighbours counts. cosine: a choice holds while the mean query is
    as similar to that of the choice.
    """
    width = whole(smooth, "token_select.smooth")
    if width % 2 == 0:
        raise PatternError(f"token_select.smooth: expected an odd width, found {width}")
    score = {"qview": "mean", "norm": "softmax", "domain": "middle"} | (
        {"smooth": f"max({width})"} if width > 1 else {}
    )
    chosen = select(
        budget={"rule": "topk", "value": whole(tokens, "token_select.tokens")},
        unit={"q": whole(chunk, "token_select.chunk")}, score=score,
        heads={"scope": "layer", "op": "sum", "when": "token"},
        force={"sink": whole(sinks, "token_select.sinks"), "local": whole(local, "token_select.local")},
        reuse=None if cosine is None else {"cosine": cosine},
    )  # fmt: skip
    return chosen & causal()
