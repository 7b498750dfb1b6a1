"""`sparsify show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from sparsify.patterns import Pattern
    from sparsify.spec import SiteInfo, Spec


def show(
    spec: Annotated[Path, typer.Argument(help="The spec: a YAML or JSON file.", show_default=False)],
    length: Annotated[int, typer.Option("--length", "-n", help="Keys: the sequence length N.", min=1)] = 4096,
    queries: Annotated[int | None, typer.Option(help="Queries, the last ones of N. Default: all.", min=1)] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers to draw. Default: those that the spec names.", min=1)
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads. Default: those that the spec names.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads. Default: as many as query heads.", min=1)] = None,
    site: Annotated[
        str, typer.Option(help="The address of the sites to draw; {layer} stands for the layer's number.")
    ] = "model.layers.{layer}.self_attn",
    kind: Annotated[Literal["self", "cross"], typer.Option(help="What kind of attention those sites are.")] = "self",
    causal: Annotated[bool, typer.Option("--causal/--not-causal", help="Whether the model masks the future.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pictures.")] = Path("."),
    png: Annotated[bool, typer.Option("--png/--no-png", help="Make the PNG, too (needs matplotlib).")] = True,
    open_it: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Draw what each head keeps under a spec: SPEC.html, one self-contained page, and SPEC.png.

    No model is needed: the sites are made up from --layers, --heads and --site. Sites that keep the same share a row.
    """
    from sparsify.cli.output import progress, remark
    from sparsify.errors import InputError
    from sparsify.pictures import draw
    from sparsify.spec import load_spec, unmatched_rules

    found = load_spec(spec)
    count, heads = layers or _layers(found), heads or _heads(found)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise InputError(f"show: --kv-heads: the {heads} query heads must be a multiple of it, found {kv_heads}")
    sites = _sites(site, count, kind, causal, heads, kv_heads)
    patterns = found.resolve(sites, complete=False)
    drawn = {info.address: kept for info, kept in zip(sites, patterns, strict=True) if kept is not None}
    if not drawn:
        raise InputError(
            f"show: no rule of {spec} matches '{sites[0].address}'; choose other sites with --site, --kind"
        )
    for message in unmatched_rules(found, sites):
        remark(f"note: {message} (see --site, --kind, --layers)")
    with progress() as bar:
        for ending in ("html", "png") if png else ("html",):
            task = bar.add_task(f"drawing the {ending}", total=None)
            path = out / f"{spec.stem}.{ending}"
            draw(drawn, length, path, queries=queries, causal=causal, names=found.patterns, title=spec.name)
            bar.remove_task(task)
    _report(drawn, out / spec.stem, png)
    if open_it:
        typer.launch((out / f"{spec.stem}.html").resolve().as_uri())


def _layers(spec: Spec) -> int:
    """As many layers as show all that the spec's rules tell apart: those that it names, and one more."""
    ranges = [pair for rule in spec.rules for pair in rule.layers or ()]
    named = [last + 2 if last >= 0 else 1 - first for first, last in ranges]
    named += [int(digit) + 2 for rule in spec.rules for digit in re.findall(r"\d(?=[\].])", rule.match)]
    return max([4, *named])


def _heads(spec: Spec) -> int:
    """As many heads as the spec names, and at least two more where it speaks of the rest."""
    named = [group.heads[-1][1] + 1 for rule in spec.rules for group in rule.groups if group.heads]
    rest = any(len(rule.groups) > 1 and any(group.heads is None for group in rule.groups) for rule in spec.rules)
    return max(named, default=8) + (2 if rest else 0)


def _sites(
    address: str, layers: int, kind: Literal["self", "cross"], causal: bool, heads: int, kv_heads: int
) -> list[SiteInfo]:
    from sparsify.spec import SiteInfo

    if "{layer}" not in address:
        number = re.search(r"\d+", address)
        return [SiteInfo(address, int(number[0]) if number else None, kind, causal, heads, kv_heads)]
    addresses = [address.replace("{layer}", str(layer)) for layer in range(layers)]
    what = (kind, causal, heads, kv_heads)
    return [SiteInfo(name, layer, *what, layers=layers) for layer, name in enumerate(addresses)]


def _report(drawn: dict[str, tuple[Pattern, ...]], stem: Path, png: bool) -> None:
    from sparsify.cli.output import console

    distinct = len({pattern for kept in drawn.values() for pattern in kept})
    heads = sum(map(len, drawn.values()))
    plural = "s" if distinct != 1 else ""
    console().print(f"{len(drawn)} sites, {heads} heads, {distinct} pattern{plural}", markup=False)
    for ending in ("html", "png") if png else ("html",):
        console().print(f"written to {stem}.{ending}", markup=False, soft_wrap=True)
