"""The C++ target: prints kernels for CPUs, built by the system compiler and run on torch's threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify import env, runtime
from sparsify.codegen.cpp import ready
from sparsify.codegen.cpp.launch import Kernel, build, built
from sparsify.codegen.cpp.source import Shape, render
from sparsify.codegen.cpp.tuned import tuning
from sparsify.codegen.target import DTYPES, Launch, dtype_name
from sparsify.codegen.tuned import FEW
from sparsify.errors import InputError, Refusal
from sparsify.program import MAX_RANK

if TYPE_CHECKING:
    import torch

    from sparsify.program import Program

MAX_SIZE = 512  # of a head: beyond it the state of a query tile outgrows a core's cache


class CppTarget:
    """Compiled kernels with register-blocked micro-kernels for AVX-512, AVX2 or any 16-byte vectors."""

    name = "cpp"

    def unavailable(self) -> Refusal | None:
        """The Refusal of a machine without a compiler, or where built kernels can't be kept, or None."""
        found = runtime.find_compiler()
        return found if isinstance(found, Refusal) else _unwritable(env.cache_dir())

    def refuse(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
        """Why the program can't run here: a dtype or a head size that no kernel is printed for, or None."""
        if dtype_name(dtype) not in DTYPES:
            return Refusal(f"the C++ target has no kernels for {dtype}", hint=f"it has {', '.join(DTYPES)}")
        for what, size in (("head", head_dim), ("value", value_dim)):
            if not 1 <= size <= MAX_SIZE:
                return Refusal(f"{what} size {size} is outside the C++ target's 1 to {MAX_SIZE}")
        if any(rank > MAX_RANK for rank in program.load_ranks().values()):
            return Refusal(f"a load has more than {MAX_RANK} dimensions", hint="drop the dimensions of size 1")
        return None

    def source(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
        """The C++ source for this machine's instruction set (or the one that SPARSIFY_ISA forces), for many queries."""
        how = tuning(program, dtype, head_dim, value_dim, q_len=FEW + 1)
        return render(program, Shape.of(dtype, head_dim, value_dim, how), runtime.machine_isa())[1]

    def run(self, launch: Launch) -> torch.Tensor:
        """Builds the kernel on first use, and runs it. Raises InputError for what `refuse` refuses, and BuildError."""
        if launch.q.device.type != "cpu":
            raise InputError(f"the C++ target runs on cpu tensors, found {launch.q.device}")
        sizes = launch.q.shape[-1], launch.v.shape[-1], launch.q.shape[-2]
        return self.kernel(launch.program, launch.q.dtype, *sizes).run(launch)

    def remember(self, launch: Launch, key: object) -> None:
        """Has later calls that are like this one run by themselves, if its kernel is built."""
        sizes = launch.q.shape[-1], launch.v.shape[-1], launch.q.shape[-2]
        found = built(launch.program, launch.q.dtype, *sizes) if launch.q.is_cpu else None
        if found is not None:
            ready.remember(launch, found, key)

    def kernel(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int, q_len: int) -> Kernel:
        """The built kernel for so many queries. Raises as `run` does."""
        found = built(program, dtype, head_dim, value_dim, q_len)
        if found is None:
            refusal = self.refuse(program, dtype, head_dim, value_dim)
            if refusal is not None:
                raise InputError(str(refusal))
            found = build(program, dtype, head_dim, value_dim, q_len)
        return found


def _unwritable(folder: Path) -> Refusal | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Refusal(f"the cache folder {folder} can't be made: {error.strerror}", hint="set SPARSIFY_CACHE_DIR")
    if os.access(folder, os.W_OK):
        return None
    return Refusal(f"the cache folder {folder} can't be written", hint="set SPARSIFY_CACHE_DIR")
