"""Which axes are the heads: those that share a dimension with the head's features where these are made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.passes.forms.axes import Axis, Dim, Layout, backward, bind, flat, fresh, leaves, resolved
from sparsify.passes.forms.products import Factor, product
from sparsify.passes.nodes import argument, is_tensor, op, same, same_sizes, shape

PROJECTIONS = {"linear": -1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "convolution": 1}
PIECES = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")


@dataclass
class Origin:
    """A walk from queries or keys back to where their features are made.

    batch: the axes that may be heads. features: what the elements of one head run over, on the way. wholes: for an axis
    of which batch axes are a piece (heads of queries, of keys and of values in one tensor), these.
    """

    node: fx.Node
    layout: Layout
    batch: Collection[Axis]
    features: set[Axis] = field(default_factory=set)
    wholes: dict[Axis, Dim] = field(default_factory=dict)
    projections: int = 0

    def heads(self, limit: int = 80) -> Dim | None:
        """The axes that are heads, in their order; none for a single head, None where it can't be told."""
        for _ in range(limit):
            self.layout = resolved(self.layout)
            self.features = set(leaves(self.features))
            found = self._beside_features()
            if found:
                return found
            if not self._step():
                break
        unsure = self.node.op == "placeholder" and len(self.layout) > 3
        return () if self.projections and not unsure else None

    def _beside_features(self) -> Dim:
        """Axes in one dimension with features: a projection made them together."""
        batch = {axis: (axis,) for axis in leaves(self.batch)}
        batch |= {part: dim for whole, dim in self.wholes.items() for part in leaves((whole,))}
        beside = [axis for dim in self.layout if self.features & set(dim) for axis in dim if axis in batch]
        return tuple(dict.fromkeys(axis for one in beside for axis in leaves(batch[one])))

    def _step(self) -> bool:
        """One operation further back; False where the walk ends."""
        node = self.node
        inner = backward(node, self.layout)
        if inner is not None:
            return self._to(node.args[0], inner)
        name = op(node)
        if name == "getitem":
            return self._out_of_pieces(node)
        if name == "select":
            return self._to(node.args[0], self._with(argument(node, "dim"), shape(node.args[0])))
        if name in PROJECTIONS:
            return self._projected(node, PROJECTIONS[name])
        made = product(node)
        if made is not None:
            return self._through_product(made.factors, made.layout)
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        if name == "stack" and tensors:
            at = argument(node, "dim", 0) % len(self.layout)
            return self._to(tensors[0], self.layout[:at] + self.layout[at + 1 :])
        if name == "view_as_real":
            return self._to(tensors[0], self.layout[:-1])
        if name == "view_as_complex":
            return self._to(tensors[0], self._with(-1, shape(tensors[0])))
        if name in ("slice", "narrow", "cat"):
            return self._of_other_sizes(tensors[0])
        alike = [n for n in tensors if same_sizes(shape(n), shape(node))] if is_tensor(node) else []
        return bool(alike) and self._to(alike[0], self.layout)

    def _to(self, node: fx.Node, layout: Layout) -> bool:
        self.node, self.layout = node, layout
        return True

    def _with(self, dim: int, sizes: tuple[Any, ...]) -> Layout:
        at = dim % len(sizes)
        return (*self.layout[:at], *fresh(sizes[at : at + 1]), *self.layout[at:])

    def _out_of_pieces(self, node: fx.Node) -> bool:
        whole = node.args[0]
        if not isinstance(whole, fx.Node) or not whole.args or not is_tensor(whole.args[0]):
            return False
        if op(whole) == "unbind":
            return self._to(whole.args[0], self._with(argument(whole, "dim", 0), shape(whole.args[0])))
        if op(whole) in PIECES or len(shape(whole.args[0])) == len(self.layout):
            return self._of_other_sizes(whole.args[0])
        return False

    def _of_other_sizes(self, node: fx.Node) -> bool:
        """To a tensor of as many dimensions, of which some may have other sizes."""
        if len(shape(node)) != len(self.layout):
            return False
        pairs = zip(self.layout, shape(self.node), shape(node), strict=True)
        return self._to(node, tuple(dim if same(a, b) else self._instead(dim, b) for dim, a, b in pairs))

    def _instead(self, dim: Dim, size: Any) -> Dim:
        """A fresh axis in place of others: of features, if those were, or one of which heads are a piece."""
        made = fresh((size,))[0]
        pieces = tuple(axis for one in dim for axis in self.wholes.get(one, (one,)))
        if self.features & set(dim):
            self.features |= set(made)
        elif made and set(leaves(self.batch)) & set(leaves(pieces)):
            self.wholes[made[0]] = pieces
        return made

    def _projected(self, node: fx.Node, dim: int) -> bool:
        inner = node.args[0]
        if self.projections or not is_tensor(inner) or len(shape(inner)) != len(self.layout):
            return False
        self.projections += 1
        at = dim % len(self.layout)
        sizes = shape(inner)
        layout = [self._instead(d, sizes[i]) if i == at else d for i, d in enumerate(self.layout)]
        return self._to(inner, tuple(layout))

    def _through_product(self, factors: tuple[Factor, Factor], made: Layout) -> bool:
        """A projection by a weight: heads that only the weight has count as beside the features."""
        if self.projections:
            return False
        actual = self.layout
        bind(made, actual)
        inner, weight = sorted(factors, key=lambda factor: len(set(flat(factor.layout)) - self.features), reverse=True)
        mine, theirs = set(flat(inner.layout)), set(flat(weight.layout))
        if not self.features & theirs - mine:
            inner, weight, mine, theirs = weight, inner, theirs, mine
        batch = set(leaves(self.batch))
        alone = tuple(axis for axis in flat(made) if axis in theirs - mine and axis in batch)
        if not self.features & theirs - mine:
            return False
        self.projections += 1
        if alone:
            feature = next(axis for axis in flat(made) if axis in self.features)
            return self._to(inner.node, ((*alone, feature),))
        self.features |= mine - set(flat(made))
        return self._to(inner.node, inner.layout)


def conventional(candidates: list[Layout], batch: Collection[Axis]) -> tuple[Dim, bool]:
    """The third dimension from the end, as in (B, H, N, D), where provenance says nothing; whether that is sure."""
    found = [leaves(layout[-3]) for layout in map(resolved, candidates) if len(layout) >= 4]
    if not found:
        return (), False
    sure = all(dim == found[0] for dim in found) and all(len(layout) <= 4 for layout in candidates)
    return tuple(axis for axis in found[0] if axis in set(leaves(batch))), sure
