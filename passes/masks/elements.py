"""The abstract interpreter: what the element of a node at an index is, asked from the mask backwards to its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sparsify.expr import FALSE, TRUE, Eq, Expr, Ge, Load, Not, Test, Var, as_expr, maximum, minimum
from sparsify.passes.aliasing import Writes
from sparsify.passes.masks.arithmetic import ARITHMETIC_RULES, product
from sparsify.passes.masks.box import Box
from sparsify.passes.masks.indices import INDEX_RULES, Index
from sparsify.passes.masks.memory import place
from sparsify.passes.masks.products import PRODUCT_RULES
from sparsify.passes.masks.scalars import Scalars
from sparsify.passes.masks.shifts import Shifts
from sparsify.passes.masks.values import (
    CASTS,
    Element,
    Opaque,
    Tree,
    as_bool,
    as_int,
    as_pieces,
    combine,
    pick,
    rounded,
)  # fmt: skip
from sparsify.passes.nodes import op
from sparsify.walk import loads, variables

RULES = INDEX_RULES | PRODUCT_RULES | ARITHMETIC_RULES
ZERO = as_expr(0)
LONG_INTS = (torch.int64, torch.int32)
ELEMENTWISE = ("bucketize", "isin")  # in their first argument; the others they take as a whole


class Elements:
    """Elements of the nodes of one graph, as seen by an attention at `site` whose scores are `shape` (B, H, Q, K).

    nodes: the tensors that became loads, by name.
    trees: for loads that an elementwise operation made, that operation over its operands' elements: what can be
    computed anew over fewer positions.
    """

    def __init__(self, site: fx.Node, shape: tuple[int | torch.SymInt, ...]) -> None:
        self.site = site
        self.scalars = Scalars(site.graph, shape)
        lengths = {name: self._length(name, size) for name, size in zip("bhqk", shape, strict=True)}
        self.box = Box(lengths, self.scalars.low)
        self.writes = Writes(site.graph)
        self.nodes: dict[str, fx.Node] = {}
        self.trees: dict[Load, Tree] = {}
        self.shifts = Shifts(self.box, self.trees)
        self._known: dict[tuple[fx.Node, Index, bool, fx.Node | None], Element] = {}
        self.device = (
            next(n for n in site.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)).meta["val"].device
        )
        self._beyond = False
        self._time = self.writes.position.get(site, len(self.writes.position))

    def size(self, value: Any) -> Expr:
        """A size of a tensor as an expression."""
        return self.scalars.read(value)

    scalar = size

    def _length(self, name: str, size: int | torch.SymInt) -> Expr:
        try:
            return self.size(size)
        except Opaque:
            return Var(f"size of {name}")

    def shape(self, value: Any) -> tuple[Any, ...]:
        """The sizes of a node's tensor; a number has none."""
        found = value.meta.get("val") if isinstance(value, fx.Node) else None
        return tuple(found.shape) if isinstance(found, torch.Tensor) else ()

    def dtype(self, node: Any) -> torch.dtype | None:
        found = node.meta.get("val") if isinstance(node, fx.Node) else None
        return found.dtype if isinstance(found, torch.Tensor) else None

    def is_bool(self, node: Any) -> bool:
        return self.dtype(node) in (torch.bool, torch.uint8)

    def is_float(self, node: Any) -> bool:
        dtype = self.dtype(node)
        return dtype is not None and dtype.is_floating_point

    def is_large(self, index: Index) -> bool:
        """Whether an index runs over both queries and keys."""
        used = frozenset().union(*(variables(i) for i in index))
        return used >= {"q", "k"}

    def is_small(self, entry: Expr) -> bool:
        """Whether each load in an integer can be made one of a tensor that isn't over both queries and keys."""
        return all(self.shifts.grid(load) is not None for load in loads(entry))

    def product(self, found: list[Element], node: fx.Node) -> Element:
        """The product of elements, in the dtype of a node."""
        if any(isinstance(x, Tree) for x in found):
            raise Opaque("a product of floating numbers")
        if self.is_float(node):
            return combine(lambda *x: reduce(lambda a, b: a * b, x), *map(as_pieces, found))
        return reduce(lambda a, b: product(self, as_int(a), as_int(b)), found)

    def name(self, node: fx.Node) -> str:
        """The operation's name, without the underscore of in-place forms."""
        target = node.target
        if isinstance(target, OpOverload):
            name = op(node)
            if target.namespace != "aten":
                return name
            return name if name.startswith("__") else name.removesuffix("_")
        return getattr(target, "__name__", str(target))

    def broadcast(self, value: Any, node: fx.Node, index: Index) -> Element:
        """The element of an argument that is broadcast to the node's shape."""
        return self.at_shared(value, index, self.shape(node))

    def at_shared(self, value: Any, index: Index, shape: tuple[Any, ...]) -> Element:
        """The element of a value that is broadcast to a shape, at an index into that shape."""
        return self.at(value, self.stretched(value, index, shape))

    def stretched(self, value: Any, index: Index, shape: tuple[Any, ...]) -> Index:
        """An index into a shape as one into a value that is broadcast to it."""
        sizes = self.shape(value)
        kept, outer = index[len(index) - len(sizes) :], shape[len(shape) - len(sizes) :]
        stretched = [is_one(size) and not is_one(other) for size, other in zip(sizes, outer, strict=True)]
        return tuple(ZERO if s else i for s, i in zip(stretched, kept, strict=True))

    def constant(self, value: Any) -> Element:
        """A Python number as an element."""
        if isinstance(value, bool):
            return TRUE if value else FALSE
        return as_pieces(value) if isinstance(value, float) else self.size(value)

    @contextlib.contextmanager
    def beyond(self) -> Iterator[None]:
        """Within, elements may be asked outside their tensor (the answer is then discarded): loads must stay inside."""
        before, self._beyond = self._beyond, True
        try:
            yield
        finally:
            self._beyond = before

    def fresh(self, node: fx.Node, size: Any, dim: int = 0) -> Expr:
        """A new index that runs over a dimension of a node."""
        name = f"position {dim} in {node.name}"
        self.box.size[name] = self.size(size)
        return Var(name)

    def at(self, value: Any, index: Index) -> Element:
        """The element of a node, or a number itself, as it is at the time of the operation that reads it. Or Opaque."""
        if not isinstance(value, fx.Node):
            return self.constant(value)
        if not isinstance(value.meta.get("val"), torch.Tensor):
            return self.size(value)
        write = self.writes.last(value, self._time)
        key = (value, index, self._beyond, write)
        if key not in self._known:
            self._known[key] = self._read(value, index, write)
        return self._known[key]

    def _read(self, value: fx.Node, index: Index, write: fx.Node | None) -> Element:
        """A view shows what is in its memory when it is read, not when it was made; the rest is what made it."""
        target = self.writes.target(value)
        if target is not None:
            return self.at(target, index)
        if self.writes.root(value) is not value:
            return self._element(value, index)
        if write is None:
            with self.during(value):
                return self._element(value, index)
        try:
            return self._written(value, index, write)
        except Opaque as why:
            return self._load(value, index, str(why))

    @contextlib.contextmanager
    def during(self, node: fx.Node) -> Iterator[None]:
        """Within, tensors are read as they are when a node runs."""
        before, self._time = self._time, self.writes.position[node]
        try:
            yield
        finally:
            self._time = before

    def _written(self, root: fx.Node, index: Index, write: fx.Node) -> Element:
        """The element of memory that was written into: what the last write put there, or what was there before."""
        view = self.writes.target(write)
        rule = RULES.get(self.name(write))
        if view is None or rule is None:
            raise Opaque(f"{self.name(write)}_ writes into it in place")
        with self.during(write):
            inside, at = place(self, view, index)
            if inside == FALSE:
                return self.at(root, index)
            with self.beyond() if inside != TRUE else contextlib.nullcontext():
                new = self.cast(rule(self, write, at), write)
            return new if inside == TRUE else pick(inside, new, self.at(root, index))

    def _element(self, node: fx.Node, index: Index) -> Element:
        real = _real_constant(node)
        if real is not None:
            return self.cast(self.constant(real), node)
        rule = RULES.get(self.name(node)) if node.op == "call_function" else None
        why = f"the {node.op}" if node.op != "call_function" else self.name(node)
        if rule is not None:
            try:
                return self._smaller(node, index, self.cast(rule(self, node, index), node, index))
            except Opaque as found:
                why = str(found)
        return self._deferred(node, index, why) if is_elementwise(node) else self._load(node, index, why)

    def _deferred(self, node: fx.Node, index: Index, why: str) -> Element:
        """An elementwise operation that no closed form describes, over the elements of its operands."""
        tensors: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), lambda arg: tensors.append(arg) if self.dtype(arg) is not None else None)
        split = 1 if self.name(node) in ELEMENTWISE else len(tensors)
        try:
            for arg in tensors[split:]:
                self._check_unwritten(arg, self.writes.position[node])
            first = [self.broadcast(arg, node, index) for arg in tensors[:split]]
        except Opaque:
            return self._load(node, index, why)
        tree = Tree(node, index, (*first, *tensors[split:]))
        if self.is_float(node):
            return tree
        element = self._load(node, index, why)
        load = element.load if isinstance(element, Test) else element
        assert isinstance(load, Load)
        self.trees[load] = tree
        return element

    def _smaller(self, node: fx.Node, index: Index, element: Element) -> Element:
        """A comparison of data of one side with something: its own bool tensor is a smaller load than what it reads."""
        if not isinstance(element, Ge | Eq | Not | Test) or self.dtype(node) != torch.bool or self.is_large(index):
            return element
        if isinstance(element, Test) or (isinstance(element, Not) and isinstance(element.part, Test)):
            return element
        if not any(variables(load) & {"q", "k"} for load in loads(element)):
            return element  # a bound for all positions, such as k < length[b]
        try:
            return self._load(node, index, self.name(node))
        except Opaque:
            return element

    def _load(self, node: fx.Node, index: Index, why: str) -> Element:
        """The element as one of the node's own tensor, which the attention reads."""
        dtype = self.dtype(node)
        if dtype is None or dtype.is_complex:
            raise Opaque(why)
        time = self._time if self.writes.root(node) is not node else max(self._time, self.writes.position[node] + 1)
        self._check_unwritten(node, time)
        sizes = self.shape(node)
        inside = tuple(self._clamped(i, size) for i, size in zip(index, sizes, strict=True))
        self.nodes[node.name] = node
        if dtype.is_floating_point:
            return Tree(node, inside)
        load = Load(node.name, inside or (ZERO,))
        return Test(load) if dtype == torch.bool else load

    def _check_unwritten(self, node: fx.Node, time: int) -> None:
        """Raises Opaque where the attention would no longer read what a tensor holds at a time."""
        write = self.writes.after(node, time, self.site)
        if write is not None:
            raise Opaque(f"{self.name(write)}_ writes into {node.name} before the attention")

    def load(self, node: fx.Node, index: Index) -> Element:
        """The element as a load, where the attention can read the node's tensor. Raises Opaque."""
        with self.during(node):
            return self._load(node, index, self.name(node))

    def _clamped(self, index: Expr, size: Any) -> Expr:
        """The index kept inside its dimension, where an unused branch of a choice would step out of it."""
        if is_one(size):
            return ZERO
        if not self._beyond:
            return index  # torch itself has checked it
        if isinstance(size, int) and size == 0:
            raise Opaque("an empty tensor")
        limit = self.size(size)
        index = index if self.box.at_least(index, 0) else maximum(index, 0)
        return index if self.box.at_least(limit - index - 1, 0) else minimum(index, limit - 1)

    def cast(self, element: Element, node: fx.Node, index: Index = ()) -> Element:
        """The element in the dtype of the node's tensor."""
        dtype = self.dtype(node)
        if dtype == torch.bool:
            return as_bool(element)
        if dtype is not None and dtype.is_floating_point:
            if isinstance(element, Tree):
                rounds = self.name(node) in CASTS and element.node is not None and self.dtype(element.node) != dtype
                return Tree(node, index, (element, *node.all_input_nodes[1:])) if rounds else element
            return rounded(as_pieces(element), dtype)
        found = as_int(element)
        fits = not self._overflows(found, dtype) if dtype in LONG_INTS else self._fits(found, dtype)
        if not fits:
            raise Opaque(f"numbers that may not fit {dtype}")
        return found

    def _overflows(self, element: Expr, dtype: torch.dtype) -> bool:
        """Whether a bound that is known lies beyond the dtype; lengths that are not known are taken to fit."""
        low, high = self.box.interval(element)
        info = torch.iinfo(dtype)
        return (low is not None and low < info.min) or (high is not None and high > info.max)

    def _fits(self, element: Expr, dtype: torch.dtype | None) -> bool:
        if isinstance(element, Load) and self.dtype(self.nodes.get(element.source)) == dtype:
            return True
        if dtype not in (torch.int8, torch.uint8, torch.int16):
            return False
        low, high = self.box.interval(element)
        info = torch.iinfo(dtype)
        return low is not None and high is not None and info.min <= low and high <= info.max


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operation gives each element of its result from those at the same place of its tensor arguments."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    name = op(node).removesuffix("_")
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and (torch.Tag.pointwise in node.target.tags or name in (*CASTS, *ARITHMETIC_RULES, *ELEMENTWISE))


def is_one(size: Any) -> bool:
    """Whether a size is the number 1 (asked without a guard: a symbolic size never is)."""
    return isinstance(size, int) and size == 1


def _real_constant(node: fx.Node) -> bool | int | float | None:
    """The value of a one-element tensor that the graph holds as a constant."""
    held = None
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):  # not a buffer: those can change
        held = getattr(node.graph.owning_module, str(node.target), None)
    value = node.meta.get("val")
    if held is None or getattr(held, "fake_mode", None) is not None:
        held = getattr(value, "constant", None)
    if not isinstance(held, torch.Tensor) or held.numel() != 1 or isinstance(held, torch.nn.Parameter):
        return None
    if held.is_meta or getattr(held, "fake_mode", None) is not None:
        return None
    return held.item()
