"""Functionalise: in-place operations on values that the graph itself made become operations that give a new value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparsify.passes.nodes import ATEN, is_tensor, same_sizes, shape, value
from sparsify.passes.runner import Capture


@dataclass(frozen=True)
class Functionalise:
    """In-place steps to plain ones, so that scores can be followed through them.

    Before: scores = matmul(q, k); mul_(scores, 0.125); masked_fill_(scores, mask, -inf); softmax(scores)
    After:  scores = matmul(q, k); a = mul(scores, 0.125); b = masked_fill(a, mask, -inf); softmax(b)

    Only where the written tensor is whole (no other view of its memory is read later) and was made in the graph by an
    operation that shares no memory with anything else. Writes to inputs, buffers and slices stay as they are.
    """

    def __call__(self, capture: Capture) -> None:
        nodes = list(capture.graph.nodes)
        position = {node: i for i, node in enumerate(nodes)}
        sharing = _by_storage(nodes)
        for node in nodes:
            overload = functional(node)
            written = node.args[0] if overload is not None and node.args else None
            if not isinstance(written, fx.Node) or not is_tensor(written):
                continue
            family = sharing.get(_storage(written), [])
            if not _is_private(family, written, node, position):
                continue
            node.target = overload
            for other in family:
                if other is not node and position[other] < position[node]:
                    other.replace_all_uses_with(
                        node, delete_user_cb=lambda user, at=node: user is not at and position[user] > position[at]
                    )
        capture.graph.eliminate_dead_code()


def functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The overload without the underscore that computes what an in-place operation writes, if there is one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if not name.endswith("_") or name.startswith("_") or name.endswith("__"):
        return None
    packet = getattr(ATEN, name[:-1], None)
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None or found._schema.is_mutable:
        return None
    ours = [arg.name for arg in target._schema.arguments]
    return found if ours == [arg.name for arg in found._schema.arguments] else None


def _storage(node: fx.Node) -> int | None:
    found = value(node)
    hidden = not isinstance(found, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(found)
    return None if hidden else found.untyped_storage()._cdata


def _by_storage(nodes: list[fx.Node]) -> dict[int | None, list[fx.Node]]:
    found: dict[int | None, list[fx.Node]] = {}
    for node in nodes:
        storage = _storage(node)
        if storage is not None:
            found.setdefault(storage, []).append(node)
    return found


def _is_private(family: list[fx.Node], written: fx.Node, writer: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether all that is read later of the written memory is the written tensor itself."""
    if not family or family[0].op != "call_function" or value(writer).dtype != value(written).dtype:
        return False
    for other in family:
        if position[other] >= position[writer]:
            continue
        later = any(position[user] > position[writer] for user in other.users)
        if later and not _is_same_view(other, written):
            return False
    return same_sizes(shape(writer), shape(written))


def _is_same_view(a: fx.Node, b: fx.Node) -> bool:
    ours, theirs = value(a), value(b)
    return (
        ours.dtype == theirs.dtype
        and same_sizes(tuple(ours.shape), tuple(theirs.shape))
        and same_sizes(tuple(ours.stride()), tuple(theirs.stride()))
        and same_sizes((ours.storage_offset(),), (theirs.storage_offset(),))
    )
