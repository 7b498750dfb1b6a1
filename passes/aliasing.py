"""Which nodes of an ATen graph are written in place, and when: a value read after that is not what its node made."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload


class Writes:
    """The in-place writes of a graph, by the tensor that they reach through views."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        self._target: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            aliases = _aliases(node)
            mutated = [arg for arg, written in aliases if written]
            aliased = [arg for arg, written in aliases if not written and _may_share(arg, node)]
            source = (aliased or mutated or [node])[0]
            self._root[node] = self._root.get(source, node)
            for arg in mutated:
                self._written.setdefault(self._root[arg], []).append(node)
                self._target[node] = arg

    def __bool__(self) -> bool:
        return bool(self._written)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the memory that a node shows: the node itself if it is no view."""
        return self._root[node]

    def target(self, node: fx.Node) -> fx.Node | None:
        """What a node writes into, or None if it only reads."""
        return self._target.get(node)

    def last(self, node: fx.Node, time: int) -> fx.Node | None:
        """The last write to the node's memory before a position in the graph, or None."""
        earlier = [w for w in self._written.get(self._root[node], ()) if self.position[w] < time]
        return earlier[-1] if earlier else None

    def after(self, node: fx.Node, time: int, reader: fx.Node) -> fx.Node | None:
        """The first write to the node's memory at or after a position and before the reader, or None."""
        last = self.position.get(reader, len(self.position))
        written = self._written.get(self._root[node], ())
        return next((w for w in written if time <= self.position[w] < last), None)

    def between(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The first write to the node's memory after the node and before the reader, or None."""
        return self.after(node, self.position[node] + 1, reader)


def _aliases(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """The tensor arguments that the node's result may share memory with, and whether the node writes to them."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, OpOverload):
        return [(arg, False) for arg in node.all_input_nodes]  # getitem and such: the result is a part of the argument
    found = []
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else [value]
        found += [(v, argument.alias_info.is_write) for v in values if isinstance(v, fx.Node)]
    return found


def _may_share(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values can share memory: a cast or a reshape may be a view or a copy, and their storages tell."""
    ours, theirs = (_storage(node.meta.get("val")) for node in (a, b))
    return ours is None or theirs is None or ours == theirs


def _storage(value: Any) -> int | None:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
