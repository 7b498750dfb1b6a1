"""The C++ compiler and the vector instruction set of this machine."""

from __future__ import annotations

import functools
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from sparsify import env
from sparsify.errors import InputError, Refusal

COMPILERS = ("c++", "g++", "clang++")
CPUINFO = Path("/proc/cpuinfo")
COMMON_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti", "-w",
)  # fmt: skip


@dataclass(frozen=True)
class Isa:
    """A vector instruction set.

    vector_bytes: of a vector. flags: for the compiler. needs: the processor features it uses. bf16_dot: whether it
    multiplies pairs of bf16. registers: how many vectors they hold.
    """

    name: str
    vector_bytes: int
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    bf16_dot: bool = False
    registers: int = 16


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512")
_NEEDS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"})
_ARM = platform.machine() in ("aarch64", "arm64")
ISAS = {
    "avx512": Isa("avx512", 64, _AVX512, _NEEDS, registers=32),
    "avx2": Isa("avx2", 32, ("-mavx2", "-mfma"), frozenset({"avx2", "fma"})),
    # AArch64 has 32 vector registers, baseline x86-64 has 16.
    "portable": Isa("portable", 16, (), registers=32 if _ARM else 16),
}
_AVX512_BF16 = replace(ISAS["avx512"], flags=(*_AVX512, "-mavx512bf16"), needs=_NEEDS | {"avx512_bf16"}, bf16_dot=True)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, and what it says of its version (both part of every cache key)."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | Refusal:
    """The compiler that builds kernels: SPARSIFY_CXX or CXX, else the first of c++, g++, clang++ on the path."""
    named = shlex.split(env.compiler() or "")
    if named:
        path = shutil.which(named[0])
        if path is None:
            hint = "set SPARSIFY_CXX to a compiler on the path"
            return Refusal(f"the C++ compiler '{named[0]}' was not found", hint=hint)
        return _checked((path, *named[1:]))
    path = next(filter(None, map(shutil.which, COMPILERS)), None)
    if path is None:
        hint = "install g++ or clang++, or set SPARSIFY_CXX"
        return Refusal(f"no C++ compiler was found (looked for {', '.join(COMPILERS)})", hint=hint)
    return _checked((path,))


def _checked(command: tuple[str, ...]) -> Compiler | Refusal:
    try:
        return Compiler(command, _version(command))
    except (OSError, subprocess.SubprocessError) as error:
        hint = "set SPARSIFY_CXX to one that works"
        return Refusal(f"the C++ compiler '{' '.join(command)}' can't be run: {error}", hint=hint)


@functools.lru_cache(maxsize=8)
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.partition("\n")[0].strip()


def machine_isa() -> Isa:
    """The best instruction set of this machine, or the one that SPARSIFY_ISA forces (InputError if it can't run)."""
    features, forced = cpu_features(), env.isa()
    best = [isa for isa in (_AVX512_BF16, *ISAS.values()) if isa.needs <= features]
    if forced is None:
        return best[0]
    for isa in best:
        if isa.name == forced:
            return isa
    missing = ", ".join(sorted(ISAS[forced].needs - features))
    names = ", ".join(dict.fromkeys(isa.name for isa in best))
    why = f"this machine can't run '{forced}' (no {missing}); it runs {names}"
    raise InputError(f"environment variable SPARSIFY_ISA: {why}")


@functools.lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """The x86 feature flags that the kernel reports; none on other machines, which run the portable kernels."""
    if platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists():
        return frozenset()
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
