"""The abstract interpreter: what the element of a node at an index is, asked from the mask backwards to its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sparsify.expr import FALSE, TRUE, Eq, Expr, Ge, Load, Not, Test, Var, as_expr, maximum, minimum
from sparsify.passes.aliasing import Writes
from sparsify.passes.masks.arithmetic import ARITHMETIC_RULES
from sparsify.passes.masks.box import Box
from sparsify.passes.masks.indices import INDEX_RULES, Index
from sparsify.passes.masks.scalars import Scalars
from sparsify.passes.masks.values import (
    Element,
    Opaque,
    Pieces,
    as_bool,
    as_int,
    as_pieces,
    assumes_binary,
    combine,
)  # fmt: skip
from sparsify.walk import loads, variables

RULES = INDEX_RULES | ARITHMETIC_RULES
ZERO = as_expr(0)
LONG_INTS = (torch.int64, torch.int32)


class Elements:
    """Elements of the nodes of one graph, as seen by an attention at `site` whose scores are `shape` (B, H, Q, K).

    hidden: for each tensor that became a load, the operation that made it one.
    assumed: the integer tensors whose elements count as 0 or 1 because they are used as floating numbers.
    """

    def __init__(self, site: fx.Node, shape: tuple[int | torch.SymInt, ...]) -> None:
        self.site = site
        self.scalars = Scalars(site.graph, shape)
        lengths = {name: self._length(name, size) for name, size in zip("bhqk", shape, strict=True)}
        self.box = Box(lengths, self.scalars.low)
        self.writes = Writes(site.graph)
        self.hidden: dict[str, str] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.assumed: dict[str, None] = {}
        self._known: dict[tuple[fx.Node, Index, bool], Element] = {}
        self._beyond = False
        self._readers: list[fx.Node] = [site]

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

    def name(self, node: fx.Node) -> str:
        """The operation's name, without the underscore of in-place forms."""
        target = node.target
        if isinstance(target, OpOverload):
            name = target._schema.name.split("::")[-1]
            if target.namespace != "aten":
                return target._schema.name
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

    def fresh(self, node: fx.Node, size: Any) -> Expr:
        """A new index that runs over a dimension of a node."""
        name = f"position in {node.name}"
        self.box.size[name] = self.size(size)
        return Var(name)

    def at(self, value: Any, index: Index) -> Element:
        """The element of a node, or a number itself. Raises Opaque."""
        if not isinstance(value, fx.Node):
            return self.constant(value)
        if not isinstance(value.meta.get("val"), torch.Tensor):
            return self.size(value)
        write = self.writes.between(value, self._readers[-1])
        if write is not None:
            raise Opaque(f"{self.name(write)}_ writes into it in place")
        key = (value, index, self._beyond)
        if key not in self._known:
            self._readers.append(value)
            try:
                self._known[key] = self._element(value, index)
            finally:
                self._readers.pop()
        return self._known[key]

    def _element(self, node: fx.Node, index: Index) -> Element:
        real = _real_constant(node)
        if real is not None:
            return self.cast(self.constant(real), node)
        rule = RULES.get(self.name(node)) if node.op == "call_function" else None
        if rule is None:
            return self._load(node, index, f"the {node.op}" if node.op != "call_function" else self.name(node))
        try:
            element = self.cast(rule(self, node, index), node)
        except Opaque as why:
            return self._load(node, index, str(why))
        return self._smaller(node, index, element)

    def _smaller(self, node: fx.Node, index: Index, element: Element) -> Element:
        """A comparison of data of one side with something: its own bool tensor is a smaller load than what it reads."""
        if not isinstance(element, Ge | Eq | Not | Test) or self.dtype(node) != torch.bool or self.is_large(index):
            return element
        if isinstance(element, Test) or (isinstance(element, Not) and isinstance(element.part, Test)):
            return element
        if not loads(element) or variables(element) >= {"q", "k"}:
            return element
        try:
            return self._load(node, index, self.name(node))
        except Opaque:
            return element

    def _load(self, node: fx.Node, index: Index, why: str) -> Element:
        dtype = self.dtype(node)
        if dtype is None or dtype.is_floating_point or dtype.is_complex:
            raise Opaque(why if node.op == "call_function" else f"the floating-point input {node.name}")
        write = self.writes.between(node, self.site)
        if write is not None:
            raise Opaque(f"{self.name(write)}_ writes into {node.name} before the attention")
        sizes = self.shape(node)
        inside = tuple(self._clamped(i, size) for i, size in zip(index, sizes, strict=True))
        self.nodes[node.name] = node
        self.hidden[node.name] = why
        load = Load(node.name, inside or (ZERO,))
        return Test(load) if dtype == torch.bool else load

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

    def as_pieces(self, element: Element) -> Pieces:
        """The element as a floating number; notes which integer tensors this takes for masks of 0 and 1."""
        self.assumed.update(dict.fromkeys(load.source for load in assumes_binary(element)))
        return as_pieces(element)

    def cast(self, element: Element, node: fx.Node) -> Element:
        """The element in the dtype of the node's tensor."""
        dtype = self.dtype(node)
        if dtype == torch.bool:
            return as_bool(element)
        if dtype is not None and dtype.is_floating_point:
            return combine(lambda x: torch.tensor(x, dtype=torch.float64).to(dtype).item(), self.as_pieces(element))
        found = as_int(element)
        if dtype not in LONG_INTS and not self._fits(found, dtype):
            raise Opaque(f"a cast to {dtype} of what may not fit")
        return found

    def _fits(self, element: Expr, dtype: torch.dtype | None) -> bool:
        if isinstance(element, Load) and self.dtype(self.nodes.get(element.source)) == dtype:
            return True
        if dtype not in (torch.int8, torch.uint8, torch.int16):
            return False
        low, high = self.box.interval(element)
        info = torch.iinfo(dtype)
        return low is not None and high is not None and info.min <= low and high <= info.max


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
