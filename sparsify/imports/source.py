"""Reading the files of other systems: JSON with each key once and finite numbers, and tables of numbers."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from sparsify.errors import InputError
from sparsify.json_keys import each_once
from sparsify.spec.source import dotted, shown

MAX_BYTES = 2**28  # scores of a large model with some hundred samples take 3 MB
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
Where = tuple[str | int, ...]


class File:
    """A file that is read: its path, and errors that say what is wrong where in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, where: Where, what: str) -> InputError:
        """`path: alphas[3][7]: what`, what it is that is wrong at that place."""
        return InputError(f"{self.path}: {dotted(where)}: {what}" if where else f"{self.path}: {what}")

    def data(self) -> bytes:
        """The file's bytes. Raises InputError for what can't be read."""
        try:
            size = self.path.stat().st_size
            if size > MAX_BYTES:
                raise self.error((), f"a file of {size:,} bytes is longer than the {MAX_BYTES:,} allowed")
            return self.path.read_bytes()
        except FileNotFoundError:
            raise self.error((), "there is no such file") from None
        except (OSError, ValueError) as error:
            raise self.error((), f"can't be read: {getattr(error, 'strerror', None) or error}") from None

    def text(self) -> str:
        """The file's text, which is UTF-8."""
        data = self.data()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self.error((), f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8 text") from None

    def json(self) -> Any:
        """The file's JSON value. Raises InputError for another text, a key that is given twice, NaN and Infinity."""
        text = self.text()
        try:
            return json.loads(text, object_pairs_hook=each_once, parse_constant=self._constant)
        except json.JSONDecodeError as error:
            raise self.error((), f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
        except RecursionError:
            raise self.error((), "nested too deeply") from None
        except InputError as error:
            raise self.error((), str(error)) from None
        except ValueError as error:
            raise self.error((), f"not valid JSON: {error}") from None

    def _constant(self, text: str) -> NoReturn:
        raise InputError(f"expected finite numbers, found {text}")

    def number(self, value: Any, where: Where, low: float = -math.inf, high: float = math.inf) -> int | float:
        """A finite number within bounds, whole ones as int. Raises InputError naming the place."""
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not good or not low <= value <= high:
            raise self.error(where, f"expected a number{_bounds(low, high)}, found {shown(value)}")
        return int(value) if value == int(value) else value

    def items(self, value: Any, where: Where, what: str, count: int | None = None) -> list[Any]:
        """A list that isn't empty, of `count` entries if given. Raises InputError naming the place."""
        if not isinstance(value, list):
            raise self.error(where, f"expected {what}, found {shown(value)}")
        if not value:
            raise self.error(where, f"expected {what}, found an empty list")
        if count not in (None, len(value)):
            raise self.error(where, f"expected {count} entries, found {len(value)}")
        return value

    def table(self) -> list[list[float]]:
        """The rows of numbers between tabs, all of one length. Raises InputError naming line and column."""
        rows: list[list[float]] = []
        for number, line in enumerate(self.text().splitlines(), 1):
            if not line.strip():
                continue
            cells = line.rstrip("\n").split("\t")
            rows.append([self._cell(text, number, column) for column, text in enumerate(cells, 1)])
            if len(cells) != len(rows[0]):
                raise self.error((), f"line {number}: expected {len(rows[0])} numbers as above, found {len(cells)}")
        if not rows:
            raise self.error((), "expected a row of numbers for each layer, found an empty file")
        return rows

    def _cell(self, text: str, line: int, column: int) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error((), f"line {line}, number {column}: expected a number, found {shown(text)}")
        return value


def _bounds(low: float, high: float) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f" from {low} to {high}"
    return f" of at least {low}" if math.isfinite(low) else ""


def numbered(keys: Iterable[str], file: File, where: Where, what: str) -> list[int]:
    """Keys such as "0", "1" as numbers, which must be all from 0 on. Raises InputError naming the first that isn't."""
    found = []
    for key in keys:
        if not _NUMBER.fullmatch(key):
            raise file.error(where, f'expected {what} numbers such as "0" as keys, found {shown(key)}')
        found.append(int(key))
    there = set(found)
    missing = next((number for number in range(len(there)) if number not in there), None)
    if missing is not None:
        raise file.error(where, f"{what} {missing} is missing, though {what} {max(found)} is there")
    return found
