"""Launches built kernels: the C struct of a call, filled from tensors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify import env, runtime
from sparsify.codegen.cpp.source import Shape, render
from sparsify.codegen.target import Launch
from sparsify.errors import BuildError, Refusal

if TYPE_CHECKING:
    import torch

    from sparsify.program import Program

I64, POINTER = ctypes.c_int64, ctypes.c_void_p
MASK_TYPES = ("bool", "float32", "bfloat16", "float16", "float64")
LOAD_TYPES = ("bool", "uint8", "int32", "int64")


class Source(ctypes.Structure):
    """`Source` of call.h."""

    _fields_ = (("data", POINTER), ("bytes", I64), ("size", I64 * 4), ("stride", I64 * 4))


class Call(ctypes.Structure):
    """`Call` of call.h."""

    _fields_ = (
        *((name, POINTER) for name in ("q", "k", "v", "mask", "out", "sizes", "loads", "rules", "parallel")),
        *((name, I64) for name in ("threads", "b", "heads", "kv_heads", "q_len", "k_len", "offset")),
        *((name, I64 * 4) for name in ("qs", "ks", "vs", "os", "ms")),
        ("mask_type", I64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


def kernel(program: Program, shape: Shape) -> Any:
    """The built function for this machine, environment and cache folder; built at most once a process."""
    return _kernel(program, shape, env.isa(), env.compiler(), env.cache_dir())


@functools.lru_cache(maxsize=4096)
def _kernel(program: Program, shape: Shape, isa: str | None, compiler: str | None, cache: Path) -> Any:
    found = runtime.find_compiler()
    if isinstance(found, Refusal):
        raise BuildError(str(found))
    machine = runtime.machine_isa()
    name, source = render(program, shape, machine)
    function = runtime.load_library(name, source, machine.flags, found).sparsify_run
    function.argtypes, function.restype = [ctypes.POINTER(Call)], ctypes.c_int
    return function


def run(function: Any, launch: Launch) -> torch.Tensor:
    """The output of one call."""
    import torch

    q, k, v, out, program = launch.q, launch.k, launch.v, launch.empty_output(), launch.program
    sizes = program.size_values(k.shape[2])
    loads = [_source(load) for load in launch.loads]
    call = Call(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr())
    call.qs, call.ks, call.vs, call.os = q.stride(), k.stride(), v.stride(), out.stride()
    call.b, call.heads, call.q_len, call.kv_heads, call.k_len = *q.shape[:3], k.shape[1], k.shape[2]
    call.offset, call.scale, call.softcap = launch.q_offset, launch.scale, program.softcap or 0.0
    if launch.mask is not None:
        mask = launch.mask.expand(*q.shape[:3], k.shape[2])
        call.mask, call.ms = mask.data_ptr(), mask.stride()
        call.mask_type = MASK_TYPES.index(str(mask.dtype).removeprefix("torch."))
    arrays = (I64 * len(sizes))(*sizes), (Source * len(loads))(*loads), _rules(program.heads)
    call.sizes, call.loads, call.rules = map(ctypes.addressof, arrays)
    call.threads = torch.get_num_threads()
    call.parallel = runtime.parallel_function()
    if function(call):
        raise MemoryError("sparsify: no memory for a kernel's packed tiles")
    return out


@functools.lru_cache(maxsize=4096)
def _rules(heads: tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int32 * len(heads))(*heads)


def _source(load: torch.Tensor) -> Source:
    """A tensor that predicates load from; other integer types than the kernels know are widened."""
    if str(load.dtype).removeprefix("torch.") not in LOAD_TYPES:
        load = load.long()
    pad = (0,) * (4 - load.dim())
    return Source(load.data_ptr(), load.element_size(), (*load.shape, *pad), (*load.stride(), *pad))
