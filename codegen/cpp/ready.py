"""Calls of built kernels that are ready to be made again: `ready.cpp.jinja` holds them and finds them by what is asked.

Everything that decides which kernel runs is either part of what a call is found by, or has all of them forgotten.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from sparsify import runtime
from sparsify.codegen.cpp.source import fill
from sparsify.codegen.target import dtype_name
from sparsify.codegen.tuned import FEW
from sparsify.errors import BuildError, Refusal
from sparsify.runtime import ready

if TYPE_CHECKING:
    from sparsify.codegen.cpp.launch import Kernel
    from sparsify.codegen.target import Launch

SKELETON = "ready.cpp.jinja"
SETUP = struct.Struct("@2Pq15P")  # `Setup` there
READY = struct.Struct("@2P11q4Pd2P")  # `Ready` there
CODES = {"float32": (2, 32), "bfloat16": (4, 16), "float16": (2, 16)}  # of DLPack: kind and bits
ANY, MANY = -1, 1 << 62


def remember(launch: Launch, kernel: Kernel, key: object) -> None:
    """Has calls that are like one that was made find their kernel by `key`: the program's text, a pattern, or several.

    By a pattern, the program is another one for one query, and may be for as many queries as keys.
    """
    program, library = launch.program, _library()
    if library is None or program.queries is not None or program.keys is not None:
        return
    (_, heads, q_len, head_dim), (_, kv_heads, k_len, value_dim) = launch.q.shape, launch.v.shape
    sizes, below, *_, held = kernel.of_length(q_len, k_len)
    text = isinstance(key, str)
    queries = (1, FEW) if q_len <= FEW else (FEW + 1, MANY)
    if not text and (q_len == 1 or q_len == k_len):
        queries = q_len, q_len
    elif not text:
        queries = max(2, queries[0]), queries[1]
    any_length = not kernel.names and not any(program.skips)
    items, keeper = tuple(key) if isinstance(key, list) else None, (kernel, held)
    library.ready_add(
        READY.pack(
            *map(id, (key, items)), *CODES[dtype_name(launch.q.dtype)],
            heads, ANY if text else kv_heads, head_dim, value_dim, len(launch.loads),
            *queries, ANY if any_length else k_len, ANY if text else q_len == k_len,
            ctypes.cast(kernel.function, ctypes.c_void_p).value or 0, sizes, kernel.rules_at, below,
            kernel.softcap, id(launch.q.dtype), id(keeper),
        )
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.PyDLL | None:
    """The library that is asked from now on, or None where Python or torch lack what it needs, or it isn't built."""
    tensor_of, compiler = _tensor_of(), runtime.find_compiler()
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()  # by Python's lock calls are found one at a time
    fit = locked and sys.implementation.name == "cpython" and _EMPTY is not None and tensor_of
    if not fit or isinstance(compiler, Refusal):
        return None
    later = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    try:
        built = runtime.load_library("ready", fill(SKELETON), later, compiler)
    except BuildError as error:
        warnings.warn(f"sparsify: calls of attention take longer than they could: {error}", stacklevel=2)
        return None
    library = ctypes.PyDLL(built._name, handle=built._handle)
    library.ready_function.restype = ctypes.py_object
    library.ready_add.argtypes = library.ready_setup.argtypes = [ctypes.c_char_p]
    library.ready_setup(SETUP.pack(tensor_of, runtime.parallel_function(), os.getpid(), *map(id, _OBJECTS)))
    ready.install(library.ready_function(0), library.ready_function(1), library.ready_clear)
    return library


# What `sparsify.op` asks, too, to know whether somebody would see or change a call on its way. It isn't asked for the
# transforms of torch.func: their tensors have no memory of their own, and DLPack refuses them.
_MODES = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,
)
_EMPTY = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)  # as Inductor makes its buffers
_OBJECTS: tuple[Any, ...] = (
    torch.Tensor, str, list, float, None, NotImplemented, torch.get_num_threads, torch.is_grad_enabled,
    _EMPTY, *map(sys.intern, ("requires_grad", "is_neg")), *_MODES,
)  # fmt: skip


def _tensor_of() -> int:
    """The address of DLPack's function that reads a tensor of torch's, or 0 where torch has none."""
    capsule, pointer = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    try:
        table = ctypes.cast(pointer(capsule, b"dlpack_exchange_api"), ctypes.POINTER(ctypes.c_void_p))
    except ValueError:
        return 0
    major = ctypes.cast(table, ctypes.POINTER(ctypes.c_uint32))[0]
    return table[5] or 0 if major == 1 else 0  # behind the version, an older table, and three functions
