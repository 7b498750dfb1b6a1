"""From a launch to the arguments of its kernel."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sparsify.codegen.triton.printer import longest_last, magnitude, used_loads
from sparsify.codegen.triton.tuning import padded

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch
    from sparsify.program import Program

L2_BYTES = 24 << 20  # for the keys and values of neighbouring programs; chips have 32 MB and more
INT32 = 2**31


def arguments(launch: Launch, out: torch.Tensor, block_m: int, block_n: int, interpret: bool) -> dict[str, Any]:
    """Every argument by name: tensors, strides, sizes, and compiled-in constants. The scale must be above 0."""
    import triton.language as tl

    program, (batch, heads, q_len, head_dim) = launch.program, launch.q.shape
    tensors = {"Q": launch.q, "K": launch.k, "V": launch.v, "OUT": out}
    values: dict[str, Any] = dict(tensors)
    for letter, tensor, axes in zip("qkvo", tensors.values(), ("bhmd", "bhnd", "bhnd", "bhmd"), strict=True):
        values |= _strides(letter, tensor, axes)
    if launch.mask is not None:
        mask = launch.mask.expand(batch, heads, q_len, launch.k.shape[2])
        values |= {"MASK": mask} | _strides("mask", mask, "bhmn")
    values |= load_arguments(launch)
    sizes = program.size_values(launch.k.shape[2])
    values |= {f"size_{i}": size for i, size in enumerate(sizes)}
    values |= {
        "heads": heads,
        "group": heads // launch.k.shape[1],
        "Nq": q_len,
        "N": launch.k.shape[2],
        "q_offset": launch.q_offset,
        "q_tiles": -(-q_len // block_m),
        "all_heads": batch * heads,
        "section": _section(launch),
    }
    early = program.softcap is not None or program.mask == "add"
    values["scale"] = launch.scale * (1.0 if early else 1.4426950408889634)
    return values | {
        "DESCENDING": longest_last(program),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": padded(head_dim),
        "BLOCK_V": padded(launch.v.shape[3]),
        "OFFSETS": tl.int64 if _far(launch, out) else tl.int32,
        "POSITIONS": tl.int64 if _large(launch, sizes) else tl.int32,
        "INTERPRET": interpret,
    }


def _strides(letter: str, tensor: torch.Tensor, axes: str) -> dict[str, int]:
    return {f"{letter}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def load_arguments(launch: Launch) -> dict[str, Any]:
    """The tensors that predicates read, with their lengths and strides."""
    values: dict[str, Any] = {}
    for source, rank in used_loads(launch.program).items():
        tensor = launch.loads[int(source[1:])]
        values[source] = tensor
        for axis in range(rank):
            values[f"{source}_length_{axis}"] = tensor.shape[axis]
            values[f"{source}_stride_{axis}"] = tensor.stride(axis)
    return values


def _section(launch: Launch) -> int:
    """How many query heads run side by side: as many as have keys and values that fit the L2 cache together."""
    batch, heads, _, head_dim = launch.q.shape
    kv_heads, k_len = launch.k.shape[1:3]
    bytes_per_head = k_len * (head_dim + launch.v.shape[3]) * launch.k.element_size()
    return min(batch * heads, max(1, L2_BYTES // bytes_per_head) * (heads // kv_heads))


def _far(launch: Launch, out: torch.Tensor) -> bool:
    """Whether an offset inside a tile, or into a load, can pass 32 bits."""
    inside = (launch.q, launch.k, launch.v, out)
    reach = max(256 * sum(map(abs, tensor.stride()[2:])) for tensor in inside)
    if launch.mask is not None:
        reach = max(reach, (launch.k.shape[2] + 256) * sum(map(abs, launch.mask.stride()[-2:])))
    for load in launch.loads:
        reach = max(reach, sum((n - 1) * abs(s) for n, s in zip(load.shape, load.stride(), strict=True)))
    return reach >= INT32


def _large(launch: Launch, sizes: list[int]) -> bool:
    """Whether some part of a predicate can pass 32 bits."""
    import torch

    batch, heads, q_len, _ = launch.q.shape
    k_len = launch.k.shape[2]
    reach = max(k_len + 512, abs(launch.q_offset) + q_len + 512)  # tiles end past the last position
    ranges = [_power(n) for n in (batch, heads, k_len, q_len, reach, *sizes)]
    narrow = (torch.bool, torch.uint8, torch.int8, torch.int16)
    bits = tuple(16 if load.dtype in narrow else 31 if load.dtype == torch.int32 else 0 for load in launch.loads)
    return _large_in(launch.program, tuple(ranges), bits)


def _power(n: int) -> int:
    return 1 << abs(n).bit_length()


@functools.lru_cache(maxsize=4096)
def _large_in(program: Program, ranges: tuple[int, ...], bits: tuple[int, ...]) -> bool:
    limits = dict(zip(("b", "h", "N", "Nq", "q"), ranges, strict=False)) | {"k": ranges[4]}
    limits |= dict(zip(program.sizes(), ranges[5:], strict=True))
    limits |= {f"_{i}": 2**b for i, b in enumerate(bits)}  # 64-bit loads widen by themselves
    return any(magnitude(keep, limits) >= INT32 for keep in program.keep)
