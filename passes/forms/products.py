"""Products of two tensors, whatever they are spelled as: matmul, bmm, mm, baddbmm, einsum, tensordot, mul and sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import fx

from sparsify.passes.forms.axes import Axis, Layout
from sparsify.passes.nodes import argument, is_tensor, op, same, shape, value

MATMULS = ("matmul", "bmm", "mm", "__matmul__", "__rmatmul__")


@dataclass
class Factor:
    """A tensor of a product and what its dimensions run over."""

    node: fx.Node
    layout: Layout


@dataclass
class Product:
    """left times right, summed over the axes that both have and `layout`, the result's, has not.

    alone: for each dimension of the result, which factor alone it comes from by its place or letter: 0, 1, or None
    where it is of both. alpha (a number) and bias are baddbmm's; beta (a number or its node) multiplies the bias.
    """

    left: Factor
    right: Factor
    layout: Layout
    alone: tuple[int | None, ...]
    spelling: str
    alpha: Any = 1
    bias: fx.Node | None = None
    beta: Any = 1

    @property
    def factors(self) -> tuple[Factor, Factor]:
        return self.left, self.right


def product(node: Any) -> Product | None:
    """Reads a node as a product of two tensors with at least two dimensions each, or None."""
    name = op(node)
    if name in MATMULS:
        left, right = (node.args[1], node.args[0]) if name == "__rmatmul__" else node.args[:2]
        return _matmul(left, right, node)
    if name in ("baddbmm", "addmm"):
        found = _matmul(node.args[1], node.args[2], node)
        if found is not None:
            found.alpha, found.beta = value(argument(node, "alpha", 1)), argument(node, "beta", 1)
            found.bias = None if same(value(found.beta), 0) else node.args[0]
        return found
    if name == "linear" and argument(node, "bias") is None and is_tensor(node.args[1]):
        rank = len(shape(node.args[0]))
        letters = tuple(range(rank))
        return _lettered(node.args[0], node.args[1], letters, (rank, rank - 1), (*letters[:-1], rank), node)
    if name == "einsum":
        return _einsum(node)
    if name == "tensordot":
        return _tensordot(node)
    if name == "sum":
        return _summed(node)
    return None


def _matmul(left: Any, right: Any, node: fx.Node) -> Product | None:
    if not is_tensor(left) or not is_tensor(right) or min(len(shape(left)), len(shape(right))) < 2:
        return None
    rank = max(len(shape(left)), len(shape(right)))
    batch = tuple(range(rank - 2))
    i, j, d = rank, rank + 1, rank + 2
    ours, theirs = (batch[rank - len(shape(n)) :] for n in (left, right))
    return _lettered(left, right, (*ours, i, d), (*theirs, d, j), (*batch, i, j), node)


def _lettered(
    left: fx.Node, right: fx.Node, ours: Sequence[Any], theirs: Sequence[Any], result: Sequence[Any], node: fx.Node
) -> Product | None:
    """The product whose dimensions have these letters; a letter of size 1 broadcasts."""
    sizes: dict[Any, Any] = {}
    for tensor, letters in ((left, ours), (right, theirs)):
        if len(set(letters)) != len(letters) or len(letters) != len(shape(tensor)):
            return None
        for letter, size in zip(letters, shape(tensor), strict=True):
            if letter not in sizes or same(sizes[letter], 1):
                sizes[letter] = size
    if len(set(result)) != len(result) or not set(result) <= set(sizes):
        return None
    if any(not same(sizes[c], 1) for c in set(ours) ^ set(theirs) if c not in result):
        return None  # summed over one of them alone
    axes = {letter: Axis(size) for letter, size in sizes.items()}

    def layout(tensor: fx.Node, letters: Sequence[Any]) -> Layout:
        return tuple(() if same(n, 1) else (axes[c],) for c, n in zip(letters, shape(tensor), strict=True))

    made = tuple(() if same(sizes[c], 1) else (axes[c],) for c in result)
    alone = tuple(None if c in ours and c in theirs else int(c not in ours) for c in result)
    return Product(Factor(left, layout(left, ours)), Factor(right, layout(right, theirs)), made, alone, op(node))


def _einsum(node: fx.Node) -> Product | None:
    operands = node.args[1]
    text = node.args[0].replace(" ", "")
    if len(operands) != 2 or text.count(",") != 1:
        return None
    inputs, arrow, result = text.partition("->")
    given = inputs.split(",")
    letters = [_spelled(part, len(shape(n))) for part, n in zip(given, operands, strict=True)]
    dots = max((c for part in letters for c in part if isinstance(c, int)), default=0)
    if not arrow:
        seen = inputs.replace(",", "").replace(".", "")
        result = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(seen) if seen.count(c) == 1))
    made = _spelled(result, len(result.replace("...", "")) + dots)
    return _lettered(*operands, *letters, made, node)


def _spelled(part: str, rank: int) -> list[Any]:
    """The letters of one tensor; dimensions of an ellipsis are numbers that count down to 1 for the last."""
    before, dots, after = part.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *range(hidden, 0, -1), *after]


def _tensordot(node: fx.Node) -> Product | None:
    left, right = node.args[:2]
    ours: list[Any] = [("l", i) for i in range(len(shape(left)))]
    theirs: list[Any] = [("r", i) for i in range(len(shape(right)))]
    for i, a, b in zip(count(), argument(node, "dims_self"), argument(node, "dims_other"), strict=False):
        ours[a], theirs[b] = i, i
    result = [c for c in (*ours, *theirs) if isinstance(c, tuple)]
    return _lettered(left, right, ours, theirs, result, node)


def _summed(node: fx.Node) -> Product | None:
    """sum(mul(a, b), dims): dimensions in which one of them has size 1 are the other's."""
    inner = node.args[0]
    dims = argument(node, "dim")
    if (
        op(inner) != "mul"
        or not dims
        or argument(node, "keepdim")
        or not all(map(is_tensor, inner.args[:2]))
        or len(inner.users) != 1
    ):
        return None
    left, right = inner.args[:2]
    rank = len(shape(inner))
    sizes = [(1,) * (rank - len(shape(n))) + shape(n) for n in (left, right)]
    dims = [dim % rank for dim in dims]
    if not all(same(size[dim], shape(inner)[dim]) for size in sizes for dim in dims):
        return None
    kept = [i for i in range(rank) if i not in dims]
    sides = [[i for i in range(rank) if not same(size[i], 1) or i in dims] for size in sizes]
    letters = [list(range(rank))[rank - len(shape(n)) :] for n in (left, right)]
    found = _lettered(left, right, *letters, kept, node)
    if found is None:
        return None
    alone = tuple(None if (i in sides[0]) == (i in sides[1]) else int(i not in sides[0]) for i in kept)
    found.alone, found.spelling = alone, "mul > sum"
    return found
