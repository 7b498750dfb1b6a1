"""From a launch to the arguments of its kernel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparsify.codegen.triton.listing import rounds
from sparsify.codegen.triton.printer import LOG2_E, longest_last, skip_arguments, units, used_loads
from sparsify.codegen.triton.ranges import exact, far, large, slots
from sparsify.codegen.triton.summaries import summary_arguments
from sparsify.codegen.triton.tuning import Shape, padded
from sparsify.patterns.lists import lists

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch

L2_BYTES = 24 << 20  # for the keys and values of neighbouring programs; chips have 32 MB and more


def arguments(launch: Launch, out: torch.Tensor, shape: Shape, interpret: bool) -> dict[str, Any]:
    """Every argument by name: tensors, strides, sizes, and compiled-in constants. The scale must be above 0.

    The launch is one that `tiled` gave, together with the shape.
    """
    import triton.language as tl

    program, (batch, heads, q_len, head_dim), (q_slots, k_slots) = launch.program, launch.q.shape, slots(launch)
    tensors = {"Q": launch.q, "K": launch.k, "V": launch.v, "OUT": out}
    values: dict[str, Any] = dict(tensors)
    for letter, tensor, axes in zip("qkvo", tensors.values(), ("bhmd", "bhnd", "bhnd", "bhmd"), strict=True):
        values |= _strides(letter, tensor, axes)
    values |= {} if launch.lse is None else {"LSE": launch.lse}
    values |= load_arguments(launch) | summary_arguments(launch)
    values |= {f"size_{i}": size for i, size in enumerate(program.size_values(launch.k.shape[2]))}
    values |= {
        "heads": heads // shape.heads,
        "group": heads // launch.k.shape[1],
        "Nq": q_len,
        "N": launch.k.shape[2],
        "q_offset": launch.q_offset,
        "q_tiles": -(-q_slots // shape.rows),
        "all_heads": batch * heads // shape.heads,
        "section": max(1, _section(launch) // shape.heads),
    }
    values |= {"q_slots": q_slots} if program.queries else {}
    values |= {"k_slots": k_slots} if program.keys else {}
    values |= {"QUERIES": shape.rows, "PACK": shape.heads} if rounds(program) else {}
    base = math.log(2) if units(program) == "natural" else 1.0
    values |= {name: skip.below(launch.k.shape[2]) * base for name, skip in skip_arguments(program)}
    natural = program.softcap is not None or units(program) == "natural"
    values["scale"] = launch.scale * (1.0 if natural else LOG2_E)
    return values | {
        "DESCENDING": longest_last(program),
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
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
    in_rows = {one.index.source for keep in launch.program.keep for one in lists(keep)}
    for source, rank in used_loads(launch.program).items():
        tensor = launch.loads[int(source[1:])]
        if source in in_rows and tensor.stride(-1) != 1:  # the kernel steps from element to element of a list
            tensor = tensor.contiguous()
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
