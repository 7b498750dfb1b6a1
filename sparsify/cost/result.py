"""What an attention costs, as values: of a site and of its heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadCost:
    """One query head. pairs: that it keeps, all batches together. visited: pairs of the tiles that run, kept or not.
    full, partial: its tiles without and with a mask; empty: those that its loop comes to and skips.

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
