"""What is measured: named patterns on named shapes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sparsify import patterns as p
from sparsify.errors import InputError, nearest
from sparsify.patterns import Pattern
from sparsify.patterns.grid import grids
from sparsify.patterns.lists import choices

T = TypeVar("T")
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
    "window256": lambda heads: (p.window(256),) * heads,
    "window512": lambda heads: (p.window(512),) * heads,
    "window1024": lambda heads: (p.window(1024),) * heads,
    "window2048": lambda heads: (p.window(2048),) * heads,
    "streaming": lambda heads: ((p.sinks(4) | p.window(1024)) & CAUSAL,) * heads,
    "s2_stride": lambda heads: (
        ((p.block_window(64, 16) | p.column_stride(8, block=64, offset="head")) & CAUSAL,) * heads
    ),
    "block_diagonal": lambda heads: (p.same_block(512) & CAUSAL,) * heads,
    "dilated8": lambda heads: (p.dilated(8) & CAUSAL,) * heads,
    "mixture": _mixture,
    "topk": lambda heads: (p.topk(16, unit=64, sinks=1, local=1) & CAUSAL,) * heads,
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

    @functools.cached_property
    def rules(self) -> tuple[Pattern, ...]:
        """The pattern of every head."""
        return self.own * self.heads if self.own else PATTERNS[self.pattern](self.heads)

    @property
    def causal(self) -> bool:
        """Whether no pair after the query is kept, so that causal SDPA is the dense peer."""
        return self.pattern != "full" and not any(map(grids, self.rules))

    @functools.cached_property
    def dynamic(self) -> bool:
        """Whether the data choose what is kept."""
        return any(choices(rule.keep()) for rule in dict.fromkeys(self.rules))

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


# What `--grid` measures, and on which shapes: (query heads, key heads), without and with groups.
GRID = (
    "causal", "window256", "window512", "window1024", "streaming", "s2_stride", "block_diagonal", "dilated8", "mixture",
    "near_2d", "topk",
)  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128)
DTYPES = ("float32", "bfloat16")
HEADS = 8


def grid(
    patterns: Iterable[str],
    lengths: Iterable[int],
    head_dims: Iterable[int],
    dtypes: Iterable[str],
    heads: int,
    kv_heads: int,
) -> tuple[Case, ...]:
    """Every combination; raises InputError for an unknown pattern, or a length or a head count that doesn't fit."""
    names, sizes = _known(patterns), tuple(lengths)
    _check_heads(heads, kv_heads)
    found = tuple(
        Case(name, n, d, dtype, heads, kv_heads) for dtype in dtypes for d in head_dims for n in sizes for name in names
    )
    for case in found:
        _check_memory(case)
        wrong = next(filter(None, (rule.fits(case.length) for rule in dict.fromkeys(case.rules))), "")
        if wrong:
            raise InputError(f"bench: {case.pattern} at length {case.length}: {wrong}")
    return found


def whole_grid(
    patterns: Sequence[str] | None,
    lengths: Sequence[int] | None,
    head_dims: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    heads: int | None,
    kv_heads: int | None,
) -> tuple[Case, ...]:
    """The cases of `--grid`, or those of them with the given values; a neighborhood is there at its grid's length only.

    Values that the grid doesn't have are taken, too. Raises InputError as `grid` does, and where no case is left.
    """
    names, lengths, query_heads = _known(patterns or GRID), lengths or LENGTHS, heads or HEADS
    groups = [kv_heads] if kv_heads else [query_heads, *([query_heads // 4] if query_heads % 4 == 0 else [])]
    found: list[Case] = []
    for dtype in dtypes or DTYPES:
        for head_dim in head_dims or HEAD_DIMS:
            for group in groups:
                for n in lengths:
                    here = [name for name in names if name not in GRIDS or grids(GRIDS[name])[0].tokens == n]
                    found += grid(here, [n], [head_dim], [dtype], query_heads, group)
    if not found:
        own = ", ".join(f"{name} has {grids(GRIDS[name])[0].tokens} tokens" for name in names)
        raise InputError(f"bench: --length: no case of the grid is left: {own}")
    return tuple(found)


def _known(patterns: Iterable[str]) -> tuple[str, ...]:
    names = tuple(patterns)
    for name in names:
        if name not in PATTERNS:
            raise InputError(f"bench: unknown pattern '{name}'; {nearest(name, PATTERNS)}")
    return names


def _check_heads(heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise InputError(f"bench: {heads} query heads are not a multiple of {kv_heads} key heads")


def _check_memory(case: Case) -> None:
    """Raises InputError for a case whose queries, keys, values and output alone are more than this machine's memory."""
    element = 4 if case.dtype == "float32" else 2
    needed = 2 * (case.heads + case.kv_heads) * case.length * case.head_dim * element
    check_fits(f"queries, keys, values and output of {case.name}", needed)


def check_fits(what: str, needed: int) -> None:
    """Raises InputError where `what`, made in this machine's memory for any device, is more than that."""
    there = _memory()
    if needed > there:
        sizes = f"{needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f} GiB; give fewer tokens"
        raise InputError(f"bench: --length: {what} need {sizes}")


def _memory() -> float:
    """Bytes of this machine's memory; infinity where the system doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def pick(known: Mapping[str, T], names: Sequence[str] | None) -> list[T]:
    """The cases of these names, or all. Raises InputError for an unknown one."""
    for name in names or ():
        if name not in known:
            raise InputError(f"bench: unknown case '{name}'; {nearest(name, known)}")
    return [known[name] for name in names or known]
