"""What is tuned, as kernels ask for it. The store is looked at once a process, and again where that changed it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparsify import env
from sparsify.errors import InputError
from sparsify.runtime import ready, tunings
from sparsify.runtime.tunings import Key, Tuned

_forced: Mapping[str, int] | None = None
_generation = 0


def lookup(key: Key) -> Mapping[str, int]:
    """What differs from the default for a kernel: what is forced, else what the store says; nothing by default."""
    if _forced is not None:
        return _forced
    found, why = held()
    if why:
        _warn(why)
    return found[key].values if key in found else {}


def is_forced() -> bool:
    """Whether what `lookup` says is forced, and not from the store."""
    return _forced is not None


def token() -> Hashable:
    """Part of the key of whatever is cached with what `lookup` said: it changes when that may."""
    return _generation if _forced is None else frozenset(_forced.items())


def reload() -> None:
    """Looks at the store again when it is asked for next."""
    global _generation
    _generation += 1
    _read.cache_clear()
    _warn.cache_clear()
    ready.forget()


def keep(entries: Iterable[Tuned]) -> Path:
    """Adds to the store, for this process and later ones. Raises InputError where there is none or it can't be written.

    Returns the store's path.
    """
    path = env.tuned()
    if path is None:
        raise InputError("environment variable SPARSIFY_TUNED: found '0', so there is no store of tuned kernels")
    tunings.merge(path, entries)
    reload()
    return path


def held() -> tuple[Mapping[Key, Tuned], str]:
    """(what the store holds, why it is not read): one of the two is empty."""
    path = env.tuned()
    return ({}, "") if path is None else _read(path)


@contextmanager
def forced(values: Mapping[str, int]) -> Iterator[None]:
    """Every kernel that is asked for meanwhile differs from its default by these values, whatever the store says."""
    global _forced
    before, _forced = _forced, dict(values)
    ready.forget()
    try:
        yield
    finally:
        _forced = before
        ready.forget()


@functools.cache
def _warn(why: str) -> None:
    """Once a process: what is wrong with the store is wrong for every kernel."""
    what = "kernels run as they do by default; remove it and tune again, or set SPARSIFY_TUNED to another file or 0"
    warnings.warn(f"{why}; {what}", RuntimeWarning, stacklevel=2)


@functools.cache
def _read(path: Path) -> tuple[Mapping[Key, Tuned], str]:
    """A store that can't be read is as if it weren't there: kernels run as they do by default."""
    if not path.exists():
        return {}, ""
    try:
        return tunings.read(path), ""
    except InputError as error:
        return {}, str(error)
