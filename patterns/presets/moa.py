"""MoA: heads whose span grows with the length."""

from __future__ import annotations

from sparsify.errors import PatternError
from sparsify.patterns.block_window import block_window
from sparsify.patterns.causal import causal
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets.preset import preset, whole
from sparsify.patterns.sinks import sinks

BLOCK = 64


@preset(
    source="Fu et al., arXiv 2406.14909; thu-nics/MoA",
    phase="prefill",
    semantics="approx",
    cost="span keys for each query, the sink block of 64 among them",
    omits="the span's being fixed at prefill (here it grows with N at decode, too) and the flat cache by heads",
    example={"alpha": 0, "beta": 0.25, "max_new": 0},
    length=2048,
)
def moa_head(alpha: int = 0, beta: float = 0.5, max_new: int = 1024) -> Pattern:
    """k <= q and (k // 64 < 1 or q // 64 - k // 64 < span / 64 - 1), with span = alpha + beta (N + max_new).

    The span is that of the run time: at most N + max_new, at least 128, rounded up to blocks of 64 keys, and with the
    sink block in it. (The search's own block map has one block more of local keys for the same alpha and beta.)
    """
    _number(alpha, "alpha", -(2**30), 2**30)
    _number(beta, "beta", 0, 1)
    whole(max_new, "moa_head.max_new", low=0)
    total = f"(N + {max_new})"
    span = f"min(floor({alpha} + {beta!r} * {total}), {total})"
    return (sinks(BLOCK) | block_window(BLOCK, f"max(ceil({span} / {BLOCK}), 2) - 1")) & causal()


def _number(value: object, field: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise PatternError(f"moa_head.{field}: expected a number from {low} to {high}, found {value!r}")
