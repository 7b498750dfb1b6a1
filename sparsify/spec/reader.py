"""Reading YAML and JSON into plain values with the position of each: data only, of bounded size and depth.

Both are read by one YAML 1.2 event stream (JSON is a part of YAML). Tags and aliases are refused: a spec holds plain
data, and has names of its own for what is used twice. So nothing in a file can run, grow or loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

from sparsify.errors import SpecError
from sparsify.spec.source import Mark, Path, Source, shown

MAX_BYTES = 2**19
MAX_DEPTH = 32

_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {word: value for value, words in ((None, "null Null NULL ~"), (True, "true True TRUE"),
                          (False, "false False FALSE")) for word in words.split()} | {"": None}  # fmt: skip


def read_text(text: str, name: str) -> tuple[Any, Source]:
    """The plain value of a YAML or JSON text; `name` stands for the file in errors."""
    return _Composer(text, name).document()


def file_text(file: str | File) -> str:
    """The text of a spec's file. Raises SpecError for what can't be read."""
    name = str(file)
    try:
        data = File(file).read_bytes()
    except FileNotFoundError:
        raise SpecError(f"{name}: there is no such file") from None
    except IsADirectoryError:
        raise SpecError(f"{name}: expected a YAML or JSON file, found a directory") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{name}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"{name}: a spec of {len(data)} bytes is longer than the {MAX_BYTES} allowed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise SpecError(f"{name}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8 text") from None


class _Composer:
    """Builds plain values from parse events, noting where each was written."""

    def __init__(self, text: str, name: str) -> None:
        from ruamel.yaml import YAML

        self.text, self.name = text, name
        self.source = Source(name, {}, {})
        self.events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)

    def document(self) -> tuple[Any, Source]:
        from ruamel.yaml.events import DocumentEndEvent, StreamEndEvent

        self.next(), self.next()  # the stream's and the document's start, or the stream's end
        if not self.text.strip() or (event := self.next()) is None:
            raise SpecError(f"{self.name}: the file is empty; a spec needs 'version', 'sites' and usually 'patterns'")
        value = self.value(event, ())
        assert isinstance(self.next(), DocumentEndEvent)
        after = self.next()
        if not isinstance(after, StreamEndEvent):
            raise self.fail(_mark(after), "expected one document, found a second")
        return value, self.source

    def next(self) -> Any:
        from ruamel.yaml.error import YAMLError
        from ruamel.yaml.reader import ReaderError

        try:
            return next(self.events, None)
        except ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            column = error.position - self.text.rfind("\n", 0, error.position)
            raise self.fail((line, column), f"character {self.text[error.position]!r} is not allowed") from None
        except YAMLError as error:
            problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
            context = getattr(error, "context", None)
            what = f"{problem or error}{f', {context}' if context else ''}"
            place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise self.fail(place, f"not valid YAML: {what.replace(chr(10), ' ')}") from None

    def fail(self, mark: Mark, what: str) -> SpecError:
        return SpecError(f"{self.name}:{mark[0]}:{mark[1]}: {what}")

    def value(self, event: Any, path: Path) -> Any:
        from ruamel.yaml import events

        mark = _mark(event)
        self.source.values[path] = mark  # type: ignore[index]
        self.source.keys.setdefault(path, mark)  # type: ignore[attr-defined]
        if isinstance(event, events.AliasEvent):
            raise self.fail(mark, f"alias '*{event.anchor}' is not allowed; name the pattern under 'patterns' instead")
        if event.tag is not None:
            raise self.fail(mark, f"tag '{event.tag}' is not allowed (a spec holds plain data)")
        if len(path) > MAX_DEPTH:
            raise self.fail(mark, f"nested deeper than the {MAX_DEPTH} levels allowed")
        if isinstance(event, events.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value
        return self.mapping(path) if isinstance(event, events.MappingStartEvent) else self.sequence(path)

    def sequence(self, path: Path) -> list[Any]:
        from ruamel.yaml.events import SequenceEndEvent

        found: list[Any] = []
        while not isinstance(event := self.next(), SequenceEndEvent):
            found.append(self.value(event, (*path, len(found))))
        return found

    def mapping(self, path: Path) -> dict[str, Any]:
        from ruamel.yaml.events import MappingEndEvent, ScalarEvent

        found: dict[str, Any] = {}
        while not isinstance(event := self.next(), MappingEndEvent):
            mark = _mark(event)
            if not isinstance(event, ScalarEvent) or event.tag is not None:
                raise self.fail(mark, "a key must be plain text")
            key = event.value
            if key in found:
                line = self.source.keys[(*path, key)][0]
                raise self.fail(mark, f"the key {shown(key)} was already given in line {line}")
            self.source.keys[(*path, key)] = mark  # type: ignore[index]
            found[key] = self.value(self.next(), (*path, key))
        return found


def _mark(event: Any) -> Mark:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _scalar(text: str) -> Any:
    """A plain scalar's value by YAML 1.2's core schema: null, true, false, a number, or text (`yes` is text)."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text
