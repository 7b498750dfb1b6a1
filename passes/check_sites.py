"""Check sites: refuse those whose tensors a kernel can't take, or whose gradient somebody needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.op import DTYPES
from sparsify.passes.nodes import ancestors, is_tensor, op, same, shape, value
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site


@dataclass(frozen=True)
class CheckSites:
    """Refuses sites; changes nothing else.

    Before: every site that was found.
    After:  sites that need gradients, have other dtypes than float32, bfloat16 and float16, shapes that don't fit, or
            inputs that are changed in place between their use and the output, carry a Refusal.
    """

    def __call__(self, capture: Capture) -> None:
        needed = nodes_with_gradient(capture)
        order = {node: position for position, node in enumerate(capture.graph.nodes)}
        writes = list(mutations(capture.graph))
        for site in capture.open_sites():
            _check_gradient(site, needed)
            _check_tensors(site)
            _check_mutations(site, order, writes)
            if capture.frozen:
                site.refuse(f"{capture.frozen} is in a graph that is trained", "call the model under torch.no_grad()")


def nodes_with_gradient(capture: Capture) -> set[fx.Node]:
    """The nodes whose value autograd tracks: computed while grad mode is on from an input that requires a gradient."""
    found: set[fx.Node] = set()
    enabled = torch.is_grad_enabled()
    inputs = iter(capture.example_inputs)
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            given = next(inputs, None)
            tracked = isinstance(given, torch.Tensor) and given.requires_grad
        elif node.op == "get_attr":
            tracked = is_tensor(node) and value(node).requires_grad
        elif node.target is torch._C._set_grad_enabled:
            enabled, tracked = bool(node.args[0]), False
        else:
            tracked = enabled and op(node) not in ("detach", "detach_") and _is_float(node)
            tracked = tracked and any(parent in found for parent in node.all_input_nodes)
        if tracked:
            found.add(node)
    return found if torch.is_grad_enabled() or enabled else set()


def _is_float(node: fx.Node) -> bool:
    found = value(node)
    return not isinstance(found, torch.Tensor) or found.is_floating_point()


def _check_gradient(site: Site, needed: set[fx.Node]) -> None:
    if site.output in needed:
        site.refuse(
            "the output needs gradients, and there are no backward kernels yet",
            "call the model under torch.no_grad() or torch.inference_mode()",
        )


def _check_tensors(site: Site) -> None:
    q, k, v = (value(node) for node in (site.q, site.k, site.v))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in DTYPES:
            site.refuse(f"{name} is {tensor.dtype}", "float32, bfloat16 and float16 are rewritten")
        if not isinstance(tensor.shape[-1], int):
            site.refuse(f"the head size of {name} is dynamic", "mark the last dimension as static")
    if not q.device == k.device == v.device:
        site.refuse("q, k and v are on different devices")
    # Keys and values must be equally many or the model's own code would fail, so a guard on that costs nothing.
    if not bool(k.shape[2] == v.shape[2]) or not same(q.shape[3], k.shape[3]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        site.refuse(f"q, k and v have shapes that don't fit: {shapes}")
    full = (*q.shape[:3], k.shape[2])
    for mask in site.masks:
        if not _broadcasts(shape(mask.node), full):
            site.refuse(f"a mask {shape(mask.node)} does not broadcast to the scores {tuple(full)} of q and k")
    if not all(same(t.shape[0], q.shape[0]) or same(t.shape[0], 1) for t in (k, v)):
        site.refuse("q, k and v are not known to have one batch size")


def _broadcasts(sizes: tuple[Any, ...], full: tuple[Any, ...]) -> bool:
    """Whether a mask is no wider than the scores; sizes that are equal in this run are guarded on."""
    inner = full[len(full) - len(sizes) :]
    return len(sizes) <= len(full) and all(same(a, 1) or bool(a == b) for a, b in zip(sizes, inner, strict=True))


def _check_mutations(site: Site, order: dict[fx.Node, int], writes: list[tuple[fx.Node, fx.Node]]) -> None:
    """Refuses where memory is written in place that the attention read before, or that holds its scores.

    A rewritten site reads its inputs where its output was made, and has no scores that somebody could write to. What it
    reads may be made anew of what the old one read: so each tensor counts from its first use in the old one on.
    order: of the graph's nodes. writes: nodes that write in place, and the tensors that they write to.
    """
    if not any(order[writer] < order[site.output] for writer, _ in writes):
        return
    reads = [site.q, site.k, site.v, *(mask.node for mask in site.masks), *([site.sink] if site.sink else [])]
    reads += site.restored_with
    before = ancestors(*reads).union(reads)
    inside = {node for node in ancestors(site.output) if node not in before}
    since = {node: order[node] for node in inside}
    for node in before:
        uses = [order[user] for user in node.users if is_tensor(user) and (user in inside or user is site.output)]
        if uses:
            since[node] = min(uses)
    for writer, written in writes:
        if order[writer] > order[site.output]:
            break
        for node, start in since.items():
            if start < order[writer] and writer not in inside and shares_storage(node, written):
                site.refuse(f"{node.name} is changed in place by {writer.name} while the attention reads it")


def mutations(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operations that write in place, each with the node that it writes into."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for position, arg in enumerate(schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                written: Any = node.args[position] if position < len(node.args) else node.kwargs.get(arg.name)
                if isinstance(written, fx.Node):
                    yield node, written


def shares_storage(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold tensors over one memory."""
    if a is b:
        return True
    if not is_tensor(a) or not is_tensor(b) or (not shape(a) and not shape(b)):
        return False
    return value(a).untyped_storage()._cdata == value(b).untyped_storage()._cdata
