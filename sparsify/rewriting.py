"""`sparsify.rewrite`: the passes on a graph that somebody already has, such as an exported program's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses import FakeTensorMode

from sparsify.backend import check_rules, report_refusals, run_passes
from sparsify.errors import InputError
from sparsify.options import Options
from sparsify.passes import Capture

BACKENDS = ("inner", "verify")  # options of the backend that say nothing of a graph


def rewrite(
    module: fx.GraphModule, *, spec: Any = None, args: Sequence[Any] | None = None, **options: Any
) -> fx.GraphModule:
    """A module that computes what `module` does, with its attention rewritten as the backend would; for inference.

    `module` is `torch.export.export(...).module()`, or any graph whose inputs carry their fake tensors; for one that
    doesn't, `args` are example inputs. It stays as it is, and shares its parameters with the result, which has the
    same signature and can be exported again, saved, and loaded where `sparsify.op` is imported. `options` are those of
    the backend but for `inner` and `verify`. Refused sites are logged, and raise RefusedError under `strict`.

    Raises InputError for what is no such module, and SpecError for a rule that fits no site.
    """
    unknown = [name for name in BACKENDS if name in options]
    if unknown:
        raise InputError(f"rewrite: option '{unknown[0]}' is the backend's; it has no meaning for a graph")
    if not isinstance(module, fx.GraphModule):
        raise InputError(f"rewrite: expected an fx.GraphModule, such as ep.module(), found {type(module).__name__}")
    chosen = Options.read({**options, "spec": spec}, without=BACKENDS)
    mode, inputs = _fakes(module, args)
    lifted, held = _lifted(module)
    values = [mode.from_tensor(_attribute(module, name), static_shapes=True) for name in held]
    capture = Capture(lifted, [*inputs, *values])
    with torch.no_grad(), tracing(TracingContext(mode)):
        run_passes(capture, chosen, placed=True)
    if chosen.spec is not None and not capture.failure:
        check_rules(chosen.spec, capture.sites)
    report_refusals(capture.sites, chosen.strict, chosen.spec)
    return _with_attributes(capture.module, module, held)


def _fakes(module: fx.GraphModule, args: Sequence[Any] | None) -> tuple[FakeTensorMode, list[Any]]:
    """The fake mode of a graph and its inputs as fake tensors and numbers, from its own metadata or from examples."""
    inputs = module.graph.find_nodes(op="placeholder")
    known = [node.meta.get("val", node.meta.get("example_value", ...)) for node in inputs]
    mode = detect_fake_mode([value for value in known if isinstance(value, torch.Tensor)])
    if mode is not None and ... not in known:
        return mode, known
    given = None if args is None else torch.utils._pytree.tree_leaves(tuple(args))
    if given is None or len(given) != len(inputs):
        found = "none were given" if given is None else f"{len(given)} were given"
        raise InputError(
            f"rewrite: the graph's {len(inputs)} inputs have no fake tensors: args must give as many; {found}"
        )
    mode = FakeTensorMode()
    return mode, [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in given]


def _lifted(module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A copy whose parameters, buffers and constants are inputs behind its own; their names. Its inputs are flat."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    inputs = module.graph.find_nodes(op="placeholder")
    for node in inputs:
        nodes[node] = graph.node_copy(node)
    attributes = [node for node in module.graph.find_nodes(op="get_attr") if _is_tensor(module, node)]
    held = list(dict.fromkeys(str(node.target) for node in attributes))
    shared = {name: graph.placeholder(f"held_{i}") for i, name in enumerate(held)}
    nodes |= {node: shared[str(node.target)] for node in attributes}
    for node in module.graph.nodes:
        # What export checks of its inputs' sizes is checked again when the result is exported.
        if node not in nodes and node.target != "_guards_fn":
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
    return fx.GraphModule(module, graph), held


def _is_tensor(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(_attribute(module, str(node.target)), torch.Tensor)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _with_attributes(rewritten: fx.GraphModule, module: fx.GraphModule, held: list[str]) -> fx.GraphModule:
    """The rewritten graph with its last inputs as attributes again, those of `module`, and with its signature."""
    graph = rewritten.graph
    behind = graph.find_nodes(op="placeholder")[-len(held) :] if held else []
    for node, name in zip(behind, held, strict=True):
        with graph.inserting_after(behind[-1]):
            attribute = graph.create_node("get_attr", name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
    for node in behind:
        graph.erase_node(node)
    graph.set_codegen(module.graph._codegen)
    others = [str(node.target) for node in graph.find_nodes(op="get_attr") if node.target not in held]
    attributes = {name: _attribute(module, name) for name in held}
    attributes |= {name: _attribute(rewritten, name) for name in others}
    made = fx.GraphModule(attributes, graph)
    made.meta.update(module.meta)
    return made
