"""Writes into views: where in a written view an element of the whole tensor lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from sparsify.expr import TRUE, Expr, Pred, as_expr, eq
from sparsify.passes.masks.indices import Index, argument, regrouped, wrapped
from sparsify.passes.masks.values import Opaque
from sparsify.passes.nodes import VIEWS

if TYPE_CHECKING:
    from sparsify.passes.masks.elements import Elements

SAME = ("alias", "detach", "lift_fresh", "contiguous", "to")


def place(el: Elements, view: fx.Node, index: Index) -> tuple[Pred, Index]:
    """Whether the element of a view's memory at an index of the whole tensor is seen by the view, and where in it."""
    base = el.writes.target(view) or (view.args[0] if el.writes.root(view) is not view else None)
    if not isinstance(base, fx.Node):
        return TRUE, index
    inside, outer = place(el, base, index)
    if el.writes.target(view) is not None:
        return inside, outer
    seen, found = _step(el, view, base, list(outer))
    return el.box.decide(inside & seen), tuple(found)


def _step(el: Elements, view: fx.Node, base: fx.Node, index: list[Expr]) -> tuple[Pred, list[Expr]]:
    """The index into one view of an element of what it is a view of."""
    name, sizes = el.name(view), el.shape(base)
    match name:
        case "slice":
            return _slice(el, view, index)
        case "select":
            dim = view.args[1] % len(sizes)  # type: ignore[operator]
            return eq(index[dim], wrapped(el, view.args[2], el.size(sizes[dim]))), index[:dim] + index[dim + 1 :]
        case "unsqueeze":
            dim = argument(view, 1, "dim") % (len(sizes) + 1)
            return TRUE, [*index[:dim], as_expr(0), *index[dim:]]
        case "squeeze":
            dims = argument(view, 1, "dim", list(range(len(sizes))))
            dims = {dim % len(sizes) for dim in ([dims] if isinstance(dims, int) else dims)}
            return TRUE, [i for dim, i in enumerate(index) if dim not in dims or sizes[dim] != 1]
        case "permute":
            return TRUE, [index[dim] for dim in argument(view, 1, "dims")]
        case "transpose":
            a, b = view.args[1], view.args[2]
            index[a], index[b] = index[b], index[a]  # type: ignore[index]
            return TRUE, index
    if name in SAME:
        return TRUE, index
    if name in VIEWS:
        old, new = ([el.size(s) for s in el.shape(x)] for x in (base, view))
        return TRUE, regrouped(el, new, old, tuple(index))
    raise Opaque(f"a write into {name}")


def _slice(el: Elements, view: fx.Node, index: list[Expr]) -> tuple[Pred, list[Expr]]:
    dim, step = argument(view, 1, "dim", 0) % len(index), argument(view, 4, "step", 1)
    start = wrapped(el, argument(view, 2, "start") or 0, el.size(el.shape(view.args[0])[dim]))
    gap, steps = index[dim] - start, as_expr(step)
    seen = (gap >= 0) & (gap < el.size(el.shape(view)[dim]) * steps)
    if step != 1:
        seen &= eq(el.box.mod(gap, steps), 0)
        gap = el.box.floordiv(gap, steps)
    return seen, [*index[:dim], gap, *index[dim + 1 :]]
