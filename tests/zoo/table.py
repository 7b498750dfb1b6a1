"""The tables: from the results of a walk to what is printed and what the README shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.table import Table

from tests.zoo.walk import Result

HEAD = ("what", "models", "runs", "sites", "found", "rewritten", "false", "masks: closed / data / tensor", "left, why")
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
FAMILIES = ("decoder", "encoder", "encoder-decoder", "vision", "multimodal", "speech", "diffusion", "plain torch")
WAYS: tuple[tuple[str, Callable[[Result], bool]], ...] = (
    ("attention by hand (`eager`)", lambda r: r.implementation == "eager"),
    ("`sdpa`", lambda r: r.implementation == "sdpa"),
    ("`flex_attention`", lambda r: r.implementation == "flex_attention"),
    ("padded", lambda r: "padded" in r.call),
    ("decoding with a dynamic cache", lambda r: r.call == "decode dynamic"),
    ("decoding with a static cache", lambda r: r.call == "decode static"),
    ("dynamic shapes", lambda r: r.dynamic),
)


@dataclass(frozen=True)
class Total:
    """The sums over some results; sites that Dynamo put into no graph count nowhere."""

    models: int
    runs: int
    sites: int
    found: int
    rewritten: int
    false: int
    masks: Counter[str]
    refused: Counter[str]

    @property
    def share(self) -> float:
        return self.found / self.sites if self.sites else 1.0


def total(results: Iterable[Result]) -> Total:
    """Adds up what could be captured at all: a run that Dynamo itself fails on is left out."""
    kept = [result for result in results if result.failed_in != "dynamo"]
    return Total(
        len({result.entry for result in kept}),
        len(kept),
        sum(result.expected - result.outside for result in kept),
        sum(result.found for result in kept),
        sum(result.rewritten for result in kept),
        sum(result.false for result in kept),
        sum((Counter(result.masks) for result in kept), Counter()),
        sum((Counter(result.refused) for result in kept), Counter()),
    )


def rows(results: list[Result]) -> list[tuple[str, ...]]:
    """The rows of the table: by family, by how attention is written and run, and all."""
    groups = [(family, [r for r in results if r.family == family]) for family in FAMILIES]
    groups += [(name, [r for r in results if belongs(r)]) for name, belongs in WAYS]
    groups.append(("**all**", results))
    return [row(name, total(group)) for name, group in groups if group]


def row(name: str, sums: Total) -> tuple[str, ...]:
    masks = " / ".join(str(sums.masks[kind]) for kind in ("closed", "data", "tensor"))
    reasons = ", ".join(f"{plain(reason)} ({number})" for reason, number in merged(sums.refused).most_common(3))
    missed = sums.sites - sums.found
    left = ", ".join(filter(None, [f"no site made ({missed})" if missed else "", reasons]))
    counts = map(str, (sums.models, sums.runs, sums.sites))
    return (name, *counts, percent(sums.found, sums.sites), percent(sums.rewritten, sums.sites), str(sums.false), masks,
            left)  # fmt: skip


def merged(refused: Counter[str]) -> Counter[str]:
    """Counts by reason, whatever nodes the reasons name."""
    found: Counter[str] = Counter()
    for reason, number in refused.items():
        found[plain(reason)] += number
    return found


def plain(reason: str) -> str:
    """A reason without the names of nodes and sizes."""
    import re

    reason = re.sub(r"\b\w+_\d+\b(, \w+)*", "…", reason)
    return re.sub(r"\(\d[^)]*\)|\b\d+\b", "…", reason).replace("|", "/")


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def markdown(results: list[Result], held_out: list[Result]) -> str:
    """The block of the README between its two markers."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(results)]
    sums = total(held_out)
    outside = sum(result.outside for result in [*results, *held_out])
    text = (
        f"{sums.models} further models that the rules were not written against (static shapes, {sums.runs} runs, "
        f"{sums.sites} sites): {percent(sums.found, sums.sites)} found, "
        f"{percent(sums.rewritten, sums.sites)} rewritten, {sums.false} false. "
        f"{outside} more sites ran that Dynamo put into no graph."
    )
    return "\n".join([BEGIN, *lines, "", *wrapped(text), END])


def wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 118)


def table(title: str, results: list[Result]) -> Table:
    """The same for a terminal."""
    shown = Table(*HEAD, title=title)
    for cells in rows(results):
        shown.add_row(*(cell.replace("*", "").replace("`", "") for cell in cells))
    return shown


def details(results: Iterable[Result]) -> list[str]:
    """One line for each run that is not perfect."""
    return [
        f"{result.name}: {result.found} of {result.expected - result.outside} found, {result.rewritten} rewritten"
        + (f", {result.false} false" if result.false else "")
        + (f"; {result.error}" if result.error else "")
        + "".join(f"\n    {line}" for line in result.missed[:3])
        for result in results
        if result.error or result.false or result.rewritten + result.outside < result.expected
    ]
