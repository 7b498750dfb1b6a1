"""What the store of tuned kernels says of Triton kernels, and what there is to try for one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from sparsify.codegen.target import dtype_name
from sparsify.codegen.tuned import FEW, check_values, code_version, kernel_key
from sparsify.errors import InputError
from sparsify.runtime import tuned

if TYPE_CHECKING:
    from sparsify.codegen.target import Launch
    from sparsify.codegen.triton.tuning import Shape
    from sparsify.runtime.tunings import Key, Tuned

# What each field of a launch shape may be.
ALLOWED: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
    "described": (0, 1),
    "l2_mib": (6, 12, 24, 48, 96),
    "splits": (0, 1, 2, 4, 8, 16, 32, 64),  # of the keys of few queries; 0 for as many as keep a chip busy
}
TILES = {  # block_m, block_n and warps of half precision and of float32
    True: [(m, n, w) for m in (64, 128, 256) for n in (32, 64, 128) for w in (4, 8) if m * n <= 128 * 128],
    False: [(m, n, w) for m in (16, 32, 64) for n in (16, 32, 64) for w in (4, 8)],
}


def machine(launch: Launch, arch: int | str | None) -> str:
    """The GPU's name; where there is none, the architecture that is built for, or the interpreter."""
    import torch

    if launch.q.is_cuda:
        return torch.cuda.get_device_name(launch.q.device)
    return "Triton's interpreter" if arch is None else arch if isinstance(arch, str) else f"sm_{arch}"


@functools.lru_cache(maxsize=1)
def software() -> str:
    """What prints and what compiles."""
    try:
        return f"{code_version('sparsify.codegen.triton')}, triton {version('triton')}"
    except PackageNotFoundError:
        return f"{code_version('sparsify.codegen.triton')}, no triton"


def check(values: Mapping[str, int]) -> None:
    """Raises InputError for a field that isn't there, or a value that it can't have."""
    check_values(values, ALLOWED)


def key(launch: Launch, arch: int | str | None = None) -> Key:
    """Under which the store has a launch's kernel; arch: that is built for where there is no GPU.

    The kernel's name ends in the tile that it has by default: what is tuned is what differs from that, and on top of
    another length's default it would be a shape that nobody has tried, and that may not even fit.
    """
    from sparsify.codegen.triton.tuning import untuned

    sizes = dtype_name(launch.q.dtype), launch.q.shape[3], launch.v.shape[3]
    kernel, usual = kernel_key(launch.program, *sizes, launch.q.shape[2]), untuned(launch, _arch(launch, arch))
    return machine(launch, arch), software(), "triton", f"{kernel}__{usual.tile}"


def ahead_key(launch: Launch) -> Key:
    """Under which there is what was built ahead of time for the chip of a launch's GPU."""
    arch = _arch(launch, None)
    return f"sm_{arch}" if isinstance(arch, int) else str(arch), *key(launch)[1:]


def tuned_shape(launch: Launch, arch: int | str | None, shape: Shape) -> Shape:
    """A launch's shape as it was tuned, but for its splits; as it is where it wasn't."""
    values = {name: value for name, value in _tuned(launch, arch).items() if name != "splits"}
    return replace(shape, **{name: bool(value) if name == "described" else value for name, value in values.items()})


def tuned_splits(launch: Launch, arch: int | str | None) -> int:
    """Between how many tiles a launch's keys are split as it was tuned; 0 where it wasn't."""
    return _tuned(launch, arch).get("splits", 0)


def _tuned(launch: Launch, arch: int | str | None) -> Mapping[str, int]:
    values = tuned.lookup(key(launch, arch))
    try:
        check(values)
    except InputError:
        return {}  # `sparsify doctor` says what is wrong with the store
    return values


def default(launch: Launch, arch: int | str | None = None) -> dict[str, int]:
    """Every field as it is by default."""
    from sparsify.codegen.triton.tuning import untuned

    shape = untuned(launch, _arch(launch, arch))
    return {name: int(getattr(shape, name)) for name in ALLOWED if name != "splits"} | {"splits": 0}


def groups(launch: Launch, arch: int | str | None = None) -> list[list[Mapping[str, int]]]:
    """What to try, group by group: each changes the best that was found in those before it."""
    usual = default(launch, arch)
    if launch.q.shape[2] <= FEW:
        tiles = [{"block_n": n, "num_warps": w} for n in (32, 64, 128) for w in (2, 4, 8)]
    else:
        half = dtype_name(launch.q.dtype) != "float32"
        tiles = [{"block_m": m, "block_n": n, "num_warps": w} for m, n, w in TILES[half]]
    tiles.sort(key=lambda values: sum(value != usual[name] for name, value in values.items()))
    tiles = list({_tile(launch, arch, values): values for values in reversed(tiles)}.values())[::-1]
    others = ["num_stages", "splits" if launch.q.shape[2] <= FEW else "l2_mib"]
    others += ["described"] if usual["described"] else []
    return [tiles, *([{name: value} for value in ALLOWED[name]] for name in others)]


def _tile(launch: Launch, arch: int | str | None, values: Mapping[str, int]) -> Shape:
    """What the launch's tiles are with these values: several may come to the same."""
    from sparsify.codegen.triton.tuning import clamped, untuned

    found = _arch(launch, arch)
    return clamped(launch.program, replace(untuned(launch, found), **values), found)


def holds(entry: Tuned) -> bool:
    """Whether an entry of a store is for this machine and software."""
    import torch

    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return entry.machine in names and entry.software == software()


def _arch(launch: Launch, arch: int | str | None) -> int | str | None:
    from sparsify.codegen.triton.kernels import architecture

    return architecture(launch.q.device.index) if launch.q.is_cuda else arch
