"""Which nodes of an ATen graph are written in place, and when: a value read after that is not what its node made."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload


class Writes:
    """The in-place writes of a graph, by the tensor that they reach through views."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            aliased = [arg for arg, written in _aliases(node) if not written]
            mutated = [arg for arg, written in _aliases(node) if written]
            source = (aliased or mutated or [node])[0]
            self._root[node] = self._root.get(source, node)
            for arg in mutated:
                self._written.setdefault(self._root[arg], []).append(node)

    def between(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The first write to the node's memory after the node and before the reader, or None."""
        first, last = self.position[node], self.position.get(reader, len(self.position))
        for write in self._written.get(self._root[node], ()):
            if first < self.position[write] < last:
                return write
        return None


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
