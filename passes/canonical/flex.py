"""flex_attention's higher-order operator, opened: the same attention as matmul, score_mod, where, softmax, matmul."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import torch
from torch import fx

from sparsify.op import either


def open_flex(node: fx.Node, args: tuple[Any, ...], whole: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The operator's results, of which the output is either the plain attention or the whole's.

    Before: out = flex_attention(q, k, v, score_mod, block_mask, scale, ...)[0]
    After:  scores = score_mod(q @ kᵀ * scale, b, h, q, k); weights = where(mask_mod(b, h, q, k), scores, -inf).softmax
            out = either(weights @ v, flex_attention(...)[0])

    What the operator computes in eager mode: its block lists only repeat what mask_mod says. The two functions run once
    over broadcast positions; None where they work on more than single elements, the log-sum-exp is used as well, or
    only the block lists may say what is kept.
    """
    if any(user.target is operator.getitem and user.args[1] != 0 and user.users for user in node.users):
        return None
    query, key, value, score_mod, block_mask, scale, _, score_buffers, mask_buffers = args
    if not (_is_elementwise(score_mod, 5) and _is_elementwise(block_mask[-1], 4)):
        return None
    if masks_by_blocks(block_mask):
        return None
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    # Entering a region is traced, too, so only where it matters.
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
        key, value = (_like(tensor, query) for tensor in (key, value))
        scores = (query @ key.transpose(-2, -1) * scale).to(torch.float32)
        positions = [_position(scores, axis) for axis in range(4)]
        kept = block_mask[-1](*positions, *mask_buffers)
        scores = torch.where(kept, score_mod(scores, *positions, *score_buffers), -math.inf)
        plain = torch.softmax(scores, dim=-1).to(query.dtype) @ value
    return (either(plain.to(whole[0].dtype), whole[0]), *whole[1:])


def masks_by_blocks(block_mask: tuple[Any, ...]) -> bool:
    """Whether a block mask has lists of blocks and a mask_mod that keeps everything: the lists, which only a run knows,
    may then say what is kept, and eager mode does not read them.

    block_mask: as the operator has it, its last three the block sizes of queries and keys and mask_mod's graph.
    """
    module = block_mask[-1]
    if min(block_mask[-3:-1]) >= _ONE_BLOCK or not isinstance(module, fx.GraphModule):
        return False
    moving = set(module.graph.find_nodes(op="placeholder")[:4])
    for node in module.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not name.startswith("new_") and any(parent in moving for parent in node.all_input_nodes):
            moving.add(node)
    return module.graph.output_node() not in moving


_ONE_BLOCK = 1 << 30  # the size of the only block where no block mask is given


def _like(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values (B or 1, Hkv, Nk, D) with the query's batch and heads."""
    batch, heads, length, size = query.shape[0], tensor.shape[1], tensor.shape[2], tensor.shape[3]
    group = query.shape[1] // heads
    if group != 1:
        tensor = tensor[:, :, None].expand(-1, heads, group, length, size).flatten(1, 2)
    return tensor if isinstance(tensor.shape[0], int) and tensor.shape[0] == batch else tensor.expand(batch, -1, -1, -1)


def _position(scores: torch.Tensor, axis: int) -> torch.Tensor:
    """The index along one dimension of the scores (B, H, Nq, Nk), broadcast along the others."""
    sizes = [-1 if other == axis else 1 for other in range(4)]
    return torch.arange(scores.shape[axis], device=scores.device).view(sizes)


def _is_elementwise(module: Any, positions: int) -> bool:
    """Whether a graph over single elements means the same over tensors of them: all that depends on them is an element.

    module: Dynamo's graph of score_mod (score, b, h, q, k, buffers ...) or mask_mod (b, h, q, k, buffers ...).
    """
    if not isinstance(module, fx.GraphModule):
        return False
    inputs = module.graph.find_nodes(op="placeholder")
    moving = set(inputs[:positions])
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            return False
        if node.op in ("placeholder", "output") or not any(parent in moving for parent in node.all_input_nodes):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name.startswith("new_"):
            continue
        found = node.meta.get("example_value", node.meta.get("val"))
        if name in _OVER_DIMENSIONS or not isinstance(found, torch.Tensor) or found.dim():
            return False
        moving.add(node)
    return True


# Functions that take a tensor as a whole: of a single element they give an element, too.
_OVER_DIMENSIONS = (
    *("sum", "mean", "prod", "max", "min", "amax", "amin", "any", "all", "argmax", "argmin", "norm", "std", "var"),
    *("softmax", "log_softmax", "logsumexp", "cumsum", "cumprod", "sort", "flip", "roll", "view", "reshape", "squeeze"),
    *("item", "flatten", "size", "numel", "dim", "matmul", "einsum"),
)
