"""The store of tuned kernels: one JSON file, keyed by machine, kernel and software, that many processes may write."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparsify.errors import InputError
from sparsify.json_keys import each_once

VERSION = 1
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Tuned:
    """What was found best for one kernel, and by how much.

    machine, software, target, kernel: what it holds for. values: what differs from the default; nothing where that is
    best. seconds, default: medians of its time and the default's. ratio: median of time over the default's, in turns;
    low and high: what it lies between. measured: when, ISO 8601 in UTC.
    """

    machine: str
    software: str
    target: str
    kernel: str
    values: Mapping[str, int]
    seconds: float
    default: float
    ratio: float
    low: float
    high: float
    measured: str

    @property
    def key(self) -> Key:
        """What makes it the same kernel as another's."""
        return self.machine, self.software, self.target, self.kernel


def read(path: Path) -> dict[Key, Tuned]:
    """What a store holds. Raises InputError for a file that isn't there, that is no store, or of another version."""
    try:
        data = json.loads(path.read_text(), object_pairs_hook=each_once)
    except OSError as error:
        raise InputError(f"{path}: the store of tuned kernels can't be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: no store of tuned kernels: it is not JSON ({error})") from None
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("tuned"), list):
        raise InputError(f"{path}: no store of tuned kernels: expected an object with 'version' and a list 'tuned'")
    if version != VERSION:
        raise InputError(f"{path}: store version {version!r} can't be read by this sparsify (it reads {VERSION})")
    found = [_entry(path, number, one) for number, one in enumerate(data["tuned"])]
    return {one.key: one for one in found}


def _entry(path: Path, number: int, data: Any) -> Tuned:
    """One entry, its fields checked."""
    where = f"{path}: tuned[{number}]"
    names = [field.name for field in fields(Tuned)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise InputError(f"{where}: expected an object with {', '.join(names)}")
    for field in fields(Tuned):
        expected, holds = _MEASURED if field.name == "measured" else _EXPECTED[str(field.type)]
        if not holds(data[field.name]):
            raise InputError(f"{where}: {field.name}: found {data[field.name]!r}; expected {expected}")
    for name, value in data["values"].items():
        if type(value) is not int:
            raise InputError(f"{where}: values: {name}: found {value!r}; expected an integer")
    return Tuned(**data)


def _is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


def _is_moment(value: Any) -> bool:
    """Whether it is a time in UTC to the second, written so that later ones sort later."""
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return found.utcoffset() == timedelta() and found.isoformat(timespec="seconds") == value


_Expected = tuple[str, Callable[[Any], bool]]  # in words, and whether a value is so
_EXPECTED: dict[str, _Expected] = {
    "str": ("text", lambda value: isinstance(value, str)),
    "float": ("a number above 0", _is_positive),
    "Mapping[str, int]": ("an object of integers", lambda value: isinstance(value, dict)),
}
_MEASURED: _Expected = ("a time in UTC such as 2026-01-31T12:00:00+00:00", _is_moment)


def merge(path: Path, entries: Iterable[Tuned]) -> None:
    """Adds entries to a store: of one kernel's, what was measured last stays. Raises InputError if it can't be written.

    Whole or not at all, whoever else writes. A file that can't be read is put aside, its ending `.unread`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            found = _held(path)
            for one in entries:
                if one.key not in found or found[one.key].measured <= one.measured:
                    found[one.key] = one
            write(path, found.values())
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path}: the store of tuned kernels can't be written: {why} (set SPARSIFY_TUNED)") from None


def _held(path: Path) -> dict[Key, Tuned]:
    if not path.exists():
        return {}
    try:
        return read(path)
    except InputError:
        os.replace(path, path.with_name(path.name + ".unread"))
        return {}


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def write(path: Path, entries: Iterable[Tuned]) -> None:
    """A store of these entries alone: written beside, flushed to the disk, and renamed. Raises OSError."""
    data = {"version": VERSION, "tuned": [asdict(one) for one in sorted(entries, key=lambda one: one.key)]}
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        os.chmod(beside, 0o666 & ~_umask())  # others may read what a fleet shares
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
