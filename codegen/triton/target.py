"""The Triton target: one launch for all heads of an attention, on NVIDIA and AMD GPUs or in Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsify import bias
from sparsify.codegen.oracle import environment
from sparsify.codegen.target import DTYPES, Launch, dtype_name
from sparsify.codegen.triton import printer
from sparsify.codegen.triton.arguments import arguments
from sparsify.codegen.triton.module import import_source
from sparsify.codegen.triton.ranges import wrapped
from sparsify.codegen.triton.tuning import tiled
from sparsify.errors import InputError, Refusal
from sparsify.expr import Expr
from sparsify.program import Program

if TYPE_CHECKING:
    import torch

MAX_HEAD_DIM = 256


class TritonTarget:
    """Runs programs by kernels that Triton compiles for the GPU at hand."""

    name = "triton"

    def unavailable(self) -> Refusal | None:
        """Why no kernel can run here: triton is missing, or there is neither a GPU nor the interpreter."""
        if importlib.util.find_spec("triton") is None:
            return Refusal("triton is not installed", hint="pip install 'sparsify[triton]'")
        import torch

        if torch.cuda.is_available() or interpreting():
            return None
        if os.environ.get("TRITON_INTERPRET") == "1":
            return Refusal("TRITON_INTERPRET=1 was set after triton was imported", hint="set it before Python starts")
        return Refusal("no GPU was found", hint="TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly")

    def refuse(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
        """Why this program can't run: only the dtype and the head sizes have limits."""
        if dtype_name(dtype) not in DTYPES:
            return Refusal(f"the triton target can't run {dtype_name(dtype)}", hint="use float32, bfloat16 or float16")
        if not 1 <= max(head_dim, value_dim) <= MAX_HEAD_DIM:
            return Refusal(
                f"head size {max(head_dim, value_dim)} is above the {MAX_HEAD_DIM} that the triton target can hold",
                hint="use the cpp target",
            )
        return None

    def source(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
        """The generated module."""
        return printer.kernel_source(program, dtype_name(dtype), head_dim, value_dim)

    def run(self, launch: Launch) -> torch.Tensor:
        out = launch.empty_output()
        if launch.k.shape[2] == 0 or 0 in out.shape:
            return self._without_keys(launch, out)
        self._check(launch)
        if launch.scale <= 0:  # the kernel takes the largest score before it scales
            launch = replace(launch, q=-launch.q if launch.scale < 0 else launch.q * 0, scale=-launch.scale or 1.0)
        if launch.program.queries is not None:
            launch.clear(out)  # the kernel writes only what some slot holds
        launch, shape = tiled(launch, None if interpreting() else architecture(launch.q.device.index))
        values = arguments(launch, out, shape, interpreting())
        grid = (values["q_tiles"] * values["all_heads"],)
        with _on_device(launch.q):
            kernel(launch)[grid](**values, num_warps=shape.num_warps, num_stages=shape.num_stages)
        return out

    def _without_keys(self, launch: Launch, out: torch.Tensor) -> torch.Tensor:
        """The output where there are no keys, and the lse: that of the sinks."""
        sink = launch.program.sink
        if sink is not None and launch.lse is not None:
            shape = (*launch.lse.shape, 1)
            launch.lse.copy_(bias.evaluate(sink, environment(launch)).expand(shape)[..., 0])
            return out.zero_()
        return launch.clear(out)

    def _check(self, launch: Launch) -> None:
        refusal = self.unavailable()
        if refusal is None:
            refusal = self.refuse(launch.program, launch.q.dtype, launch.q.shape[3], launch.v.shape[3])
        if refusal is not None:
            raise InputError(f"triton: {refusal}")
        if not launch.q.is_cuda and not interpreting():
            raise InputError(
                f"triton: tensors on {launch.q.device} can't run on a GPU (move them there, or use target 'cpp')"
            )


def kernel(launch: Launch) -> Any:
    """The jitted kernel of a launch, from the cache or newly written."""
    sizes = launch.q.shape[3], launch.v.shape[3]
    return _kernel(launch.program, dtype_name(launch.q.dtype), *sizes, wrapped(launch), launch.lse is not None)


@functools.lru_cache(maxsize=1024)
def _kernel(program: Program, dtype: str, head_dim: int, value_dim: int, wrapped: frozenset[Expr], lse: bool) -> Any:
    name = printer.kernel_name(program, dtype, head_dim, value_dim, wrapped, lse)
    module = import_source(name, printer.kernel_source(program, dtype, head_dim, value_dim, wrapped, lse))
    return getattr(module, name)


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


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    import torch

    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
