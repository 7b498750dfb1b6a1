"""Keys sorted before they are chosen: PBS-Attn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.errors import PatternError
from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, whole
from sparsify.patterns.select import select
from sparsify.patterns.selector_checks import number

if TYPE_CHECKING:
    import numpy as np


def _masks(pattern: Pattern, q_len: int, k_len: int) -> np.ndarray:
    """What made-up queries and keys keep."""
    import torch

    from sparsify.codegen import Launch
    from sparsify.codegen.oracle import kept_tokens
    from sparsify.functional_plan import plan
    from sparsify.program import Program
    from sparsify.selection.site import select as lists

    heads, size = pbs_attn.about.heads, 16  # type: ignore[attr-defined]
    g = torch.Generator().manual_seed(0)
    text, asks, _ = plan(
        (pattern.rule,) * heads, (0, None, None, "q - N + Nq"), ((), 0), heads, heads, q_len == 1, "cpu"
    )
    q, k = (torch.randn(1, heads, n, size, generator=g) for n in (q_len, k_len))
    loads = [load for ask in asks for load in lists(q, k, [], None, k_len - q_len, size**-0.5, ask)]
    launch = Launch(Program.parse(text), q, k, k, tuple(loads), k_len - q_len, size**-0.5)
    return kept_tokens(launch)[0].numpy()


@preset(
    source="arXiv 2510.21270; xinghaow99/pbs-attn",
    phase="prefill",
    semantics="approx",
    cost="its own segment, and the blocks that hold `share` of the attention between means of blocks",
    omits="an order for each query head where key heads are shared (here it is the key head's, by the mean over its "
    "query heads), and the zeros with which the released code fills up the last block before it takes its mean",
    heads=2,
    masks=_masks,
)
def pbs_attn(share: float = 0.9, block: int = 128, segment: int = 256, last: int = 128) -> Pattern:
    """k <= q, and k's segment is q's, or k is in a block of sorted keys that q's block chooses.

    Keys are sorted inside each segment by the mean attention of the `last` queries, and each block of queries chooses
    the fewest blocks of earlier segments that hold this share of the softmax between the means of blocks; the block
    that holds the first token is kept beside them.
    """
    side, of = whole(block, "pbs_attn.block"), whole(segment, "pbs_attn.segment")
    if of % side:
        raise PatternError(f"pbs_attn.segment: expected a multiple of the block of {side}, found {of}")
    chosen = select(
        budget={"rule": "topp", "value": number(share, "pbs_attn.share", 0.0, 1.0, above=True)},
        unit={"q": side, "k": side},
        score={"qview": "mean", "kview": "mean", "norm": "softmax"},
        heads={"scope": "head"},
        force={"sink": 1, "of": "tokens"},
        permute={"segment": of, "qview": f"last({whole(last, 'pbs_attn.last')})"},
        phase="prefill",
    )
    return chosen & causal()
