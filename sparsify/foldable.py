"""Functions whose results torch.compile may take as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def foldable(function: F) -> F:
    """Marks a function of constants that gives a constant: torch.compile calls it instead of tracing into it.

    It is what `torch.compiler.assume_constant_result` does, without the import of torch. Arguments and result have to
    be plain values (text, numbers, types, tuples of those); with it patterns can be built inside a compiled function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
