"""vmap regions of Dynamo's graph, written out: pre-dispatch tracing can't see through them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import pop_dynamic_layer_stack
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

ENTER = torch._functorch.predispatch._vmap_increment_nesting
LEAVE = torch._functorch.predispatch._vmap_decrement_nesting
PREPARE = torch._functorch.predispatch.lazy_load_decompositions
TRANSFORMS = "torch._functorch.predispatch"


def without_vmap(module: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """The same computation in which each outermost vmap region is the ATen operations that it comes to.

    Before: x = _add_batch_dim(rows, 0, level); y = x.ge(_add_batch_dim(columns, 0, level + 1)); _remove_batch_dim(y)
    After:  view(rows, [n, 1]); ge(...): what batching rules make of it, traced over the nodes' fake tensors.

    Gives `module` itself where there is none. Raises NotImplementedError for other function transforms.
    """
    regions = list(_regions(module.graph))
    if not regions:
        return module
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    inside = {node: region for region in regions for node in region}
    for node in module.graph.nodes:
        region = inside.get(node)
        if region is None:
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
            if hasattr(node, "_dynamo_source"):
                nodes[node]._dynamo_source = node._dynamo_source
        elif node is region[-1]:
            nodes |= _written_out(module, mode, region, nodes, graph)
    copy = fx.GraphModule(module, graph)
    copy.meta.update(module.meta)
    return copy


def is_transform(node: fx.Node) -> bool:
    """Whether a node opens, closes or moves tensors in or out of a function transform."""
    return getattr(node.target, "__module__", "") == TRANSFORMS and node.target is not PREPARE


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if depth == 0 and node.target is ENTER:
            found.append([])
        depth += node.target is ENTER
        if depth:
            found[-1].append(node)
        elif is_transform(node):
            raise NotImplementedError(f"{node.target.__name__}: a function transform other than vmap")
        depth -= node.target is LEAVE
    return found


def _written_out(
    module: fx.GraphModule,
    mode: FakeTensorMode,
    region: list[fx.Node],
    nodes: dict[fx.Node, fx.Node],
    graph: fx.Graph,
) -> dict[fx.Node, fx.Node]:
    """Appends a region's operations to a graph; gives the nodes that stand for those that are used outside of it."""
    members = set(region)
    inputs = list(dict.fromkeys(arg for node in region for arg in node.all_input_nodes if arg not in members))
    held = [node for node in inputs if node.op == "get_attr"]
    inputs = [node for node in inputs if node.op != "get_attr"]
    used = [node for node in region if any(user not in members for user in node.users)]
    part, copied = fx.Graph(), {}
    for node in inputs:
        copied[node] = part.placeholder(node.name)
    for node in (*held, *region):
        copied[node] = part.node_copy(node, lambda old: copied[old])
    part.output(tuple(copied[node] for node in used))
    with mode, _balanced():
        traced = make_fx(fx.GraphModule(module, part))(*(_alike(node.meta["example_value"]) for node in inputs))
    return dict(zip(used, _appended(traced, graph, [nodes[node] for node in inputs], region[0]), strict=True))


@contextlib.contextmanager
def _balanced() -> Iterator[None]:
    """Leaves the vmap levels that an exception has left open: guards look at them."""
    before = len(retrieve_all_functorch_interpreters())
    try:
        yield
    finally:
        while len(retrieve_all_functorch_interpreters()) > before:
            pop_dynamic_layer_stack()


def _alike(value: Any) -> Any:
    """A number itself; a tensor of the fake mode that is on."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _appended(traced: fx.GraphModule, graph: fx.Graph, inputs: list[fx.Node], origin: fx.Node) -> list[Any]:
    placed: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "output":
            return [placed[found] for found in node.args[0]]
        if node not in placed:
            if node.op == "get_attr":
                raise NotImplementedError(f"a vmap region that holds the constant {node.target}")
            placed[node] = graph.node_copy(node, lambda old: placed[old])
            placed[node].meta |= {
                key: origin.meta[key] for key in ("nn_module_stack", "stack_trace") if key in origin.meta
            }
    raise AssertionError("a graph without an output")
