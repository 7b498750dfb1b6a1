"""Canonicalise: re-trace Dynamo's graph to pre-dispatch ATen, so that one spelling is left of each operation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx, snapshot_fake

from sparsify.passes.canonical.interpreter import Interpreter
from sparsify.passes.canonical.vmap import is_transform, without_vmap
from sparsify.passes.nodes import ATEN
from sparsify.passes.runner import Capture

log = logging.getLogger("sparsify")


@dataclass(frozen=True)
class Canonicalise:
    """Many spellings to one.

    Before: `q @ k.mT`, `torch.bmm`, `F.softmax(x, dim=-1)`, `x.softmax(-1)`, `x.float()`, `x[:, None]`, ...
    After:  aten.matmul, aten.bmm, aten.softmax.int, aten.to.dtype, aten.unsqueeze, ... and still whole:
            aten.scaled_dot_product_attention, aten.linear, aten.einsum.

    vmap regions are written out; graphs that a higher-order operator only calls (checkpoints, compiled regions) run in
    its place; operators that hide an attention (flex_attention, torch's fused layers) get the same in plain operators
    beside them, `either` of which is taken once it is known whether the attention was rewritten (`Settle`).

    Sources of floats and sizes, guards and module paths are those of Dynamo: the trace runs on the fake tensors of
    its own tracing context. Where that refuses, Dynamo's graph stays, with SDPA under its ATen name.
    """

    def __call__(self, capture: Capture) -> None:
        original = capture.module
        try:
            capture.module, followed = retrace(original, capture.example_inputs)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            capture.notes.append(f"the graph could not be re-traced ({reason}); only its SDPA calls are matched")
            log.debug("re-tracing failed", exc_info=True)
            capture.module = rename(original)
        else:
            capture.frozen = followed[0] if followed else ""
        _drop_checks(capture.graph)
        capture.graph.eliminate_dead_code()


def _drop_checks(graph: fx.Graph) -> None:
    """Removes what only asserts the dtype that tracing saw: it would count as a reader of scores and masks."""
    for node in graph.find_nodes(op="call_function", target=ATEN._assert_tensor_metadata.default):
        graph.erase_node(node)


def retrace(module: fx.GraphModule, example_inputs: list[Any]) -> tuple[fx.GraphModule, list[str]]:
    """The same computation as pre-dispatch ATen: a new module with the inputs, metadata and module paths of the old.

    Also the names of the operators that are gone from it though autograd should have met them.
    """
    context = torch._guards.TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    fakes = [_fake(value, mode, context) for value in example_inputs]
    plain = without_vmap(module, mode)
    followed: list[str] = []
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(_interpreted(plain, followed), pre_dispatch=True)(*fakes)
    _adopt(traced, module)
    return traced, followed


def _interpreted(module: fx.GraphModule, followed: list[str]) -> Any:
    def run(*args: Any) -> Any:
        interpreter = Interpreter(module, followed)
        try:
            return interpreter.run(*args)
        finally:
            interpreter.leave()

    return run


def _fake(value: Any, mode: Any, context: Any) -> Any:
    """The fake tensor that the tracing context means by an input (as AOTAutograd asks for it), detached.

    A Python float comes as a tensor without dimensions whose item is a symbol; detaching must not lose it.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, torch._subclasses.FakeTensor):
        fake = value if value.fake_mode is mode else mode.from_tensor(value)
    else:
        symbolic = context.tensor_to_context.get(value)
        source = symbolic.tensor_source if symbolic is not None else None
        fake = mode.from_tensor(value, static_shapes=False, symbolic_context=symbolic, source=source, trace=False)
    item = getattr(fake, "item_memo", None)
    detached = snapshot_fake(fake).requires_grad_(fake.requires_grad)
    if item is not None:
        detached.item_memo = item
    return detached


def _adopt(traced: fx.GraphModule, module: fx.GraphModule) -> None:
    """Gives a re-traced module what compilers read from Dynamo's: input names, sources and metadata."""
    traced.meta.update(module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(module, name):
            setattr(traced, name, getattr(module, name))
    olds = module.graph.find_nodes(op="placeholder")
    news = traced.graph.find_nodes(op="placeholder")
    assert len(olds) == len(news), "re-tracing changed the number of inputs"
    for old, new in zip(olds, news, strict=True):
        new.meta.update({key: item for key, item in old.meta.items() if key not in new.meta})
        new.name, new.target = old.name, old.target
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


def rename(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph in which SDPA calls have their ATen name: what is matched when re-tracing refuses.

    Raises NotImplementedError for function transforms: nodes that only open and close them look like dead code.
    """
    if any(is_transform(node) for node in module.graph.nodes):
        raise NotImplementedError("a function transform that could not be written out")
    nodes: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    for node in module.graph.nodes:
        nodes[node] = graph.node_copy(node, lambda old: nodes[old])
        if "example_value" in node.meta:  # as Dynamo calls what a trace has under "val"
            nodes[node].meta.setdefault("val", node.meta["example_value"])
        if node.target is torch._C._nn.scaled_dot_product_attention:
            _as_aten(nodes[node])
        if hasattr(node, "_dynamo_source"):
            nodes[node]._dynamo_source = node._dynamo_source
    copy = fx.GraphModule(module, graph)
    _adopt(copy, module)
    return copy


def _as_aten(node: fx.Node) -> None:
    names = [arg.name for arg in ATEN.scaled_dot_product_attention.default._schema.arguments]
    node.args = (*node.args, *(node.kwargs[name] for name in names[len(node.args) : 3]))
    node.kwargs = {name: given for name, given in node.kwargs.items() if name in names[len(node.args) :]}
    node.target = ATEN.scaled_dot_product_attention.default
