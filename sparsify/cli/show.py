"""`sparsify show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from sparsify.patterns import Pattern
    from sparsify.spec import SiteInfo, Spec


SITE = "model.layers.{layer}.self_attn"


def show(
    context: typer.Context,
    spec: Annotated[
        str | None,
        typer.Argument(
            help="A spec's file (YAML, JSON), or a preset: NAME or NAME:field=value,...", show_default=False
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", "-n", help="Keys: the sequence length N. Default: 4096.", min=1)
    ] = None,
    queries: Annotated[int | None, typer.Option(help="Queries, the last ones of N. Default: all.", min=1)] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers to draw. Default: those that the spec names.", min=1)
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads. Default: those that the spec names.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads. Default: as many as query heads.", min=1)] = None,
    site: Annotated[
        str, typer.Option(help="The address of the sites to draw; {layer} stands for the layer's number.")
    ] = SITE,
    kind: Annotated[Literal["self", "cross"], typer.Option(help="What kind of attention those sites are.")] = "self",
    causal: Annotated[
        bool | None, typer.Option("--causal/--not-causal", help="Whether the model masks the future. Default: it does.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pictures.")] = Path("."),
    png: Annotated[bool, typer.Option("--png/--no-png", help="Make the PNG, too (needs matplotlib).")] = True,
    open_it: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
) -> None:
    """Draw what each head keeps under a spec: SPEC.html, one self-contained page, and SPEC.png.

    No model is needed: the sites are made up from --layers, --heads and --site. Sites that keep the same share a row.
    A preset's name in place of the file tells its rule, source, phase and cost, and draws it.
    """
    from sparsify.cli.presets import is_preset, list_presets

    if listed:
        list_presets()
        return
    if spec is None:
        raise typer.BadParameter("give a spec's file or a preset (--list names them)", ctx=context)
    endings = ("html", "png") if png else ("html",)
    if is_preset(spec):
        only = {"--layers": layers, "--kv-heads": kv_heads, "--site": site != SITE, "--kind": kind != "self"}
        paths = _preset(spec, only, (length, queries, heads, causal), out, endings)
    else:
        shape = (length, queries, True if causal is None else causal)
        paths = _spec(Path(spec), (layers, heads, kv_heads, site, kind), shape, out, endings)
    if open_it:
        typer.launch(paths[0].resolve().as_uri())


def _preset(text: str, only: dict[str, Any], shape: tuple[Any, ...], out: Path, endings: tuple[str, ...]) -> list[Path]:
    """Tells and draws a preset; `only` are options for specs."""
    from sparsify.cli.presets import draw_preset, read_preset
    from sparsify.errors import InputError

    for option, given in only.items():
        if given:
            raise InputError(f"show: {option} goes with a spec's file only, found the preset '{text}'")
    paths = draw_preset(read_preset(text), *shape, out, endings)
    _written(paths)
    return paths


def _spec(
    path: Path, wanted: tuple[Any, ...], shape: tuple[Any, ...], out: Path, endings: tuple[str, ...]
) -> list[Path]:
    """Draws a spec."""
    from sparsify.cli.output import remark
    from sparsify.cli.presets import masks_of
    from sparsify.errors import InputError
    from sparsify.pictures import draw
    from sparsify.progress import progress
    from sparsify.spec import load_spec, unmatched_rules

    found = load_spec(path)
    layers, heads, kv_heads, site, kind = wanted
    length, queries, causal = shape
    count, heads = layers or _layers(found), heads or _heads(found)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise InputError(f"show: --kv-heads: the {heads} query heads must be a multiple of it, found {kv_heads}")
    sites = _sites(site, count, kind, causal, heads, kv_heads)
    patterns = found.resolve(sites, complete=False)
    drawn = {info.address: kept for info, kept in zip(sites, patterns, strict=True) if kept is not None}
    if not drawn:
        raise InputError(
            f"show: no rule of {path} matches '{sites[0].address}'; choose other sites with --site, --kind"
        )
    for message in unmatched_rules(found, sites):
        remark(f"note: {message} (see --site, --kind, --layers)")
    length = length or _length(drawn)
    for message in dict.fromkeys(pattern.fits(length) for kept in drawn.values() for pattern in kept):
        if message:
            remark(f"note: {message} (see --length)")
    masks = masks_of((pattern for kept in drawn.values() for pattern in kept), queries or length, length, causal)
    given = {"queries": queries, "causal": causal, "names": found.patterns, "masks": masks, "title": path.name}
    if masks:
        remark("note: what selections keep is that of made-up queries and keys")
    paths = [out / f"{path.stem}.{ending}" for ending in endings]
    with progress() as bar:
        for target in paths:
            task = bar.add_task(f"drawing {target.name}", total=None)
            draw(drawn, length, target, **given)
            bar.remove_task(task)
    _report(drawn)
    _written(paths)
    return paths


def _length(drawn: dict[str, tuple[Pattern, ...]]) -> int:
    """The length that grids have; 4096 without any."""
    from sparsify.cli.presets import natural_length

    distinct = {pattern for kept in drawn.values() for pattern in kept}
    return max(natural_length(pattern, 0) for pattern in distinct) or 4096


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


def _report(drawn: dict[str, tuple[Pattern, ...]]) -> None:
    from sparsify.cli.output import console

    distinct = len({pattern for kept in drawn.values() for pattern in kept})
    heads = sum(map(len, drawn.values()))
    plural = "s" if distinct != 1 else ""
    console().print(f"{len(drawn)} sites, {heads} heads, {distinct} pattern{plural}", markup=False)


def _written(paths: list[Path]) -> None:
    from sparsify.cli.output import console

    for path in reversed(paths):
        console().print(f"written to {path}", markup=False, soft_wrap=True)
