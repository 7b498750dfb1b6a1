"""Building kernels ahead of time, without a GPU, and what each takes: registers, spills, shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsify.codegen.triton.catalogue import ARCHS, Entry, entries
from sparsify.codegen.triton.tuning import tiled
from sparsify.errors import BuildError

if TYPE_CHECKING:
    from sparsify.codegen.target import Launch

MATRIX = ("wgmma", "tcgen05", "mma.sync", "mfma")  # the families of matrix instructions, of the newest first

# Of a multiprocessor: registers (of 32 bits), bytes of shared memory, threads, and threads of a warp.
CHIPS: dict[int | str, tuple[int, int, int, int]] = {
    80: (65536, 163 << 10, 2048, 32),
    86: (65536, 99 << 10, 1536, 32),
    89: (65536, 99 << 10, 1536, 32),
    90: (65536, 227 << 10, 2048, 32),
    100: (65536, 227 << 10, 2048, 32),
    120: (65536, 99 << 10, 1536, 32),
    "gfx942": (4 * 512 * 64, 64 << 10, 2048, 64),
}


@dataclass(frozen=True)
class Resources:
    """What a program (a tile's threads) of a built kernel takes. registers, spills: of a thread; spills and shared
    memory in bytes. matrix: what multiplies its tiles, "" for ordinary instructions."""

    registers: int
    spills: int
    shared: int
    matrix: str = ""

    def programs(self, num_warps: int, arch: int | str) -> int:
        """How many run side by side on a multiprocessor; 0 where not even one fits."""
        registers, shared, threads, warp = CHIPS[arch]
        each = num_warps * warp
        fits = registers // max(1, self.registers * each), shared // max(1, self.shared), threads // each
        return min(fits)


@dataclass(frozen=True)
class Row:
    """A kernel as built for a chip ("sm_90", "gfx942"), and what it takes there."""

    kernel: str
    arch: str
    takes: Resources


def kernel_resources(
    archs: Iterable[int | str] = ARCHS,
    progress: Callable[[int, int], None] | None = None,
    catalogue: Iterable[Entry] | None = None,
    jobs: int | None = None,
) -> list[Row]:
    """Builds the catalogue for each chip (CUDA capabilities such as 90, AMD names such as "gfx942"): rows by `build`.

    `progress(done, all)` is called as entries are finished. Builds run in processes of their own, so that a Triton
    imported here as an interpreter doesn't matter; Triton caches them on disk. Raises BuildError naming the kernel.
    """
    import multiprocessing

    tasks = [(entry, arch) for entry in (entries() if catalogue is None else catalogue) for arch in archs]
    with ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn"), _compile_mode) as pool:
        futures = [pool.submit(build, entry, arch) for entry, arch in tasks]
        for done, _ in enumerate(as_completed(futures), start=1):
            if progress is not None:
                progress(done, len(tasks))
        return [row for future in futures for row in future.result()]


def _compile_mode() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def build(entry: Entry, arch: int | str) -> list[Row]:
    """One kernel for one chip, and where its keys are split the one that merges what splits give, as `..._merge`.

    Needs a Triton that compiles (not one imported as an interpreter).
    """
    from sparsify.codegen.triton.kernels import interpreting

    if interpreting():
        raise BuildError("kernels can't be compiled while TRITON_INTERPRET=1 (unset it)")
    shape = tiled(entry.launch(), arch)[1]
    name = f"{entry.name}__{entry.dtype}__d{entry.head_dim}__{shape.tile}"
    try:
        found = {name: resources_of(entry.launch(), arch)}
        merge = compile_merge_for(entry.launch(), arch)
        found |= {} if merge is None else {f"{name}_merge": _resources(merge, arch)}
    except Exception as error:
        raise BuildError(f"kernel {name} doesn't build for {arch}: {error}") from error
    chip = arch if isinstance(arch, str) else f"sm_{arch}"
    return [Row(kernel, chip, takes) for kernel, takes in found.items()]


def resources_of(launch: Launch, arch: int | str) -> Resources:
    """What a launch's kernel takes on a chip, built now."""
    return _resources(compile_for(launch, arch), arch)


def _resources(compiled: Any, arch: int | str) -> Resources:
    registers, spills = _amd(compiled) if isinstance(arch, str) else _nvidia(compiled)
    return Resources(registers, spills, compiled.metadata.shared, _matrix(compiled))


def compile_for(launch: Launch, arch: int | str) -> Any:
    """The compiled kernel of a launch (its tensors may be on the meta device) for a chip that need not be here."""
    from sparsify.codegen.triton.arguments import arguments, empty_parts
    from sparsify.codegen.triton.kernels import kernel

    launch, shape = tiled(launch, arch)
    values = arguments(launch, launch.empty_output(), shape, False, empty_parts(launch, shape))
    return _compile(kernel(launch), values, arch, num_warps=shape.num_warps, num_stages=shape.num_stages)


def compile_merge_for(launch: Launch, arch: int | str) -> Any | None:
    """The compiled kernel that merges what splits of a launch's keys give, as `compile_for`; None without splits."""
    from sparsify.codegen.triton.arguments import empty_parts, merge_arguments
    from sparsify.codegen.triton.kernels import merger

    launch, shape = tiled(launch, arch)
    parts = empty_parts(launch, shape)
    if parts is None:
        return None
    return _compile(merger(launch), merge_arguments(launch, launch.empty_output(), shape, False, parts), arch)


def _compile(function: Any, values: dict[str, Any], arch: int | str, **options: int) -> Any:
    """A jitted function compiled for arguments like these, with Triton's options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(function, values)
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)


def _signature(function: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """What Triton's launcher derives from the values: types, compiled-in constants, and what divides by 16."""
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(function.params):
        value = values[parameter.name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        special = is_int and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if hasattr(value, "data_ptr") or (special and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _nvidia(compiled: Any) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _amd(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    # Scalar registers spill into lanes of a vector register, never to memory: what counts is the scratch memory.
    return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.private_segment_fixed_size:\s*(\d+)", text)


def _matrix(compiled: Any) -> str:
    """The instructions of the matrix units, by the name of their family, and tma where descriptors copy the tiles."""
    text = compiled.asm.get("ptx", "") or compiled.asm.get("amdgcn", "")
    units = next((name for name in MATRIX if name in text), "")
    return f"{units}+tma" if "cp.async.bulk.tensor" in text else units


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise BuildError(f"no {pattern} in the build's output")
    return int(found[1])
