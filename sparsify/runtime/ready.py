"""Calls that are ready to be made again without the way through Python: who is asked first, and forgets when.

In decoding, weights and keys stream through the caches between two calls of a kernel, and what Python touches on its
way to one comes from memory each time: that takes longer than a few thousand keys. A target puts its functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def nobody(*_: Any) -> Any:
    """The answer of a function that has no such call."""
    return NotImplemented


by_program: Callable[..., Any] = nobody  # (q, k, v, loads, q_offset, scale, program), as the op is called
by_pattern: Callable[..., Any] = nobody  # (q, k, v, pattern, scale), as `sparsify.attention` is
_clear: Callable[[], object] = nobody


def install(program: Callable[..., Any], pattern: Callable[..., Any], clear: Callable[[], object]) -> None:
    """Who is asked from now on; each gives the output, or NotImplemented for a call like none that it has."""
    global by_program, by_pattern, _clear
    by_program, by_pattern, _clear = program, pattern, clear


def forget() -> None:
    """Nothing is ready: what kernels are built from has changed."""
    _clear()
