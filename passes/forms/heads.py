"""Taking back repeated KV heads, so that a kernel reads each key and value once."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify.passes.nodes import (
    ATEN,
    CASTS,
    COPIES,
    VIEWS,
    argument,
    call,
    dtype,
    is_tensor,
    op,
    same,
    same_sizes,
    shape,
    size,
)


def unrepeat(node: fx.Node, dim: int, before: fx.Node) -> fx.Node:
    """The tensor that `node` (4 dimensions) repeats along its head dimension, each head several times in a row.

    Looks through copies and swaps of dimensions; new nodes go in front of `before`. Gives `node` itself where nothing
    is repeated.
    """
    found = _source(node, dim, before)
    return node if found is None else found


def merged_from(node: fx.Node) -> fx.Node | None:
    """The (B, H, N, D) that a (B*H, N, D) is a view of, if it is one."""
    inner = node.args[0] if op(node) in VIEWS else None
    if not is_tensor(inner) or len(shape(inner)) != 4 or len(shape(node)) != 3:
        return None
    return inner if same_sizes(shape(inner)[-2:], shape(node)[-2:]) else None


def split_heads(node: fx.Node, heads: int, before: fx.Node) -> fx.Node:
    """(B*H, N, D) as (B, H, N, D)."""
    if len(shape(node)) == 4:
        return node
    inner = merged_from(node)
    if inner is not None and same(shape(inner)[1], heads):
        return inner
    return call(before, ATEN.reshape.default, node, [-1, heads, size(before, node, 1), size(before, node, 2)])


def _source(node: fx.Node, dim: int, before: fx.Node) -> fx.Node | None:
    name = op(node)
    if not name or not node.args or not is_tensor(node.args[0]):
        return None
    inner = node.args[0]
    if _hands_on(node, inner):
        return _source(inner, dim, before)
    if name == "transpose":
        return _transposed(node, inner, dim, before)
    if name == "repeat_interleave" and argument(node, "dim") in (dim, dim - 4) and isinstance(node.args[1], int):
        return inner
    if name == "expand" and len(shape(inner)) == 4 and shape(inner)[dim] == 1 and _rest_same(inner, node, dim):
        return inner
    if name in VIEWS:
        return _merged(node, inner, dim, before)
    return None


def _hands_on(node: fx.Node, inner: fx.Node) -> bool:
    """Whether a node has the elements of its input in the same places."""
    if op(node) in CASTS:
        return dtype(inner) == dtype(node)
    return op(node) in COPIES or (op(node) in (*VIEWS, "expand", "slice") and same_sizes(shape(inner), shape(node)))


def _transposed(node: fx.Node, inner: fx.Node, dim: int, before: fx.Node) -> fx.Node | None:
    first, second = argument(node, "dim0") % 4, argument(node, "dim1") % 4
    swapped = {first: second, second: first}.get(dim, dim)
    found = _source(inner, swapped, before)
    return None if found is None else call(before, ATEN.transpose.int, found, first, second)


def _rest_same(inner: fx.Node, node: fx.Node, dim: int) -> bool:
    return all(same(a, b) for i, (a, b) in enumerate(zip(shape(inner), shape(node), strict=True)) if i != dim)


def _merged(node: fx.Node, inner: fx.Node, dim: int, before: fx.Node) -> fx.Node | None:
    """A view that merges (heads, repeats) into heads: from (.., Hkv, G, ..), which expands (.., Hkv, 1, ..)."""
    sizes, wide = shape(node), shape(inner)
    if len(wide) != len(sizes) + 1 or not same(wide[dim] * wide[dim + 1], sizes[dim]):
        return None
    if not same_sizes((*wide[:dim], *wide[dim + 2 :]), (*sizes[:dim], *sizes[dim + 1 :])):
        return None
    grown = inner
    while op(grown) in (*COPIES, *CASTS) and same_sizes(shape(grown.args[0]), wide):
        grown = grown.args[0]
    if op(grown) != "expand" or len(shape(grown.args[0])) != len(wide) or shape(grown.args[0])[dim + 1] != 1:
        return None
    single: Any = grown.args[0]
    if not _rest_same(single, inner, dim + 1):
        return None
    return call(before, ATEN.squeeze.dim, single, dim + 1)
