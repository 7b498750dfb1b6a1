"""Where a spec's values were written, so that every error can name file, line and column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sparsify.errors import SpecError

Path = tuple[str | int, ...]
Mark = tuple[int, int]  # line and column, counted from 1


@dataclass(frozen=True)
class Source:
    """A spec's origin: a file's name with the marks of all its nodes, or a value made in Python without any.

    `values` and `keys` give the mark of the value, and of the key or list entry, at a path such as
    `("sites", 0, "heads")`.
    """

    name: str = "spec"
    values: Mapping[Path, Mark] = field(default_factory=dict)
    keys: Mapping[Path, Mark] = field(default_factory=dict)

    def error(self, path: Path, what: str, at_key: bool = False) -> SpecError:
        """The error `name:line:column: path: what`; the mark is that of the nearest enclosing node that has one."""
        marks = self.keys if at_key else self.values
        mark = next((marks[p] for p in _enclosing(path) if p in marks), None) or self.values.get(())
        where = f"{self.name}:{mark[0]}:{mark[1]}" if mark else self.name
        what = what if len(what) <= 400 else f"{what[:200]} ... {what[-100:]}"
        return SpecError(f"{where}: {dotted(path)}: {what}" if path else f"{where}: {what}")


def _enclosing(path: Path) -> Iterator[Path]:
    for length in range(len(path), -1, -1):
        yield path[:length]


def dotted(path: Path) -> str:
    """`sites[0].heads` for `("sites", 0, "heads")`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: object) -> str:
    """A value as found, cut to a readable length."""
    text = f"'{value}'" if isinstance(value, str) else "empty" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
