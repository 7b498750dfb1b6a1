"""Tables: elements that no closed form describes, computed by new graph nodes over the few positions they depend on.

Before (T5), as [Q, K] tensors: log(abs(k - q) / 8) > to(int64) > where(small, ...) > embedding > permute
After, as [H, Q + K - 1]: the same operations over d = k - q, and the attention loads `table[h, k - q + Q - 1]`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsify.expr import (
    And,
    Eq,
    Expr,
    FloorDiv,
    Ge,
    Load,
    Max,
    Min,
    Mod,
    Mul,
    Not,
    Or,
    Pred,
    Select,
    Sum,
    Test,
    Var,
    as_expr,
)
from sparsify.passes.functionalise import functional
from sparsify.passes.masks.shifts import DISTANCE
from sparsify.passes.masks.values import Opaque, Pieces, Tree
from sparsify.passes.nodes import ATEN, dtype, is_tensor, value

if TYPE_CHECKING:
    from sparsify.passes.masks.elements import Elements

BINARY: dict[type, tuple[Any, Callable[..., Any]]] = {
    Sum: (ATEN.add.Tensor, operator.add),
    Mul: (ATEN.mul.Tensor, operator.mul),
    FloorDiv: (ATEN.floor_divide.default, operator.floordiv),
    Mod: (ATEN.remainder.Tensor, operator.mod),
    Min: (ATEN.minimum.default, torch.sym_min),
    Max: (ATEN.maximum.default, torch.sym_max),
}


def table(el: Elements, element: Tree | Load, grid: tuple[str, ...], shape: tuple[Any, ...]) -> Load:
    """Emits what computes an element over a grid (`Shifts.grid`), before the attention, and gives the load from it.

    The element is a tree, or a load that stands for one or that has such loads in its index. Raises Opaque where a size
    is held by no node, or a tensor that is needed is written before the attention.
    """
    made = _Printer(el, grid, shape).whole(element)
    el.nodes[made.name] = made
    first = as_expr(el.size(shape[2])) - 1
    index = tuple(Var("k") - Var("q") + first if name == DISTANCE else Var(name) for name in grid)
    return Load(made.name, index or (as_expr(0),))


class _Printer:
    """Elements as nodes over a grid: numbers, tensors of no dimensions, and tensors that broadcast to the grid."""

    def __init__(self, el: Elements, grid: tuple[str, ...], shape: tuple[Any, ...]) -> None:
        self.el, self.grid, self.values = el, grid, el.shifts.at(grid)
        self.lengths = dict(zip("bhqk", shape, strict=True))
        first = next(n for n in el.site.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
        self.mode = getattr(first.meta["val"], "fake_mode", None)
        self.device = el.device
        self._made: dict[Any, Any] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the attention."""
        with self.el.site.graph.inserting_before(self.el.site):
            node = self.el.site.graph.call_function(target, args, kwargs)
        plain, named = fx.map_arg((args, kwargs), value)
        with torch.no_grad(), self.mode or contextlib.nullcontext():
            node.meta["val"] = target(*plain, **named)
        return node

    def whole(self, element: Tree | Load) -> fx.Node:
        """The table itself: one dimension for each variable of the grid, in a dtype that kernels load."""
        made = self.tensor(self.emit(element))
        if dtype(made) == torch.float64:
            made = self.call(ATEN.to.dtype, made, torch.float32)
        sizes = [self.size(name) for name in self.grid] or [1]
        made = self.call(ATEN.expand.default, made, sizes)
        made.meta["mask_name"] = _name(element, self.el)
        return made

    def size(self, name: str) -> Any:
        if name == DISTANCE:
            return self.plus(self.plus(self.length("q"), self.length("k")), -1)
        return self.length(name)

    def length(self, name: str) -> Any:
        """A size of the scores: a number, or a node that holds it."""
        found = self.lengths[name]
        return found if isinstance(found, int) else self.holder(found)

    def holder(self, size: torch.SymInt) -> fx.Node:
        """The node of a symbolic size: its own placeholder, or the dimension of an early tensor."""
        if size.node.expr in self._made:
            return self._made[size.node.expr]
        for node in self.el.site.graph.nodes:
            if node is self.el.site:
                break
            found = node.meta.get("val")
            if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
                return node
            for dim, other in enumerate(found.shape if isinstance(found, torch.Tensor) else ()):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    return self._made.setdefault(size.node.expr, self.call(ATEN.sym_size.int, node, dim))
        raise Opaque(f"the size {size}, which no node of the graph holds")

    def plus(self, a: Any, b: Any) -> Any:
        return self.numbers(operator.add, a, b)

    def numbers(self, function: Callable[..., Any], *args: Any) -> Any:
        """A function of numbers: at once, or as a node where one is symbolic."""
        return self.call(function, *args) if any(isinstance(a, fx.Node) for a in args) else function(*args)

    def tensor(self, made: Any) -> fx.Node:
        """A number as a tensor of no dimensions."""
        if is_tensor(made):
            return made
        kind = torch.float64 if isinstance(made, float) else torch.bool if isinstance(made, bool) else torch.int64
        return self.call(ATEN.full.default, [], made, dtype=kind, device=self.device)

    def emit(self, element: Any) -> Any:
        """A node, or a number, for an element."""
        key = element if isinstance(element, Tree | fx.Node) else (type(element), element)
        if key not in self._made:
            self._made[key] = self._emit(element)
        return self._made[key]

    def _emit(self, element: Any) -> Any:
        match element:
            case bool() | int() | float() | fx.Node():
                return element
            case Tree(operands=None):
                return self.loaded(element.node, element.index)
            case Tree(node=None):
                condition, then, other = map(self.tensor, map(self.emit, element.operands))
                return self.call(ATEN.where.self, condition, then, other)
            case Tree():
                return self.operation(element)
            case Pieces(parts):
                made = self.emit(float(parts[-1][0]))
                for number, where in parts[:-1]:
                    made = self.call(ATEN.where.self, self.tensor(self.emit(where)), *map(self.tensor, (number, made)))
                return made
            case Load() if element in self.el.trees:
                return self.emit(self.el.trees[element])
            case Load(source, index):
                return self.loaded(self.el.nodes.get(source) or self.el.scalars.nodes[source], index)
            case Pred():
                return self.predicate(element)
        return self.integer(element)

    def operation(self, tree: Tree) -> fx.Node:
        """The tree's operation on its operands, each in the dtype of the argument that it stands for."""
        node = tree.node
        assert node is not None and tree.operands is not None
        rest = iter(tree.operands)

        def operand(arg: fx.Node) -> Any:
            if not is_tensor(arg):
                return arg
            made = self.tensor(self.emit(next(rest)))
            return made if dtype(made) == dtype(arg) else self.call(ATEN.to.dtype, made, dtype(arg))

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        made = self.call(functional(node) or node.target, *args, **kwargs)
        return made if dtype(made) == dtype(node) else self.call(ATEN.to.dtype, made, dtype(node))

    def loaded(self, node: fx.Node | None, index: tuple[Expr, ...]) -> Any:
        """Elements of a tensor at an index; a size of the graph as it is."""
        assert node is not None
        if not is_tensor(node) or not value(node).dim():
            return node
        return self.call(ATEN.index.Tensor, node, [self.tensor(self.emit(i)) for i in index])

    def integer(self, expr: Expr) -> Any:
        match expr:
            case Var(name) if name in self.values and self.values[name] != expr:
                return self.emit(self.values[name])
            case Var(name):
                return self.position(name) if name in self.grid else self.scalar(name)
            case Sum(const, terms):
                total: Any = None
                for factor, atom in terms:
                    part = self.long(atom)
                    part = part if factor == 1 else self.binary(Mul, part, factor)
                    total = part if total is None else self.binary(Sum, total, part)
                return const if total is None else self.binary(Sum, total, const) if const else total
            case Select(condition, then, other):
                return self.call(ATEN.where.self, *map(self.tensor, map(self.emit, (condition, then, other))))
        left, right = expr.left, expr.right  # type: ignore[attr-defined]
        return self.binary(type(expr), self.long(left), self.long(right))

    def long(self, expr: Expr) -> Any:
        made = self.emit(expr)
        return self.call(ATEN.to.dtype, made, torch.int64) if is_tensor(made) and dtype(made) != torch.int64 else made

    def binary(self, kind: type, a: Any, b: Any) -> Any:
        on_tensors, on_numbers = BINARY[kind]
        if is_tensor(a) or is_tensor(b):
            return self.call(on_tensors, self.tensor(a), self.tensor(b))
        return self.numbers(on_numbers, a, b)

    def predicate(self, pred: Pred) -> Any:
        match pred:
            case And(parts) | Or(parts):
                made: Any = isinstance(pred, And)
                for i, part in enumerate(parts):
                    join = ATEN.logical_and.default if isinstance(pred, And) else ATEN.logical_or.default
                    found = self.tensor(self.emit(part))
                    made = found if i == 0 else self.call(join, made, found)
                return made
            case Ge(expr):
                return self.call(ATEN.ge.Scalar, self.tensor(self.emit(expr)), 0)
            case Eq(expr):
                return self.call(ATEN.eq.Scalar, self.tensor(self.emit(expr)), 0)
            case Not(part):
                return self.call(ATEN.logical_not.default, self.tensor(self.emit(part)))
            case Test(load):
                return self.emit(load)
        raise TypeError(f"not a predicate: {pred!r}")

    def position(self, name: str) -> fx.Node:
        """The values of a variable of the grid, along its own dimension."""
        made = self.call(ATEN.arange.default, self.size(name), device=self.device)
        if name == DISTANCE:
            made = self.call(ATEN.sub.Tensor, made, self.plus(self.length("q"), -1))
        return self.call(ATEN.view.default, made, [-1 if other == name else 1 for other in self.grid])

    def scalar(self, name: str) -> Any:
        """N, Nq, B or H."""
        axis = {"N": "k", "Nq": "q", "B": "b", "H": "h"}.get(name)
        if axis is None:
            raise Opaque(f"the size {name}, which no node of the graph holds")
        return self.length(axis)


def _name(element: Tree | Load, el: Elements) -> str:
    """What a table is called in words: by the one floating tensor that it looks up, else by its operation."""
    found: dict[fx.Node, None] = {}
    seen: set[Any] = set()

    def visit(part: Any) -> None:
        if isinstance(part, Load) and part in el.trees:
            part = el.trees[part]
        if not isinstance(part, Tree) or part in seen:
            return
        seen.add(part)
        if part.operands is None and part.node is not None:
            found[part.node] = None
        for operand in part.operands or ():
            visit(operand)

    visit(element)
    if len(found) == 1:
        return next(iter(found)).name
    tree = el.trees.get(element) if isinstance(element, Load) else element
    return tree.name if tree is not None and tree.name else "table"
