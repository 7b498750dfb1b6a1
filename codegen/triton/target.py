"""The Triton target: one launch for all heads of an attention, on NVIDIA and AMD GPUs or in Triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsify import bias
from sparsify.codegen.oracle import environment
from sparsify.codegen.target import DTYPES, Launch, dtype_name
from sparsify.codegen.triton import printer, ready
from sparsify.codegen.triton.arguments import arguments, empty_parts, merge_arguments
from sparsify.codegen.triton.kernels import interpreting, kernel, merger
from sparsify.codegen.triton.tuning import tiled
from sparsify.errors import InputError, Refusal
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
        for what, size in (("head", head_dim), ("value", value_dim)):
            if not 1 <= size <= MAX_HEAD_DIM:
                reason = f"{what} size {size} is outside the triton target's 1 to {MAX_HEAD_DIM}"
                return Refusal(reason, hint="use the cpp target" if size > MAX_HEAD_DIM else "")
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
        with _on_device(launch.q):
            if interpreting():
                self._interpret(launch, out)
            else:
                ready.run(launch, out)
        return out

    def remember(self, launch: Launch, key: object) -> None:
        """Nothing: a launch that is ready is found on the way."""

    def _interpret(self, launch: Launch, out: torch.Tensor) -> None:
        launch, shape = tiled(launch, None)
        parts = empty_parts(launch, shape)
        values = arguments(launch, out, shape, True, parts)
        kernel(launch)[values["q_tiles"] * values["all_heads"], shape.splits](**values)
        if parts is not None:
            values = merge_arguments(launch, out, shape, True, parts)
            merger(launch)[values["rows"],](**values)

    def _without_keys(self, launch: Launch, out: torch.Tensor) -> torch.Tensor:
        """The output where there are no keys, and the lse: that of the sinks."""
        sink = launch.program.sink
        if sink is not None and launch.lse is not None:
            shape = (*launch.lse.shape, 1)
            launch.lse.copy_(bias.evaluate(sink, environment(launch)).expand(shape)[..., 0])
            return out.zero_()
        return launch.clear(out)

    def _check(self, launch: Launch) -> None:
        refusal = None if launch.q.is_cuda else self.unavailable()  # which takes a while to look
        if refusal is None:
            refusal = self.refuse(launch.program, launch.q.dtype, launch.q.shape[3], launch.v.shape[3])
        if refusal is not None:
            raise InputError(f"triton: {refusal}")
        if not launch.q.is_cuda and not interpreting():
            raise InputError(
                f"triton: tensors on {launch.q.device} can't run on a GPU (move them there, or use target 'cpp')"
            )


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    import torch

    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
