"""The formats that are read, and how one is told from the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsify.errors import InputError, nearest
from sparsify.imports import duo_attention, minference, moa, retrieval_heads
from sparsify.imports.option import Option, checked_options
from sparsify.imports.plan import Imported
from sparsify.imports.source import File
from sparsify.spec import Spec


class Format:
    """One format: its name, how its files look (title), whose they are (source), and what it leaves open (options)."""

    def __init__(self, module: ModuleType) -> None:
        self.name: str = module.NAME
        self.title: str = module.TITLE
        self.source: str = module.SOURCE
        self.options: dict[str, Option] = module.OPTIONS
        self.module = module


FORMATS = {one.NAME: Format(one) for one in (moa, duo_attention, minference, retrieval_heads)}
JSON = [one for one in FORMATS.values() if hasattr(one.module, "looks")]


def read(
    path: str | Path, format: str | None = None, *, query_heads: int | Mapping[int, int] | None = None, **options: Any
) -> Spec:
    """The spec that a file (or folder) of another system means; see `load`."""
    return load(path, format, query_heads=query_heads, **options).spec()


def load(
    path: str | Path, format: str | None = None, *, query_heads: int | Mapping[int, int] | None = None, **options: Any
) -> Imported:
    """What a file (or folder) of another system says, by its format or, without one, by its looks.

    query_heads: how many the model has, in every layer or by layer; needed where a file speaks of KV heads that several
    query heads share, and compared elsewhere. options: those of the format, `FORMATS[name].options`. Raises InputError,
    one sentence that names file, place, what was found and what is allowed.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise InputError(f"import: unknown format '{format}'; {nearest(format, FORMATS)}")
    counts = query_heads.values() if isinstance(query_heads, Mapping) else () if query_heads is None else (query_heads,)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"import: query_heads: expected an integer of at least 1, found {count!r}")
    found = _plan(path, format, options)
    return found if query_heads is None else found.for_heads(query_heads)


def _plan(path: Path, format: str | None, options: Mapping[str, Any]) -> Imported:
    if format == duo_attention.NAME or (format is None and duo_attention.is_meant(path)):
        duo = FORMATS[duo_attention.NAME]
        return duo_attention.plan(path, **checked_options(options, duo.options, duo.name))
    file = File(path)
    if format is None and path.is_dir():
        raise _unknown(file, "folder")
    value = file.json()
    found = FORMATS[format] if format is not None else next((one for one in JSON if one.module.looks(value)), None)
    if found is None:
        raise _unknown(file, "file")
    if not found.module.looks(value):
        raise file.error((), f"the file is not in the format {found.name}; expected {found.title}")
    return found.module.plan(value, file, **checked_options(options, found.options, found.name))


def _unknown(file: File, what: str) -> InputError:
    known = "; ".join(one.title for one in FORMATS.values())
    return file.error((), f"the {what} is in no known format; known are {known}")
