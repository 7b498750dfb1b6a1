"""Crossover: leave a site to Inductor where dense attention is faster than a kernel of ours would be.

The rule is one comparison: what a rewrite saves on the pairs, against what a launch costs.

    pairs * (dense - density * ours) > LAUNCH,   in nanoseconds a pair (batch, head, query, key)

The costs of a pair are linear in the head size. They were chosen, by eye, from medians of interleaved calls of
F.scaled_dot_product_attention and of the op on one machine (AMD EPYC Zen 5, two cores, AVX-512, torch 2.13) over
batches 1 to 64, 2 to 32 heads, head sizes 16 to 128 and 8 to 2048 keys: with full density, causal, and with a padding
mask. Beyond the launch our kernels were faster at every density, so only small sites and decode steps without
grouped heads (both then read the cache once, and that is all there is to do) are left. Other targets than C++ have not
been measured: their sites are all rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsify.passes.density import density_of
from sparsify.passes.nodes import dtype, shape
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site

LAUNCH = 60_000.0  # ns: the op's call, packing, and what small tiles lose
FEW = 8  # fewer queries than this are a decode step, which waits for memory
LONG, ONE = 4096, 1  # what a symbolic length and a symbolic batch are taken for: never the sizes of a first call


@dataclass(frozen=True)
class Cost:
    """Nanoseconds of a pair: `fixed + by_size * head size`."""

    fixed: float
    by_size: float

    def at(self, head_dim: int) -> float:
        return self.fixed + self.by_size * head_dim


# (dense, ours), for many queries and for few. Dense attention is no faster in 16 bits than in 32 on that machine.
WIDE = (Cost(0.5, 0.022), Cost(0.25, 0.011))
NARROW = (Cost(0.7, 0.025), Cost(0.2, 0.004))
WIDE_FEW = (Cost(0.0, 0.11), Cost(0.0, 0.15))
NARROW_FEW = (Cost(0.0, 0.9), Cost(0.0, 0.12))


@dataclass(frozen=True)
class Crossover:
    """Sites to which a spec gives nothing, to Inductor where it is faster.

    Before: sites with their targets.
    After:  `site.dense` says why, where dense attention wins; such a site is no longer open.

    enabled: whether to do so.
    """

    enabled: bool = True

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites() if self.enabled else ():
            if site.target == "cpp" and set(site.programs) == {site.keep}:
                site.dense = why_dense(site)


def why_dense(site: Site) -> str:
    """Why the attention is faster as it stands; "" where it isn't."""
    batch, heads, q_len, head_dim = _sizes(site.q)
    kv_heads, k_len = _sizes(site.k)[1:3]
    offset = site.q_offset if isinstance(site.q_offset, int) else k_len - q_len
    density = density_of((site.keep,), q_len, k_len, offset)
    wide, few = dtype(site.q) == torch.float32, q_len < FEW
    dense, ours = (WIDE_FEW if wide else NARROW_FEW) if few else (WIDE if wide else NARROW)
    shared = heads // kv_heads if few else 1  # the queries of a group read each key once
    saved = batch * heads * q_len * k_len * (dense.at(head_dim) - density * ours.at(head_dim) / shared)
    if saved > LAUNCH:
        return ""
    what = "a decode step" if few else f"{q_len} queries"
    if saved <= 0:
        return f"dense is as fast for {what} over {k_len} keys of which {density:.0%} are kept"
    pairs = f"{what} over {k_len} keys"
    return f"dense is faster for {pairs}: a kernel saves {saved / 1e3:.0f} µs on them and costs {LAUNCH / 1e3:.0f}"


def _sizes(node: Any) -> tuple[int, int, int, int]:
    """(batch, heads, length, size) of q or k, symbolic ones by what they may grow to."""
    batch, heads, length, size = shape(node)
    return (
        batch if isinstance(batch, int) else ONE,
        heads,
        length if isinstance(length, int) else LONG,
        size,
    )
