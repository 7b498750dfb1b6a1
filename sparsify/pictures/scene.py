"""What a picture shows, before it is drawn: panels, legend and numbers, with equal things made one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsify.errors import InputError
from sparsify.expr import TRUE, Pred
from sparsify.patterns import Pattern, causal
from sparsify.pictures.raster import Raster, raster, raster_of
from sparsify.ranges import of_numbers, text_of
from sparsify.walk import variables

MANY = 8  # in rows of more heads than this, neighbours that keep the same share one panel

# Readable on white and on near-black, and told apart by most eyes; the first is for patterns that keep everything.
COLOURS = ("#64748b", "#2f6fed", "#e8590c", "#0f9d6b", "#9a4df0", "#d6336c", "#0c9bbd", "#b58900", "#7a5c3e")


@dataclass(frozen=True)
class Panel:
    """One head, or neighbours that keep the same: which entry of the legend, which raster, which share is kept.

    The share is that of the pairs which the model's own mask allows.
    """

    first: int
    last: int
    entry: int
    raster: int
    density: float

    @property
    def heads(self) -> int:
        return self.last - self.first + 1

    @property
    def label(self) -> str:
        return str(self.first) if self.heads == 1 else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Row:
    """Sites that keep the same in every head."""

    title: str
    sites: int
    panels: tuple[Panel, ...]

    @property
    def heads(self) -> int:
        return self.panels[-1].last + 1

    @property
    def density(self) -> float:
        return sum(panel.density * panel.heads for panel in self.panels) / self.heads


@dataclass(frozen=True)
class Entry:
    """A pattern in the legend: its name (or none), its text, its colour and the share that it keeps on average."""

    name: str
    text: str
    colour: str
    density: float
    heads: int


@dataclass(frozen=True)
class Scene:
    """A whole picture."""

    title: str
    length: int
    queries: int
    causal: bool
    rows: tuple[Row, ...]
    legend: tuple[Entry, ...]
    rasters: tuple[Raster, ...]
    allowed: Raster

    @property
    def exact(self) -> bool:
        """Whether all densities are counts, and not estimates from samples."""
        return all(found.exact for found in self.rasters)

    @classmethod
    def of(
        cls, sites: Mapping[str, Sequence[Pattern]], length: int, *, queries: int | None = None, causal: bool = True,
        names: Mapping[str, Pattern] | None = None, masks: Mapping[Pattern, Any] | None = None, title: str = "",
    ) -> Scene:  # fmt: skip
        """The scene of `draw`'s arguments."""
        q_len = length if queries is None else queries
        if not 1 <= q_len <= length <= 2**24:
            raise InputError(f"draw: expected 1 <= queries <= length <= 2**24, found {q_len} queries, length {length}")
        if not sites or not all(sites.values()):
            raise InputError("draw: there is nothing to draw: expected sites with at least one head each")
        builder = _Builder(length, q_len, causal, names or {}, masks or {})
        same: dict[tuple[Pattern, ...], list[str]] = {}
        for address, heads in sites.items():
            same.setdefault(tuple(heads), []).append(address)
        rows = tuple(builder.row(addresses, heads) for heads, addresses in same.items())
        return cls(title, length, q_len, causal, rows, builder.legend(rows), tuple(builder.rasters), builder.allowed)


class _Builder:
    def __init__(
        self, length: int, queries: int, with_causal: bool, names: Mapping[str, Pattern], masks: Mapping[Pattern, Any]
    ) -> None:
        self.masks = masks
        self.length, self.queries = length, queries
        self.mask: Pred = causal().keep() if with_causal else TRUE
        self.names = {pattern: name for name, pattern in reversed(names.items())}
        self.rasters: list[Raster] = []
        self.known: dict[tuple[Pred | Pattern, int], int] = {}
        self.patterns: list[Pattern] = []
        self.allowed = raster(self.mask, 0, queries, length)

    def row(self, addresses: list[str], heads: tuple[Pattern, ...]) -> Row:
        panels: list[Panel] = []
        for panel in (self.panel(head, pattern) for head, pattern in enumerate(heads)):
            last = panels[-1] if panels and len(heads) > MANY else None
            if last and (last.entry, last.raster) == (panel.entry, panel.raster):
                panels[-1] = replace(last, last=panel.last)
            else:
                panels.append(panel)
        return Row(joined(addresses), len(addresses), tuple(panels))

    def panel(self, head: int, pattern: Pattern) -> Panel:
        if pattern not in self.patterns:
            self.patterns.append(pattern)
        number = self.number(head, pattern)
        kept = self.rasters[number].kept / self.allowed.kept if self.allowed.kept else 0.0
        return Panel(head, head, self.patterns.index(pattern), number, min(kept, 1.0))

    def number(self, head: int, pattern: Pattern) -> int:
        """The number of the raster of what a head keeps."""
        keep = pattern.keep() & self.mask
        key = (pattern, 0) if pattern in self.masks else (keep, head if "h" in variables(keep) else 0)
        if key not in self.known:
            self.known[key] = len(self.rasters)
            if pattern in self.masks:
                self.rasters.append(raster_of(self.masks[pattern]))
            else:
                self.rasters.append(raster(keep, key[1], self.queries, self.length))
        return self.known[key]

    def legend(self, rows: Iterable[Row]) -> tuple[Entry, ...]:
        panels = [(panel, panel.heads * row.sites) for row in rows for panel in row.panels]
        entries, colours = [], iter(COLOURS[1:] * len(self.patterns))
        for number, pattern in enumerate(self.patterns):
            found = [(panel.density, heads) for panel, heads in panels if panel.entry == number]
            count = sum(heads for _, heads in found)
            density, text = sum(share * heads for share, heads in found) / count, str(pattern)
            colour = COLOURS[0] if density == 1 else next(colours)
            name = self.names.get(pattern, "")
            entries.append(Entry("" if name == text else name, text, colour, density, count))
        return tuple(entries)


def joined(addresses: Sequence[str]) -> str:
    """One title for several sites: `model.layers.{2-31}.self_attn` where only one number differs."""
    if len(addresses) == 1:
        return addresses[0]
    parts = [re.split(r"(\d+)", address) for address in addresses]
    if len({len(part) for part in parts}) == 1:
        differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(differing) == 1 and differing[0] % 2:
            head, tail = "".join(parts[0][: differing[0]]), "".join(parts[0][differing[0] + 1 :])
            return f"{head}{{{text_of(of_numbers(int(part[differing[0]]) for part in parts))}}}{tail}"
    return f"{addresses[0]} and {len(addresses) - 1} more"


def percent(share: float) -> str:
    """`12.3 %`, with more digits where little is kept."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 99.95 or value == 0 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"
