"""Presets on the command line: what `sparsify show PRESET` and `sparsify show --list` say and draw."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from operator import and_
from pathlib import Path
from typing import Any

from sparsify.errors import InputError, nearest
from sparsify.patterns import PRESETS, Pattern
from sparsify.patterns.causal import is_causal
from sparsify.patterns.grid import grids
from sparsify.patterns.presets import Preset

BY_NAME: dict[str, Callable[..., Preset]] = {constructor.__name__: constructor for constructor in PRESETS}


def is_preset(text: str) -> bool:
    """Whether `show`'s argument means a preset: it is no file, and its name is one. Raises InputError if neither."""
    name, path = text.partition(":")[0], Path(text)
    if path.is_file() or (name not in BY_NAME and (path.exists() or path.suffix or "/" in text)):
        return False
    if name not in BY_NAME:
        raise InputError(f"show: '{name}' is no file and no preset; {nearest(name, BY_NAME)}")
    return True


def read_preset(text: str) -> Preset:
    """The preset of a text such as `streaming_llm:sinks=8,recent=512`.

    Without arguments it has those of its example; with some, the example gives only those that have no default.
    Raises SpecError as a spec would.
    """
    from sparsify.spec.forms import Builder, parameters
    from sparsify.spec.reader import read_text
    from sparsify.spec.source import Source

    name, _, rest = text.partition(":")
    example, given = dict(BY_NAME[name].about.example), {}  # type: ignore[attr-defined]
    for part in _apart(rest):
        key, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise InputError(
                f"show: expected NAME=VALUE, such as {name}:{next(iter(parameters(name)))}=8, found '{part}'"
            )
        if key.strip() in given:
            raise InputError(f"show: {name}.{key.strip()} is given twice")
        given[key.strip()] = read_text(value, f"show: {name}.{key.strip()}")[0]
    if given:
        example = {
            key: value for key, value in example.items() if parameters(name)[key].default is inspect.Parameter.empty
        }
    return Builder(Source("show"), {}).pattern({name: example | given}, ())  # type: ignore[return-value]


def _apart(text: str) -> Iterator[str]:
    """The parts between commas that are in no brackets."""
    depth, part = 0, ""
    for character in text:
        depth += (character in "[(") - (character in ")]")
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    if part:
        yield part


def natural_length(pattern: Pattern, otherwise: int) -> int:
    """The length that a pattern's grids have, where it has any."""
    return max((grid.start + grid.tokens for grid in grids(pattern)), default=otherwise)


def masks_of(patterns: Iterable[Pattern], q_len: int, k_len: int, with_causal: bool) -> dict[Pattern, Any]:
    """What those patterns that choose keys from the data keep of made-up data, each a bool array (q_len, k_len);
    under the model's own causal mask if there is one."""
    from sparsify.patterns import causal
    from sparsify.patterns.select import selections

    by_data = [pattern for pattern in dict.fromkeys(patterns) if selections(pattern)]
    if not by_data:
        return {}
    from sparsify.selection.example import kept_of_made_up

    model = [causal()] if with_causal else []
    return {one: kept_of_made_up(functools.reduce(and_, model, one), q_len, k_len).numpy() for one in by_data}


def draw_preset(
    pattern: Preset, length: int | None, queries: int | None, heads: int | None, causal: bool | None, folder: Path,
    endings: tuple[str, ...],
) -> list[Path]:  # fmt: skip
    """Draws a preset into the folder and prints what there is to know of it; the paths of the pictures."""
    from sparsify.pictures import draw

    about = pattern.about
    n, count = length or natural_length(pattern, about.length), heads or about.heads
    if complaint := pattern.fits(n):
        raise InputError(f"show: {complaint}")
    causal = is_causal(pattern.keep()) if causal is None else causal
    masks = masks_of([pattern], queries or n, n, causal)
    paths = [folder / f"{pattern.name}.{ending}" for ending in endings]
    for path in paths:
        sites = {pattern.name: [pattern] * count}
        draw(sites, n, path, queries=queries, causal=causal, masks=masks, title=pattern.name)
    tell(pattern, n)
    return paths


def tell(pattern: Preset, length: int) -> None:
    """Prints a preset's rule, where it comes from, what it costs and what it leaves out."""
    from rich.table import Table

    from sparsify.cli.output import console

    about, build = pattern.about, BY_NAME[pattern.name]
    rule, *more = (" ".join(part.split()) for part in (inspect.getdoc(build) or "").split("\n\n"))
    fields = ", ".join(
        key if p.default is p.empty else f"{key}={p.default}" for key, p in inspect.signature(build).parameters.items()
    )
    rows = {
        "rule": rule,
        "": " ".join(more),
        "fields": fields,
        "source": about.source,
        "phase": about.phase,
        "semantics": about.semantics,
        "cost": about.cost,
        "omits": about.omits,
        "drawn": f"{pattern}, {length:,} keys",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(name, _literal(value))
    console().print(f"{pattern.name}", markup=False)
    console().print(table)


def list_presets() -> None:
    """Prints all presets as a table."""
    from rich import box
    from rich.table import Table

    from sparsify.cli.output import console

    table = Table("preset", "phase", "semantics", "keeps", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, build in BY_NAME.items():
        about = build.about  # type: ignore[attr-defined]
        table.add_row(name, about.phase, about.semantics, _literal((inspect.getdoc(build) or "").splitlines()[0]))
    console().print(table)
    console().print("sparsify show PRESET tells and draws more; in a spec, heads: {PRESET: {...}}", markup=False)


def _literal(text: str) -> Any:
    from rich.text import Text

    return Text(text)
