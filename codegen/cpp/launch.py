"""Launches built kernels: the C struct of a call, filled from tensors."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from sparsify import env, runtime
from sparsify.codegen.cpp.source import Shape, render
from sparsify.codegen.cpp.tuned import tuning
from sparsify.codegen.slots import slot_count
from sparsify.codegen.target import Launch, dtype_name
from sparsify.codegen.tuned import FEW
from sparsify.errors import BuildError, Refusal
from sparsify.runtime import tuned
from sparsify.sizes import size_values

if TYPE_CHECKING:
    from sparsify.program import Program

I64, POINTER = ctypes.c_int64, ctypes.c_void_p
LOAD_TYPES = ("bool", "uint8", "int32", "int64", "float32", "float64", "bfloat16", "float16")
MAX_BUILT = 4096


class Source(ctypes.Structure):
    """`Source` of launch.h."""

    _fields_ = (("data", POINTER), ("type", I64), ("size", I64 * 4), ("stride", I64 * 4))


# `Call` of launch.h: 11 pointers, 9 numbers, 4 times 4 strides, 2 factors. Packing it takes a tenth of what filling the
# fields of a ctypes structure does.
CALL = struct.Struct("@11P9q16q2d")


class Kernel:
    """A built kernel of one program, with what a launch needs that the program alone decides."""

    def __init__(self, program: Program, shape: Shape) -> None:
        compiler, isa = runtime.find_compiler(), runtime.machine_isa()
        if isinstance(compiler, Refusal):
            raise BuildError(str(compiler))
        name, source = render(program, shape, isa)
        self.function = runtime.load_library(name, source, (*isa.flags, *shape.tuning.flags()), compiler).sparsify_run
        self.function.argtypes, self.function.restype = [ctypes.c_char_p], ctypes.c_int
        self.program = program
        self.softcap = program.softcap or 0.0
        self.rules = (ctypes.c_int32 * len(program.heads))(*program.heads)
        self.rules_at = ctypes.addressof(self.rules)
        self.names = frozenset(program.sizes())
        self.of_length = functools.lru_cache(maxsize=64)(self._of_length)

    def _of_length(self, q_len: int, k_len: int) -> tuple[int, int, int, int, object]:
        """What lengths decide: where sizes and limits of skips are, how many slots; and what keeps them alive."""
        sizes, program = size_values(self.names, k_len), self.program
        env = {"N": k_len, "Nq": q_len} | sizes
        slots = slot_count(program.queries, q_len, env), slot_count(program.keys, k_len, env)
        below = [-math.inf if skip is None else skip.below(k_len) for skip in program.skips]
        held = (I64 * len(sizes))(*(sizes[name] for name in sorted(sizes))), (ctypes.c_float * len(below))(*below)
        return (*map(ctypes.addressof, held), *slots, held)  # type: ignore[return-value]

    def run(self, launch: Launch) -> torch.Tensor:
        """The output of one call."""
        q, k, v, out = launch.q, launch.k, launch.v, launch.empty_output()
        loads = [_source(load) for load in launch.loads]  # keeps what was widened alive, too
        sources = (Source * len(loads))(*(source for source, _ in loads)) if loads else None
        (batch, heads, q_len, _), (_, kv_heads, k_len, _) = q.shape, k.shape
        sizes, below, q_slots, k_slots, _ = self.of_length(q_len, k_len)
        lse = 0 if launch.lse is None else launch.lse.data_ptr()
        given = 0 if sources is None else ctypes.addressof(sources)
        tensors = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse
        threads, parallel = torch.get_num_threads(), runtime.parallel_function()
        numbers = threads, batch, heads, kv_heads, q_len, k_len, q_slots, k_slots, launch.q_offset
        strides = *q.stride(), *k.stride(), *v.stride(), *out.stride()
        pointers = sizes, given, 0, self.rules_at, below, parallel  # the third is what the kernel itself makes
        if self.function(CALL.pack(*tensors, *pointers, *numbers, *strides, launch.scale, self.softcap)):
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
