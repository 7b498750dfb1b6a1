"""How a report reads: a block of lines for each group of equal sites, at any width, and why each was refused."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from rich.text import Text

from sparsify.addresses import folded, shape_of
from sparsify.report import Report, SiteReport

LABEL = 10  # columns of the labels
NARROW = 30  # columns of text at least, however narrow the console
GROUP = re.compile(r"\([^()\[\]]*\)|\[[^()\[\]]*\]")
WORDS = {
    "causal": "causal: k <= q",
    "window(": "window(n): 0 <= q - k < n",
    "same_block(": "same_block(n): q // n == k // n",
}


def lines(report: Report, width: int) -> Iterator[Text]:
    """The report's lines, none longer than `width` where words allow it."""
    yield Text(_title(report), style="bold")
    for group in groups(report.sites):
        yield Text()
        yield Text(address(group), style="bold")
        for label, text, style in _rows(group[0]):
            yield from _wrapped(label, text, style, width)
    yield Text()
    for label, text in _footer(report):
        yield from _wrapped(label, text, "", width, indent="")


def groups(sites: Iterable[SiteReport]) -> list[list[SiteReport]]:
    """Sites that differ in nothing but their numbers, together, in the order of their first."""
    found: dict[Any, list[SiteReport]] = {}
    for site in sites:
        found.setdefault(_key(site), []).append(site)
    return list(found.values())


def address(group: list[SiteReport]) -> str:
    """`model.layers.0-5.self_attn (6 sites)`."""
    text = folded([site.address for site in group]) or f"site {group[0].layer}"
    return f"{text} ({len(group)} sites)" if len(group) > 1 else text


def _key(site: SiteReport) -> Any:
    refusal = None if site.refusal is None else (site.refusal.reason, site.refusal.hint, site.refusal.line)
    notes = tuple(re.sub(r"_\d+\b", "", note) for note in site.notes)  # nodes of other layers have other numbers
    what = (site.kind, site.phase, site.form, site.mask, site.bias, site.sink, site.patterns, site.density, site.layout)
    sizes = (site.heads, site.kv_heads, site.q_len, site.k_len)
    return shape_of(site.address), site.graph, what, sizes, site.target, refusal, notes, site.dense


def _title(report: Report) -> str:
    graphs = f"{len(report.graphs)} graph{'s' * (len(report.graphs) != 1)}"
    parts = [f"{len(report.rewritten)} of {len(report.sites)} attention sites rewritten"]
    left = sum(1 for site in report.sites if site.dense)
    parts += [f"{left} left to Inductor"] * bool(left) + [f"{len(report.refused)} refused"] * bool(report.refused)
    return f"{', '.join(parts)}, in {graphs}"


def _rows(site: SiteReport) -> Iterator[tuple[str, str, str]]:
    """(label, text, style) of what is known of a site; what there is nothing to say of has no row."""
    yield "what", _what(site), ""
    yield "form", _short(site.form), ""
    yield "mask", site.mask, ""
    yield "bias", site.bias, ""
    yield "sink", site.sink, ""
    if any(str(pattern) != "dense()" for pattern in site.patterns):
        yield "pattern", site.pattern_text(), ""
    yield "density", site.density_text(), ""
    yield "layout", site.layout, ""
    if site.refusal is None:
        yield (
            "runs",
            site.outcome() + (f": {site.dense}" if site.dense else ""),
            "green" if site.rewritten else "yellow",
        )
    else:
        yield "refused", site.refusal.reason, "red"
        yield "node", site.refusal.node, ""
        line = site.refusal.line
        yield "line", str(line or ""), ""
        yield "", line.code if line else "", ""
        yield "hint", site.refusal.hint, ""
    for note in site.notes:
        yield "note", note, ""


def _what(site: SiteReport) -> str:
    words = [f"{site.kind} attention"]
    if site.phase == "decode":
        words.append("decoding")
    if site.heads is not None and site.kv_heads is not None:
        shared = f" on {site.kv_heads} key head{'s' * (site.kv_heads != 1)}" if site.kv_heads != site.heads else ""
        words.append(f"{site.heads} head{'s' * (site.heads != 1)}{shared}")
    if site.q_len is not None and site.k_len is not None:
        words.append(f"{site.q_len} quer{'y' if site.q_len == 1 else 'ies'}, {site.k_len} keys")
    return ", ".join(words)


def _short(form: str) -> str:
    """A form without the steps that every model has."""
    return form.replace(" > to >", " >").replace(" > dropout(eval) >", " >")


def _footer(report: Report) -> Iterator[tuple[str, str]]:
    if not report.graphs:
        yield "graphs", "torch.compile captured nothing of this call: graph breaks left all of it to Python"
    elif len(report.graphs) > 1:
        yield "graphs", "graph breaks split the call; an attention that a break cuts apart can't be found"
    if len(report.graphs) != 1:
        yield "", "TORCH_LOGS=graph_breaks says where and why"
    for number, graph in enumerate(report.graphs):
        for note in graph.notes:
            yield f"graph {number}", note
    used = [text for word, text in WORDS.items() if any(word in site.mask for site in report.sites)]
    if used:
        yield "words", "; ".join(used)
    if report.passes:
        yield "passes", f"{sum(step.seconds for step in report.passes):.2f} s"


def _wrapped(label: str, text: str, style: str, width: int, indent: str = "  ") -> Iterator[Text]:
    """A label and its text, broken between words but not inside of brackets."""
    room = max(width - LABEL - len(indent), NARROW)
    words = GROUP.sub(lambda found: found[0].replace(" ", "\0"), text).split(" ")
    whole = " ".join(word if len(word) <= room else word.replace("\0", " ") for word in words)
    parts = textwrap.wrap(whole, room, break_long_words=False, break_on_hyphens=False)
    for number, part in enumerate(parts):
        shown = f"{indent}{'' if number else label:<{LABEL}}"
        yield Text.assemble((shown, "dim"), (part.replace("\0", " "), style), no_wrap=True, overflow="ignore")
