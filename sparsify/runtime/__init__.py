"""Building generated C++ kernels: which compiler, which instruction set, a cache of shared libraries, loading them."""

from sparsify.runtime.store import load_library
from sparsify.runtime.threads import parallel_function
from sparsify.runtime.toolchain import Isa, Toolchain, machine_isa, toolchain

__all__ = ["Isa", "Toolchain", "load_library", "machine_isa", "parallel_function", "toolchain"]
