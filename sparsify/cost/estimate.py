"""What an attention costs on a machine: counted from the tile program that its kernels run, without running it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.codegen.target import DTYPES
from sparsify.cost.find import machine as find_machine
from sparsify.cost.machine import Machine
from sparsify.cost.nest import Shape
from sparsify.cost.site import site_of
from sparsify.cost.time import site_cost
from sparsify.errors import InputError, nearest
from sparsify.patterns import Pattern


@dataclass(frozen=True)
class HeadCost:
    """One query head. pairs: that it keeps, all batches together. visited: pairs of the tiles that run. full, partial:
    its tiles without and with a mask; empty: those that its loop comes to and skips.

    kv_bytes: of the keys and values that its last query keeps, which a cache has to hold; all of them where a selection
    chooses anew. seconds: its share of the site's, of which select_seconds are for choosing.
    """

    pairs: float
    visited: float
    full: float
    partial: float
    empty: float
    kv_bytes: float
    select_seconds: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """One attention on one machine. `str(estimate)` is a report.

    seconds: of a call, choosing included. bytes: read and written beyond caches. heads: each query head. kv_bytes: of
    the keys and values that some head's last query keeps, all key heads together. select_seconds: of choosing.
    launches: of kernels. permutations: orders of tokens that kernels read rows by. tile: queries by keys. items: query
    tiles that cores take; waves: of these for each core; busy: the share of the cores' time that is work. cores: that
    take part.
    """

    seconds: float
    bytes: float
    heads: tuple[HeadCost, ...]
    kv_bytes: float
    select_seconds: float
    launches: int
    permutations: int
    tile: tuple[int, int]
    items: int
    waves: float
    busy: float
    cores: int
    machine: str

    @property
    def pairs(self) -> float:
        """That are kept."""
        return sum(head.pairs for head in self.heads)

    @property
    def visited(self) -> float:
        """Pairs of the tiles that run."""
        return sum(head.visited for head in self.heads)

    @property
    def useful(self) -> float:
        """The share of the pairs that run which are kept."""
        return self.pairs / self.visited if self.visited else 1.0

    def __str__(self) -> str:
        full, partial, empty = (
            sum(getattr(head, name) for head in self.heads) for name in ("full", "partial", "empty")
        )
        choosing = f", {self.select_seconds * 1e3:.3g} of them to choose keys" if self.select_seconds else ""
        return "\n".join(
            [
                f"{self.seconds * 1e3:.3g} ms on {self.machine}{choosing}",
                f"tiles of {self.tile[0]} x {self.tile[1]}: {full:.0f} full, {partial:.0f} partial, {empty:.0f} empty;"
                f" {self.useful:.0%} of the pairs that run are kept",
                f"{self.items} query tiles on {self.cores} cores, {self.waves:.1f} waves, {self.busy:.0%} busy;"
                f" {self.launches} launches, {self.permutations} permutations",
                f"{self.bytes / 2**20:.1f} MiB moved; {self.kv_bytes / 2**20:.1f} MiB of keys and values kept",
            ]
        )


def estimate(
    patterns: Sequence[Pattern],
    *,
    kv_heads: int | None = None,
    length: int,
    head_dim: int,
    dtype: str = "float32",
    machine: Machine | str | Path | None = None,
    q_len: int | None = None,
    batch: int = 1,
) -> Estimate:
    """What one call of attention costs, for q (batch, heads, q_len, head_dim) and keys of (batch, kv_heads, length,
    head_dim).

    patterns: that of each query head. kv_heads: as many as heads, if not given. q_len: the last so many positions are
    queries; all of them (prefill) if not given, 1 is decoding. machine: as `cost.machine` takes it. Nothing is run.
    What a selection keeps is taken from its budget; where scores decide how much that is, for a quarter of what a query
    sees. Raises InputError for what doesn't fit together, as `sparsify.attention` would.
    """
    given, queries = find_machine(machine), length if q_len is None else q_len
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise InputError(f"cost: patterns: expected one pattern for each query head, found {patterns!r}")
    heads = len(patterns)
    shape = Shape(heads, heads if kv_heads is None else kv_heads, queries, length, head_dim, dtype, batch)
    check(patterns, shape)
    return _estimate(tuple(patterns), shape, given)


def check(patterns: Sequence[Pattern], shape: Shape) -> None:
    """Raises InputError for patterns and sizes that do not go together."""
    if not patterns or not all(isinstance(one, Pattern) for one in patterns):
        raise InputError(f"cost: patterns: expected one pattern for each query head, found {patterns!r}")
    for name, value in (("length", shape.k_len), ("head_dim", shape.head_dim), ("batch", shape.batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"cost: {name}: expected an integer >= 1, found {value!r}")
    if not isinstance(shape.q_len, int) or not 1 <= shape.q_len <= shape.k_len:
        raise InputError(f"cost: q_len: expected an integer from 1 to the length {shape.k_len}, found {shape.q_len!r}")
    if not isinstance(shape.kv_heads, int) or shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        raise InputError(f"cost: kv_heads: {shape.heads} query heads are no multiple of {shape.kv_heads!r}")
    if not isinstance(shape.dtype, str):
        what = f"expected one of {', '.join(sorted(DTYPES))} as a string"
        raise InputError(f"cost: dtype: {what}, found {shape.dtype!r}")
    if shape.dtype not in DTYPES:
        raise InputError(f"cost: dtype: found '{shape.dtype}'; {nearest(shape.dtype, DTYPES)}")
    for one in dict.fromkeys(patterns):
        if wrong := one.fits(shape.k_len):
            raise InputError(f"cost: patterns: {wrong}")


@functools.lru_cache(maxsize=1024)
def _estimate(patterns: tuple[Pattern, ...], shape: Shape, machine: Machine) -> Estimate:
    found = site_cost(site_of(patterns, shape), machine)
    scale = 1e-9
    heads = tuple(HeadCost(**vars(one) | {"seconds": one.seconds * scale, "select_seconds": one.select_seconds * scale})
                  for one in found.heads)  # fmt: skip
    return Estimate(
        seconds=found.time * scale,
        bytes=found.bytes,
        heads=heads,
        kv_bytes=found.kv_bytes,
        select_seconds=found.select * scale,
        launches=found.launches,
        permutations=found.permutations,
        tile=found.tile,
        items=found.items,
        waves=found.items / found.cores,
        busy=found.busy,
        cores=found.cores,
        machine=machine.name,
    )
