"""Where queries and keys come from: one sequence (self) or two (cross), or the parameters of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx

from sparsify.passes.nodes import is_tensor, op, same, shape

PROJECTIONS = {"linear": 0, "addmm": 1, "mm": 0, "matmul": 0, "conv1d": 0}
PRODUCTS = (*PROJECTIONS, "bmm", "baddbmm", "einsum", "tensordot", "conv2d", "conv3d", "embedding")


def kind_of(q: fx.Node, k: fx.Node) -> Literal["self", "cross"]:
    """Self if a projection behind q and one behind k read the same tensor, cross if they read different ones."""
    ours, theirs = projected(q), projected(k)
    if ours and theirs:
        return "self" if ours & theirs else "cross"
    return "self" if same(shape(q)[2], shape(k)[2]) or _is_extended(k, shape(q)[2]) else "cross"


EXTENDING = ("cat", "index_copy", "index_copy_", "index_put", "index_put_", "slice_scatter", "scatter", "scatter_")


def _is_extended(k: fx.Node, rows: Any) -> bool:
    """Whether keys are a cache that as many keys as there are queries were put into."""
    while op(k) not in EXTENDING:
        if not op(k) or not k.args or not is_tensor(k.args[0]) or len(k.all_input_nodes) > 2:
            return False
        k = k.args[0]
    parts = [node for node in k.all_input_nodes if is_tensor(node) and len(shape(node)) >= 2]
    return len(parts) >= 2 and any(
        same(shape(node)[dim], rows) for node in parts for dim in (-2, -3)[: len(shape(node)) - 1]
    )


def projected(node: fx.Node, limit: int = 100) -> set[fx.Node]:
    """The inputs of the nearest projections behind a node."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    queue = [node]
    while queue and len(seen) < limit:
        current = queue.pop()
        if current in seen or not is_tensor(current):
            continue
        seen.add(current)
        position = PROJECTIONS.get(op(current))
        if position is not None:
            found.add(_origin(current.args[position]))
        else:
            queue.extend(current.all_input_nodes)
    return found


def _origin(node: fx.Node) -> fx.Node:
    """The tensor behind views and casts that only prepare it for a projection."""
    while op(node) in ("view", "reshape", "to", "contiguous", "transpose", "permute", "clone"):
        node = node.args[0]
    return node


def weights_of(graph: fx.Graph, example_inputs: Sequence[Any]) -> set[fx.Node]:
    """The parameters and the tensors that are made of parameters alone without a projection: codebooks, queries."""
    found: set[fx.Node] = set()
    inputs = iter(example_inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            weight = isinstance(next(inputs, None), torch.nn.Parameter)
        elif node.op == "get_attr":
            weight = is_tensor(node)
        else:
            tensors = [one for one in node.all_input_nodes if is_tensor(one)]
            weight = bool(tensors) and op(node) not in PRODUCTS and all(one in found for one in tensors)
        if weight:
            found.add(node)
    return found
