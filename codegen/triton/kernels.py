"""Kernels by what they compute, and what runs them: a GPU or Triton's interpreter."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sparsify.codegen.target import dtype_name
from sparsify.codegen.triton import printer
from sparsify.codegen.triton.module import import_source
from sparsify.codegen.triton.ranges import wrapped
from sparsify.expr import Expr
from sparsify.program import Program

if TYPE_CHECKING:
    from sparsify.codegen.target import Launch

INTERPRETED, USUAL = 8, 132  # multiprocessors of the interpreter, which only makes some splits; and of an H100


def kernel(launch: Launch) -> Any:
    """The jitted kernel of a launch, from the cache or newly written."""
    name, module = _module(*_about(launch))
    return getattr(module, name)


def merger(launch: Launch) -> Any:
    """The jitted kernel that merges what splits of the keys give."""
    return _module(*_about(launch))[1].merge


def _about(launch: Launch) -> tuple[Any, ...]:
    sizes = launch.q.shape[3], launch.v.shape[3]
    return launch.program, dtype_name(launch.q.dtype), *sizes, wrapped(launch), launch.lse is not None


@functools.lru_cache(maxsize=1024)
def _module(
    program: Program, dtype: str, head_dim: int, value_dim: int, wrapped: frozenset[Expr], lse: bool
) -> tuple[str, Any]:
    name = printer.kernel_name(program, dtype, head_dim, value_dim, wrapped, lse)
    return name, import_source(name, printer.kernel_source(program, dtype, head_dim, value_dim, wrapped, lse))


@functools.lru_cache(maxsize=1)
def interpreting() -> bool:
    """Whether Triton was imported as an interpreter (TRITON_INTERPRET=1): it decides that once, at import."""
    import triton.language as tl

    return type(tl.zeros_like).__name__ == "InterpretedFunction"


@functools.lru_cache(maxsize=64)
def architecture(device: int | None) -> int | str:
    """The capability of an NVIDIA GPU (80, 90, 100, ...) or the name of an AMD one ("gfx942")."""
    import torch

    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(launch: Launch) -> int:
    """How many multiprocessors run it: those of its GPU, of a usual one for tensors without memory."""
    import torch

    if hasattr(launch.q, "processors"):  # what stands for a tensor says so itself
        return launch.q.processors
    if launch.q.is_cuda:
        return torch.cuda.get_device_properties(launch.q.device).multi_processor_count
    return INTERPRETED if interpreting() else USUAL
