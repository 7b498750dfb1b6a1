"""The environment variables that sparsify reads: few, typed, and a bad value raises."""

from __future__ import annotations

import os
from pathlib import Path

from sparsify.errors import InputError, nearest

SWITCH = ("1", "0")
ISAS = ("avx512", "avx2", "portable")
TARGETS = ("auto", "cpp", "triton", "null")


def cache_dir() -> Path:
    """SPARSIFY_CACHE_DIR: where built kernels are kept; by default the user's cache folder."""
    found = os.environ.get("SPARSIFY_CACHE_DIR")
    if found:
        return Path(found)
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparsify"))


def tuned() -> Path | None:
    """SPARSIFY_TUNED: the file of tuned kernels, by default tuned.json in the cache folder; 0 (None) for none."""
    found = os.environ.get("SPARSIFY_TUNED")
    if found == "0":
        return None
    return Path(found) if found else cache_dir() / "tuned.json"


def target() -> str:
    """SPARSIFY_TARGET: auto (default), cpp, triton or null."""
    return _one_of("SPARSIFY_TARGET", "auto", TARGETS) if _TARGET in _DATA else "auto"


def crossover() -> bool:
    """SPARSIFY_CROSSOVER: 1 (default) leaves sites where dense attention wins to Inductor, 0 rewrites them, too."""
    return _one_of("SPARSIFY_CROSSOVER", "1", SWITCH) != "0"


def net() -> bool:
    """SPARSIFY_NET: 1 (default) leaves a graph as it was where a pass fails, 0 lets the exception through."""
    return _one_of("SPARSIFY_NET", "1", SWITCH) != "0"


def isa() -> str | None:
    """SPARSIFY_ISA: forces avx512, avx2 or portable C++ kernels; by default the best that the machine runs."""
    return _one_of("SPARSIFY_ISA", "", ISAS) or None


def compiler() -> str | None:
    """SPARSIFY_CXX, else CXX: the C++ compiler to use; by default the first of c++, g++, clang++ on the path."""
    return os.environ.get("SPARSIFY_CXX") or os.environ.get("CXX") or None


def build_variables() -> tuple[object, ...]:
    """The values of all variables that decide how a kernel is built and where it is kept: the key of what is built."""
    return tuple([_DATA.get(name) for name in _BUILD])


# Asked at every call of a kernel. What lies behind os.environ says ten times as fast that a name isn't there.
_DATA = getattr(os.environ, "_data", os.environ)
_KEY = getattr(os.environ, "encodekey", str)
_BUILD = tuple(map(_KEY, ("SPARSIFY_ISA", "SPARSIFY_CXX", "CXX", "PATH", "SPARSIFY_CACHE_DIR", "SPARSIFY_TUNED")))
_TARGET = _KEY("SPARSIFY_TARGET")


def _one_of(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value and value not in allowed:
        raise InputError(f"environment variable {name}: found '{value}'; {nearest(value, allowed)}")
    return value
