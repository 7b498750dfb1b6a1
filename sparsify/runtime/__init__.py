"""Building generated C++ kernels: which compiler, which instruction set, a cache of shared libraries, loading them."""

from sparsify.runtime.store import load_library
from sparsify.runtime.threads import parallel_function
from sparsify.runtime.toolchain import Compiler, Isa, find_compiler, machine_isa

__all__ = ["Compiler", "Isa", "find_compiler", "load_library", "machine_isa", "parallel_function"]
