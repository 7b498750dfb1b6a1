"""Axes: what each dimension of a tensor runs over, whatever views stand between it and another tensor.

An `Axis` is something that a product of two tensors runs over: a batch, heads, queries. A `Layout` says for each
dimension of a tensor which axes it runs over, outermost first: one as a rule, several where they are merged, as in
(B*H, N, D), none where its size is 1. Views split, merge and permute; to follow one is to compute the other layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.nodes import CASTS, COPIES, VIEWS, argument, dtype, is_tensor, op, same, shape

REGROUPS = (*VIEWS, "squeeze", "unsqueeze", "reshape_as", "slice", "narrow")  # slices only where they are whole
PERMUTES = (
    *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("t", "mT", "mH", "adjoint", "numpy_T", "matrix_H"),
)
EXPANDS = ("expand", "expand_as", "broadcast_to")


@dataclass(eq=False)
class Axis:
    """`parts`: the axes, outermost first, that this one turned out to consist of."""

    size: Any
    parts: tuple[Axis, ...] = ()


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def leaves(dim: Iterable[Axis]) -> Dim:
    """The axes without parts."""
    return tuple(leaf for axis in dim for leaf in (leaves(axis.parts) if axis.parts else (axis,)))


def resolved(layout: Layout) -> Layout:
    return tuple(map(leaves, layout))


def flat(layout: Layout) -> Dim:
    return leaves(axis for dim in layout for axis in dim)


def fresh(sizes: Iterable[Any]) -> Layout:
    """A layout of axes that nothing else has."""
    return tuple(() if same(size, 1) else (Axis(size),) for size in sizes)


def aligned(node: fx.Node, layout: Layout) -> Layout:
    """The layout of a tensor that takes part in an elementwise operation whose result has `layout`."""
    sizes = shape(node)
    inner = layout[len(layout) - len(sizes) :]
    return tuple(() if same(size, 1) else leaves(dim) for size, dim in zip(sizes, inner, strict=True))


def bind(formal: Layout, actual: Layout) -> None:
    """Says what the fresh axes of a formal layout are."""
    for dim, found in zip(formal, actual, strict=True):
        if dim and leaves(dim) != leaves(found):
            dim[0].parts = leaves(found)


def regroup(axes: Iterable[Axis], sizes: Sequence[Any]) -> Layout | None:
    """The axes, in their order, as dimensions of the given sizes: merged and split as needed, or None."""
    rest = list(leaves(axes))
    dims = []
    for wanted in sizes:
        dim: list[Axis] = []
        while not same(wanted, 1):
            if not rest:
                return None
            axis = rest.pop(0)
            more = _quotient(wanted, axis.size)
            if more is None:
                inner = _quotient(axis.size, wanted)
                if inner is None:
                    return None
                axis.parts = (Axis(wanted), Axis(inner))
                axis, later = axis.parts
                rest.insert(0, later)
                more = 1
            dim.append(axis)
            wanted = more
        dims.append(tuple(dim))
    return None if rest else tuple(dims)


def _quotient(a: Any, b: Any) -> Any:
    """a / b where it is known to be whole; asking adds no guard."""
    if same(a, b):
        return 1
    if isinstance(b, int) and b <= 0:
        return None
    found = a // b
    if isinstance(found, torch.SymInt) and (number := found.node.maybe_as_int()) is not None:
        found = number
    return found if same(found * b, a) else None


def forward(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a view, from that of its input; None for anything else."""
    name = op(node)
    if name in EXPANDS:
        return _expanded(layout, shape(node.args[0]), shape(node))
    if name in REGROUPS:
        return regroup(flat(layout), shape(node))
    if name in PERMUTES:
        return tuple(layout[i] for i in _order(node))
    return None


def _expanded(layout: Layout, sizes: tuple[Any, ...], wide: tuple[Any, ...]) -> Layout:
    added = len(wide) - len(sizes)
    pairs = zip(layout, sizes, wide[added:], strict=True)
    return fresh(wide[:added]) + tuple(
        leaves(dim) if same(size, other) else fresh((other,))[0] for dim, size, other in pairs
    )


def _order(node: fx.Node) -> list[int]:
    """Which dimension of its input each dimension of a transposition is: seen on a tensor with as many."""
    probe = torch.empty(tuple(range(2, len(shape(node.args[0])) + 2)), device="meta")
    target: Any = node.target
    return [size - 2 for size in target(probe, *node.args[1:], **node.kwargs).shape]


def is_copy(node: fx.Node) -> bool:
    """Whether a node has the elements of its first argument in the same places."""
    if op(node) in CASTS:
        return dtype(node.args[0]) == dtype(node)
    return op(node) in COPIES


def backward(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a view's or a repetition's input, from that of its result; None for anything else.

    Axes that the input is repeated along are missing in it.
    """
    name = op(node)
    if not name or not node.args or not is_tensor(node.args[0]):
        return None
    sizes = shape(node.args[0])
    if is_copy(node):
        return layout
    if name in EXPANDS:
        inner = layout[len(layout) - len(sizes) :]
        pairs = zip(inner, sizes, shape(node)[len(layout) - len(sizes) :], strict=True)
        return tuple(leaves(dim) if same(size, wide) else () for dim, size, wide in pairs)
    if name in REGROUPS:
        return regroup(flat(layout), sizes)
    if name in PERMUTES:
        order = _order(node)
        return tuple(leaves(layout[order.index(i)]) for i in range(len(order)))
    if name in ("repeat_interleave", "repeat", "tile"):
        return _unrepeated(node, layout, sizes)
    return None


def _unrepeated(node: fx.Node, layout: Layout, sizes: tuple[Any, ...]) -> Layout | None:
    """repeat_interleave has each element several times in a row, repeat and tile the whole several times."""
    interleaved = op(node) == "repeat_interleave"
    if interleaved and (argument(node, "dim") is None or not isinstance(node.args[1], int)):
        return None
    wide = shape(node)
    found: list[Dim] = []
    for dim, size, whole in zip(layout[len(wide) - len(sizes) :], sizes, wide[len(wide) - len(sizes) :], strict=True):
        times = _quotient(whole, size)
        parts = None if times is None else regroup(dim, (size, times) if interleaved else (times, size))
        if parts is None:
            return None
        found.append(parts[0] if interleaved else parts[1])
    return tuple(found)


def sources(node: fx.Node, layout: Layout) -> Iterator[tuple[fx.Node, Layout]]:
    """The node and, further and further back, the tensors that it is a view or a repetition of, with their layouts."""
    while True:
        yield node, resolved(layout)
        inner = backward(node, layout)
        if inner is None:
            return
        node, layout = node.args[0], inner
