"""The report of a capture: every attention site, what became of it and why."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparsify.errors import Refusal
from sparsify.patterns import Pattern
from sparsify.ranges import of_numbers, text_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 100


@dataclass(frozen=True)
class SiteReport:
    """One attention site.

    address: module path; layer: its number; use: which attention of that module it is, from 0; kind: self or cross;
    phase: prefill or decode; graph: which captured graph it is in, from 0.
    form: how the model spells it; mask: the model's own mask, recovered; bias: what is added to the scores, and sink:
    what joins the softmax; patterns: the spec's pattern of each query head, `dense()` where the spec says nothing (the
    model's mask applies as well).
    density: the share of all (head, query, key) triples that is kept, None where it was not computed; `at_most` if the
    data decide, by tensors that are known at run time only, such as padding, or by a selection, whose budget counts
    where it says how much is kept.
    layout: in which order its tokens are laid out, and what that saves; "" for their own.
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
    use: int = 0
    phase: str = "prefill"
    bias: str = ""
    sink: str = ""
    layout: str = ""

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
        return "; ".join(f"{text_of(of_numbers(heads))}: {text}" for text, heads in groups.items())

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
    """What sparsify makes of a model. Print it; `bool(report.refused)` says whether a site stays dense."""

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from sparsify.report_page import lines

        yield from lines(self, options.max_width)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]
