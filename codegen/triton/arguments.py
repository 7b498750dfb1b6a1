"""From a launch to the arguments of its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify.codegen.triton.printer import LOG2_E, longest_last, units, used_loads
from sparsify.codegen.triton.ranges import exact, far, large
from sparsify.codegen.triton.summaries import summary_arguments
from sparsify.codegen.triton.tuning import padded

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch

L2_BYTES = 24 << 20  # for the keys and values of neighbouring programs; chips have 32 MB and more


def arguments(launch: Launch, out: torch.Tensor, block_m: int, block_n: int, interpret: bool) -> dict[str, Any]:
    """Every argument by name: tensors, strides, sizes, and compiled-in constants. The scale must be above 0."""
    import triton.language as tl

    program, (batch, heads, q_len, head_dim) = launch.program, launch.q.shape
    tensors = {"Q": launch.q, "K": launch.k, "V": launch.v, "OUT": out}
    values: dict[str, Any] = dict(tensors)
    for letter, tensor, axes in zip("qkvo", tensors.values(), ("bhmd", "bhnd", "bhnd", "bhmd"), strict=True):
        values |= _strides(letter, tensor, axes)
    values |= load_arguments(launch) | summary_arguments(launch)
    values |= {f"size_{i}": size for i, size in enumerate(program.size_values(launch.k.shape[2]))}
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
    natural = program.softcap is not None or units(program) == "natural"
    values["scale"] = launch.scale * (1.0 if natural else LOG2_E)
    return values | {
        "DESCENDING": longest_last(program),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": padded(head_dim),
        "BLOCK_V": padded(launch.v.shape[3]),
        "OFFSETS": tl.int64 if far(launch, out) else tl.int32,
        "POSITIONS": tl.int64 if large(launch) else tl.int32,
        "NUMBERS": tl.float32 if exact(launch) else tl.int64,
        "INTERPRET": interpret,
    }


def _strides(letter: str, tensor: torch.Tensor, axes: str) -> dict[str, int]:
    return {f"{letter}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def load_arguments(launch: Launch) -> dict[str, Any]:
    """The tensors that predicates and biases read, with their lengths and strides."""
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
