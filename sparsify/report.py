"""The report of a capture: every attention site, what became of it and why."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.errors import Refusal
from sparsify.patterns import Pattern

WIDTH = 100


@dataclass(frozen=True)
class SiteReport:
    """One attention site.

    address: module path; layer: its number; kind: self or cross; graph: which captured graph it is in, from 0.
    form: how the model spells it; mask: the model's own mask, recovered; patterns: the spec's pattern of each query
    head, `dense()` where the spec says nothing (the model's mask applies as well).
    density: the share of all (head, query, key) triples that is kept, None where it was not computed; `at_most` if
    tensors that are known at run time only, such as padding, may drop more.
    target: what runs it, "" for a site that stays as it is; dense: why dense attention wins there, so that it is left
    to Inductor, or ""; refusal: why it can't be rewritten, or None; notes: what else to know.
    """

    address: str
    layer: int | None
    kind: str
    graph: int
    form: str
    mask: str
    heads: int | None
    kv_heads: int | None
    q_len: int | None
    k_len: int | None
    patterns: tuple[Pattern, ...]
    density: float | None
    at_most: bool
    target: str
    refusal: Refusal | None
    notes: tuple[str, ...] = ()
    dense: str = ""

    @property
    def rewritten(self) -> bool:
        return self.refusal is None and not self.dense

    def outcome(self) -> str:
        """What runs the site, in a word or two."""
        if self.rewritten:
            return self.target
        return "dense (Inductor)" if self.refusal is None else "refused"

    def pattern_text(self) -> str:
        """The patterns with the heads that have them: `0-3: dense; 4-7: window(64)`."""
        groups: dict[str, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            groups.setdefault(str(pattern).removesuffix("()"), []).append(head)
        if len(groups) <= 1:
            return next(iter(groups), "")
        return "; ".join(f"{_runs(heads)}: {text}" for text, heads in groups.items())

    def density_text(self) -> str:
        if self.density is None:
            return ""
        return f"{'≤ ' if self.at_most else ''}{self.density:.1%}"


@dataclass(frozen=True)
class PassTime:
    """One pass over one graph: seconds, and by how much it changed the number of calls of each op."""

    graph: int
    name: str
    seconds: float
    changes: dict[str, int]


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: nodes before and after the passes, and notes (such as a refused re-trace)."""

    nodes_before: int
    nodes_after: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What sparsify makes of a model. Print it for a table; `bool(report.refused)` says whether a site stays dense."""

    sites: tuple[SiteReport, ...]
    passes: tuple[PassTime, ...]
    graphs: tuple[GraphReport, ...]

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def refused(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.refusal is not None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        sites = []
        for site in self.sites:
            fields = {name: getattr(site, name) for name in site.__dataclass_fields__}
            fields["patterns"] = [str(pattern) for pattern in site.patterns]
            fields["refusal"] = None if site.refusal is None else asdict(site.refusal)
            sites.append(fields | {"notes": list(site.notes)})
        return {
            "sites": sites,
            "passes": [asdict(step) for step in self.passes],
            "graphs": [asdict(graph) | {"notes": list(graph.notes)} for graph in self.graphs],
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left", expand=False)
        table.add_column("site", no_wrap=True)
        table.add_column("form", overflow="fold", max_width=22)
        for name in ("mask", "pattern"):
            table.add_column(name, overflow="fold")
        table.add_column("density", justify="right")
        table.add_column("target")
        for address, site in _folded(self.sites):
            cells = (address, _short(site.form), site.mask, site.pattern_text(), site.density_text(), site.outcome())
            table.add_row(*map(_escaped, cells))
        return Group(table, *self._lines())

    def _title(self) -> str:
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}"
        return f"{len(self.rewritten)} of {len(self.sites)} attention sites rewritten, in {graphs}"

    def _lines(self) -> list[str]:
        refused = [f"refused: {address}: {site.refusal}" for address, site in _folded(self.refused)]
        dense = [f"dense: {address}: {site.dense}" for address, site in _folded(self.sites) if site.dense]
        notes = [f"note: {address}: {note}" for address, site in _folded(self.sites) for note in site.notes]
        graphs = [f"note: graph {i}: {note}" for i, graph in enumerate(self.graphs) for note in graph.notes]
        seconds = f"passes: {sum(step.seconds for step in self.passes):.2f} s" if self.passes else ""
        return [_escaped(line) for line in (*refused, *dense, *notes, *graphs, seconds) if line]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _short(form: str) -> str:
    """A form without the steps that every model has."""
    return form.replace(" > to >", " >").replace(" > dropout(eval) >", " >")


def _runs(heads: list[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][1] == head - 1:
            runs[-1][1] = head
        else:
            runs.append([head, head])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _folded(sites: Iterable[SiteReport]) -> list[tuple[str, SiteReport]]:
    """Equal sites that differ in the layer's number only, as one: ("model.layers.0-5.self_attn", the first)."""
    groups: dict[Any, list[SiteReport]] = {}
    for site in sites:
        groups.setdefault(_key(site), []).append(site)
    return [(_address(group), group[0]) for group in groups.values()]


def _key(site: SiteReport) -> Any:
    where = re.sub(r"\d+", "#", site.address) if site.layer is not None else site.address
    refusal = None if site.refusal is None else (site.refusal.reason, site.refusal.hint)
    return (
        where,
        site.graph,
        site.form,
        site.mask,
        site.patterns,
        site.density,
        site.target,
        refusal,
        site.notes,
        site.dense,
    )


def _address(group: list[SiteReport]) -> str:
    addresses = [site.address for site in group]
    if len(group) == 1:
        return addresses[0] or str(group[0].layer)
    split = [re.split(r"(\d+)", address) for address in addresses]
    columns = [sorted({int(parts[i]) for parts in split}) for i in range(1, len(split[0]), 2)]
    shown = [_runs(numbers) for numbers in columns]
    if not shown:
        return f"{addresses[0]} ({len(group)} sites)"
    return "".join(shown[i // 2] if i % 2 else part for i, part in enumerate(split[0])).replace(", ", ",")
