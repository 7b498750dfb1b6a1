"""From a launch to the arguments of its kernel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparsify.codegen.triton.listing import packing, rounds
from sparsify.codegen.triton.printer import LOG2_E, longest_last, skip_arguments, units, used_loads
from sparsify.codegen.triton.ranges import exact, far, large, slots
from sparsify.codegen.triton.summaries import summary_arguments
from sparsify.codegen.triton.tuning import Shape, padded, section
from sparsify.patterns.lists import lists

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch


Parts = tuple["torch.Tensor", "torch.Tensor"]


def empty_parts(launch: Launch, shape: Shape) -> Parts | None:
    """Where splits write: their outputs before the last division, float32 (splits, B, Hq, Nq, Dv), and each row's
    largest score and sum of weights (2, splits, B, Hq, Nq); None without splits."""
    if shape.splits == 1:
        return None
    import torch

    rows = (shape.splits, *launch.q.shape[:3])
    return tuple(launch.q.new_empty(size, dtype=torch.float32) for size in ((*rows, launch.v.shape[3]), (2, *rows)))


def arguments(
    launch: Launch, out: torch.Tensor, shape: Shape, interpret: bool, parts: Parts | None = None
) -> dict[str, Any]:
    """Every argument by name: tensors, strides, sizes, and compiled-in constants. The scale must be above 0.

    The launch is one that `tiled` gave, together with the shape.
    """
    return tensor_arguments(launch, out, shape, parts) | _numbers(launch, out, shape, interpret)


def tensor_arguments(launch: Launch, out: torch.Tensor, shape: Shape, parts: Parts | None = None) -> dict[str, Any]:
    """The tensors among the arguments, or what stands for them; summaries of loads are made here."""
    values: dict[str, Any] = {"Q": launch.q, "K": launch.k, "V": launch.v, "OUT": out}
    if _described(launch, shape):
        values |= {"K": _descriptor(launch.k, shape), "V": _descriptor(launch.v, shape)}
    if launch.program.queries is None:
        values["PARTS"], values["STATISTICS"] = parts or (out, out)
    values |= {} if launch.lse is None else {"LSE": launch.lse}
    return values | _load_tensors(launch) | summary_arguments(launch)


def merge_arguments(launch: Launch, out: torch.Tensor, shape: Shape, interpret: bool, parts: Parts) -> dict[str, Any]:
    """Those of the kernel that merges what splits wrote."""
    values = {"PARTS": parts[0], "STATISTICS": parts[1], "OUT": out}
    values |= {} if launch.lse is None else {"LSE": launch.lse}
    values |= _strides("o", out, "bhmd")
    heads, q_len = launch.q.shape[1:3]
    values |= {"all_heads": heads, "Nq": q_len, "rows": launch.q.shape[0] * heads * q_len}
    return values | {"SPLITS": shape.splits, "BLOCK_V": padded(launch.v.shape[3]), "INTERPRET": interpret}


def _numbers(launch: Launch, out: torch.Tensor, shape: Shape, interpret: bool) -> dict[str, Any]:
    """All other arguments: the same for all launches of the same shapes and strides."""
    import triton.language as tl

    program, (batch, heads, q_len, head_dim), (q_slots, k_slots) = launch.program, launch.q.shape, slots(launch)
    values: dict[str, Any] = {}
    tensors, axes = (launch.q, launch.k, launch.v, out), ("bhmd", "bhnd", "bhnd", "bhmd")
    for letter, tensor, names in zip("qkvo", tensors, axes, strict=True):
        values |= _strides(letter, tensor, names)
    values |= _load_numbers(launch)
    values |= {f"size_{i}": size for i, size in enumerate(program.size_values(launch.k.shape[2]))}
    values |= {
        "heads": heads // shape.heads,
        "group": heads // launch.k.shape[1],
        "Nq": q_len,
        "N": launch.k.shape[2],
        "q_offset": launch.q_offset,
        "q_tiles": -(-q_slots // shape.rows),
        "all_heads": batch * heads // shape.heads,
        "section": section(launch, shape),
    }
    values |= {"q_slots": q_slots} if program.queries else {}
    values |= {"k_slots": k_slots} if program.keys else {"DESCRIBED": _described(launch, shape)}
    values |= {"QUERIES": shape.rows, "PACK": shape.heads} if packing(program) else {}
    values |= {} if program.queries else {"SPLITS": shape.splits}
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


def _described(launch: Launch, shape: Shape) -> bool:
    """Whether tensor descriptors say where keys and values lie: rows of whole 16 bytes, one by one in memory."""
    return (
        shape.described
        and launch.program.keys is None
        and all(turn.unit % shape.block_n == 0 for turn in rounds(launch.program))
        and all(
            tensor.stride(3) == 1
            and (tensor.is_meta or tensor.data_ptr() % 16 == 0)
            and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
            for tensor in (launch.k, launch.v)
        )
    )


def _descriptor(tensor: torch.Tensor, shape: Shape) -> Any:
    """A tensor descriptor of keys or values (B, Hkv, N, D), whose block is a key tile of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, 1, shape.block_n, padded(tensor.shape[3])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _strides(letter: str, tensor: torch.Tensor, axes: str) -> dict[str, int]:
    return {f"{letter}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def _load_tensors(launch: Launch) -> dict[str, torch.Tensor]:
    """The tensors that predicates and biases read."""
    program, found = launch.program, {}
    in_rows = {one.index.source for keep in program.keep for one in lists(keep)} if launch.loads else set()
    for source in used_loads(program):
        tensor = launch.loads[int(source[1:])]
        # The kernel steps from element to element of a list.
        found[source] = tensor.contiguous() if source in in_rows and tensor.stride(-1) != 1 else tensor
    return found


def _load_numbers(launch: Launch) -> dict[str, int]:
    """Their lengths and strides."""
    ranks, found = used_loads(launch.program), {}
    for source, tensor in _load_tensors(launch).items():
        for axis in range(ranks[source]):
            found[f"{source}_length_{axis}"] = tensor.shape[axis]
            found[f"{source}_stride_{axis}"] = tensor.stride(axis)
    return found
