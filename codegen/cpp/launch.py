"""Launches built kernels: the C struct of a call, filled from tensors."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

from sparsify import env, runtime
from sparsify.codegen.cpp.source import Shape, render
from sparsify.codegen.cpp.tuned import tuning
from sparsify.codegen.slots import slot_count
from sparsify.codegen.target import Launch, dtype_name
from sparsify.codegen.tuned import FEW
from sparsify.errors import BuildError, Refusal
from sparsify.runtime import tuned

if TYPE_CHECKING:
    import torch

    from sparsify.program import Program

I64, POINTER = ctypes.c_int64, ctypes.c_void_p
LOAD_TYPES = ("bool", "uint8", "int32", "int64", "float32", "float64", "bfloat16", "float16")
MAX_BUILT = 4096


class Source(ctypes.Structure):
    """`Source` of call.h."""

    _fields_ = (("data", POINTER), ("type", I64), ("size", I64 * 4), ("stride", I64 * 4))


_POINTERS = ("q", "k", "v", "out", "lse", "sizes", "loads", "summaries", "rules", "below", "parallel")
_NUMBERS = ("threads", "b", "heads", "kv_heads", "q_len", "k_len", "q_slots", "k_slots", "offset")


class Call(ctypes.Structure):
    """`Call` of call.h."""

    _fields_ = (
        *((name, POINTER) for name in _POINTERS),
        *((name, I64) for name in _NUMBERS),
        *((name, I64 * 4) for name in ("qs", "ks", "vs", "os")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class Kernel:
    """A built kernel of one program, with what a launch needs that the program alone decides."""

    def __init__(self, program: Program, shape: Shape) -> None:
        compiler, isa = runtime.find_compiler(), runtime.machine_isa()
        if isinstance(compiler, Refusal):
            raise BuildError(str(compiler))
        name, source = render(program, shape, isa)
        self.function = runtime.load_library(name, source, (*isa.flags, *shape.tuning.flags()), compiler).sparsify_run
        self.function.argtypes, self.function.restype = [ctypes.POINTER(Call)], ctypes.c_int
        self.program = program
        self.softcap = program.softcap or 0.0
        self.rules = (ctypes.c_int32 * len(program.heads))(*program.heads)
        self.sizes = functools.lru_cache(maxsize=64)(self._sizes)
        self.below = functools.lru_cache(maxsize=64)(self._below)
        self.slots = functools.lru_cache(maxsize=64)(self._slots)

    def _sizes(self, n: int) -> ctypes.Array:
        values = self.program.size_values(n)
        return (I64 * len(values))(*values)

    def _below(self, k_len: int) -> ctypes.Array:
        below = [-math.inf if skip is None else skip.below(k_len) for skip in self.program.skips]
        return (ctypes.c_float * len(below))(*below)

    def _slots(self, q_len: int, k_len: int) -> tuple[int, int]:
        env = {"N": k_len, "Nq": q_len}
        env |= dict(zip(self.program.sizes(), self.program.size_values(k_len), strict=True))
        return slot_count(self.program.queries, q_len, env), slot_count(self.program.keys, k_len, env)

    def run(self, launch: Launch) -> torch.Tensor:
        """The output of one call."""
        import torch

        q, k, v, out = launch.q, launch.k, launch.v, launch.empty_output()
        if self.program.queries is not None:
            launch.clear(out)  # there may be tokens that no slot holds
        loads = [_source(load) for load in launch.loads]  # keeps what was widened alive, too
        sources = (Source * len(loads))(*(source for source, _ in loads))
        call = Call(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr())
        if launch.lse is not None:
            call.lse = launch.lse.data_ptr()
        call.qs, call.ks, call.vs, call.os = q.stride(), k.stride(), v.stride(), out.stride()
        call.b, call.heads, call.q_len, call.kv_heads, call.k_len = *q.shape[:3], k.shape[1], k.shape[2]
        call.offset, call.scale, call.softcap = launch.q_offset, launch.scale, self.softcap
        call.q_slots, call.k_slots = self.slots(q.shape[2], k.shape[2])
        sizes, below = self.sizes(k.shape[2]), self.below(k.shape[2])
        arrays = (sizes, sources, self.rules, below)
        call.sizes, call.loads, call.rules, call.below = map(ctypes.addressof, arrays)
        call.threads, call.parallel = torch.get_num_threads(), runtime.parallel_function()
        if self.function(call):
            raise MemoryError("sparsify: no memory for a kernel's packed tiles")
        return out


# By the program's identity, as hashing one walks all of its predicates; a kernel keeps its program, and so its id.
_BUILT: dict[tuple[Hashable, ...], Kernel] = {}


def built(program: Program, dtype: torch.dtype, head_dim: int, value_dim: int, q_len: int) -> Kernel | None:
    """The kernel for this machine, environment, cache folder and store of tuned kernels, if this process has it."""
    return _BUILT.get(_key(program, dtype, head_dim, value_dim, q_len))


def build(program: Program, dtype: torch.dtype, head_dim: int, value_dim: int, q_len: int) -> Kernel:
    """Builds the kernel, or loads it from the cache folder. Raises BuildError."""
    if len(_BUILT) >= MAX_BUILT:
        _BUILT.clear()
    how = tuning(program, dtype, head_dim, value_dim, q_len)
    found = Kernel(program, Shape.of(dtype, head_dim, value_dim, how))
    _BUILT[_key(program, dtype, head_dim, value_dim, q_len)] = found
    return found


def _key(program: Program, dtype: torch.dtype, head_dim: int, value_dim: int, q_len: int) -> tuple[Hashable, ...]:
    return id(program), dtype, head_dim, value_dim, q_len <= FEW, tuned.token(), env.build_variables()


def _source(load: torch.Tensor) -> tuple[Source, torch.Tensor]:
    """A tensor that predicates or biases load from; other types than the kernels know are widened."""
    if dtype_name(load.dtype) not in LOAD_TYPES:
        load = load.double() if load.is_floating_point() else load.long()
    kind, pad = LOAD_TYPES.index(dtype_name(load.dtype)), (0,) * (4 - load.dim())
    return Source(load.data_ptr(), kind, (*load.shape, *pad), (*load.stride(), *pad)), load
