"""What is measured: named patterns on named shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsify import patterns as p
from sparsify.errors import InputError, nearest
from sparsify.patterns import Pattern
from sparsify.patterns.grid import grids

CAUSAL = p.causal()


def _mixture(heads: int) -> tuple[Pattern, ...]:
    """Eight unlike heads, repeated: the per-head mixture of MoA-like plans."""
    kinds = (
        CAUSAL,
        p.window(512),
        (p.sinks(64) | p.window("N/8 + 256")) & CAUSAL,
        p.block_window(64, 4) & CAUSAL,
        (p.sinks(4) | p.window(1024)) & CAUSAL,
        (p.window(128) | p.column_stride(8, block=64)) & CAUSAL,
        p.same_block(1024) & CAUSAL,
        p.window(64),
    )
    return tuple(kinds[h % len(kinds)] for h in range(heads))


# name -> what each of `heads` heads keeps; every rule is causal, as in a language model, except `full`.
PATTERNS = {
    "full": lambda heads: (p.dense(),) * heads,
    "causal": lambda heads: (CAUSAL,) * heads,
    "window512": lambda heads: (p.window(512),) * heads,
    "window1024": lambda heads: (p.window(1024),) * heads,
    "streaming": lambda heads: ((p.sinks(4) | p.window(1024)) & CAUSAL,) * heads,
    "s2_stride": lambda heads: (
        ((p.block_window(64, 16) | p.column_stride(8, block=64, offset="head")) & CAUSAL,) * heads
    ),
    "block_diagonal": lambda heads: (p.same_block(512) & CAUSAL,) * heads,
    "dilated8": lambda heads: (p.dilated(8) & CAUSAL,) * heads,
    "mixture": _mixture,
}

# name -> a neighborhood in a grid of tokens: bidirectional, and at the grid's own length.
GRIDS = {
    "near_1d": p.neighborhood(8192, 1025),
    "near_2d": p.neighborhood([64, 64], 13),
    "near_dilated": p.neighborhood([64, 64], 13, dilation=4),
    "near_3d": p.neighborhood([8, 24, 40], [4, 12, 12]),
    "near_blocks": p.neighborhood([8, 24, 40], [4, 12, 12], 4),
    "swin": p.PATTERNS["swin"]([56, 56], 7),
}
PATTERNS |= {name: lambda heads, pattern=pattern: (pattern,) * heads for name, pattern in GRIDS.items()}


@dataclass(frozen=True)
class Case:
    """One measurement: a pattern at q, k, v of (1, heads, length, head_dim), with `kv_heads` key heads.

    own: the pattern of every head itself, where `pattern` is no name of `PATTERNS`.
    """

    pattern: str
    length: int
    head_dim: int
    dtype: str
    heads: int = 8
    kv_heads: int = 8
    own: tuple[Pattern, ...] = ()

    @property
    def rules(self) -> tuple[Pattern, ...]:
        """The pattern of every head."""
        return self.own * self.heads if self.own else PATTERNS[self.pattern](self.heads)

    @property
    def causal(self) -> bool:
        """Whether no pair after the query is kept, so that causal SDPA is the dense peer."""
        return self.pattern != "full" and not any(map(grids, self.rules))

    @property
    def name(self) -> str:
        return f"{self.pattern} N={self.length} D={self.head_dim} {self.dtype} H={self.heads}/{self.kv_heads}"


# The two windows of the README's table, in both precisions and head sizes.
WINDOWS = tuple(
    Case(pattern, length, head_dim, dtype)
    for head_dim in (64, 128)
    for dtype in ("float32", "bfloat16")
    for pattern, length in (("window512", 4096), ("window1024", 8192))
)

# Neighborhoods, one for each kind; of the 3-D ones the second has whole boxes only.
NEIGHBORHOODS = tuple(
    Case(name, grids(pattern)[0].tokens, 64, "float32", heads=4, kv_heads=4) for name, pattern in GRIDS.items()
)


def grid(
    patterns: Iterable[str],
    lengths: Iterable[int],
    head_dims: Iterable[int],
    dtypes: Iterable[str],
    heads: int,
    kv_heads: int,
) -> tuple[Case, ...]:
    """Every combination; raises InputError for an unknown pattern or a head count that doesn't divide."""
    names = tuple(patterns)
    for name in names:
        if name not in PATTERNS:
            raise InputError(f"bench: unknown pattern '{name}'; {nearest(name, PATTERNS)}")
    if kv_heads < 1 or heads % kv_heads:
        raise InputError(f"bench: {heads} query heads are not a multiple of {kv_heads} key heads")
    return tuple(
        Case(name, n, d, dtype, heads, kv_heads)
        for dtype in dtypes
        for d in head_dims
        for n in lengths
        for name in names
    )
