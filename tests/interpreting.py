"""Triton's interpreter, in a process of its own: it has to be asked for before Triton is imported."""

from __future__ import annotations

import os
from typing import Any


def interpret() -> None:
    """The initializer of such a process."""
    os.environ["TRITON_INTERPRET"] = "1"


def tuned_errors(name: str, values: dict[str, int]) -> tuple[Any, float, float]:
    """(shape, error, PyTorch's own) of a case of `triton_cases` whose kernel differs from its default by values."""
    from triton_cases import CASES, errors

    from sparsify.codegen.triton.tuning import tiled
    from sparsify.runtime import tuned

    case = next(case for case in CASES if case.name == name)
    with tuned.forced(values):
        ours, theirs, _ = errors(case)
        return tiled(case.launch(), None)[1], ours, theirs
