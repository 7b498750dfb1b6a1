"""Bringing tensors from one layout to another with new nodes: reshape, permute, expand."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import fx

from sparsify.passes.forms.axes import Dim, Layout, flat, leaves, resolved
from sparsify.passes.nodes import ATEN, call, is_tensor, same, shape, value


class Unplaced(Exception):
    """A layout that can't be reached; the text says why."""


def placed(
    node: fx.Node,
    layout: Layout,
    groups: Sequence[Dim],
    before: fx.Node,
    whole: Sequence[int] = (),
    broadcast: bool = False,
) -> fx.Node:
    """The tensor with one dimension for each group of axes.

    A dimension of whose group the tensor has no axis has size 1, but for those in `whole`, which get all of it. Where
    it has a part of a group the rest is expanded. broadcast: fewer dimensions will do, where the first have size 1.
    New nodes go in front of `before`.
    """
    layout, mine = resolved(layout), set(flat(layout))
    wanted = tuple(leaves(group) if i in whole or mine & set(leaves(group)) else () for i, group in enumerate(groups))
    short = len(wanted) - len(layout)
    if broadcast and short >= 0 and wanted == ((),) * short + layout:
        return node
    return moved(node, layout, wanted, before)


def moved(node: fx.Node, layout: Layout, wanted: Layout, before: fx.Node) -> fx.Node:
    """The tensor in another layout, expanded along the axes that it lacks."""
    layout, wanted = resolved(layout), resolved(wanted)
    if layout == wanted:
        return node
    order = [axis for axis in flat(wanted) if axis in set(flat(layout))]
    if set(order) != set(flat(layout)):
        raise Unplaced("a tensor has a dimension that the attention has not")
    if order != list(flat(layout)):
        single = _split(layout)
        node, layout = _reshaped(node, layout, single, before), single
        dims = sorted(range(len(layout)), key=lambda i: order.index(layout[i][0]) if layout[i] else -1)
        node = call(before, ATEN.permute.default, node, dims)
        layout = tuple(layout[i] for i in dims)
    missing = [axis for axis in flat(wanted) if axis not in set(order)]
    if missing:
        spread = tuple((axis,) for axis in flat(wanted))
        node = _reshaped(node, layout, tuple(() if dim[0] in missing else dim for dim in spread), before)
        sizes = [number(dim[0].size, before) if dim[0] in missing else -1 for dim in spread]
        node, layout = call(before, ATEN.expand.default, node, sizes), spread
    return _reshaped(node, layout, wanted, before)


def _split(layout: Layout) -> Layout:
    """One dimension for each axis; those of size 1 stay where they are in their own dimension."""
    return tuple(part for dim in layout for part in ([(axis,) for axis in dim] or [()]))


def _reshaped(node: fx.Node, layout: Layout, wanted: Layout, before: fx.Node) -> fx.Node:
    """The same axes in the same order, as other dimensions."""
    if layout == wanted:
        return node
    if [dim for dim in layout if dim] == [dim for dim in wanted if dim]:
        return _with_ones(node, layout, wanted, before)
    sizes: list[Any] = []
    for dim in wanted:
        size = prod(axis.size for axis in dim) if dim else 1
        if not isinstance(size, int):
            size = call(before, ATEN.sym_size.int, node, layout.index(dim)) if dim in layout else None
        sizes.append(size)
    for i, size in enumerate(sizes):
        if size is None:
            sizes[i] = _count(wanted[i], before) if -1 in sizes else -1
    return call(before, ATEN.reshape.default, node, sizes)


def _count(dim: Dim, before: fx.Node) -> Any:
    return reduce(lambda a, b: call(before, operator.mul, a, b), [number(axis.size, before) for axis in dim])


def _with_ones(node: fx.Node, layout: Layout, wanted: Layout, before: fx.Node) -> fx.Node:
    """Dimensions of size 1 taken out and put in."""
    for at, dim in enumerate(wanted):
        while at < len(layout) and not layout[at] and dim:
            node, layout = call(before, ATEN.squeeze.dim, node, at), layout[:at] + layout[at + 1 :]
        if not dim and (at == len(layout) or layout[at]):
            node, layout = call(before, ATEN.unsqueeze.default, node, at), (*layout[:at], (), *layout[at:])
    while len(layout) > len(wanted):
        node, layout = call(before, ATEN.squeeze.dim, node, len(wanted)), layout[:-1]
    return node


def number(size: Any, before: fx.Node) -> Any:
    """A size for an argument: an int, or a node in front of `before` that holds it."""
    if isinstance(size, int):
        return size
    for node in before.graph.nodes:
        if node is before:
            break
        if node.op == "placeholder" and is_tensor(node):
            for dim, found in enumerate(shape(node)):
                if same(found, size):
                    return call(before, ATEN.sym_size.int, node, dim)
        elif isinstance(value(node), torch.SymInt) and same(value(node), size):
            return node
    raise Unplaced(f"the size {size} is held by no node of the graph")
