"""Batched products of two tensors, whatever they are spelled as: matmul, bmm, baddbmm, einsum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify.passes.nodes import ATEN, argument, call, is_tensor, op, shape


@dataclass
class Product:
    """left (..., I, D) times right (..., J, D), transposed: (..., I, J). alpha and bias are baddbmm's.

    reordered: the batch dimensions have another order than in the graph's own tensors.
    """

    left: fx.Node
    right: fx.Node
    spelling: str
    alpha: Any = 1
    bias: fx.Node | None = None
    reordered: bool = False


@dataclass
class Weighted:
    """weights (..., I, J) times values (..., J, D); `order` permutes (..., I, D) into the node's own layout."""

    values: fx.Node
    order: tuple[int, ...] | None = None


def product(node: fx.Node, before: fx.Node) -> Product | None:
    """Reads a node as queries times keys, or None if it is no product of two tensors."""
    name = op(node)
    if name in ("matmul", "bmm", "__matmul__") and min(len(shape(n)) for n in node.args[:2]) >= 3:
        left, right = node.args[:2]
        return Product(left, swapped(right, before), name)
    if name == "baddbmm":
        bias, left, right = node.args[:3]
        beta, alpha = argument(node, "beta", 1), argument(node, "alpha", 1)
        if beta != 0 and beta != 1:
            bias = call(before, ATEN.mul.Scalar, bias, beta)
        return Product(left, swapped(right, before), name, alpha, bias if beta != 0 else None)
    if name == "einsum":
        return _einsum_product(node, before)
    return None


def swapped(node: fx.Node, before: fx.Node) -> fx.Node:
    """The node with its last two dimensions swapped; a swap that is already there is taken back."""
    if op(node) == "transpose":
        rank = len(shape(node))
        if {argument(node, "dim0") % rank, argument(node, "dim1") % rank} == {rank - 1, rank - 2}:
            return node.args[0]
    if op(node) in ("mT", "adjoint"):
        return node.args[0]
    return call(before, ATEN.transpose.int, node, -2, -1)


def equation(node: fx.Node) -> tuple[str, str, str] | None:
    """(left, right, result) letters of an einsum of two tensors, or None where they are not explicit."""
    text = node.args[0].replace(" ", "")
    operands = node.args[1]
    if "->" not in text or "." in text or len(operands) != 2:
        return None
    inputs, result = text.split("->")
    left, right = inputs.split(",")
    if any(len(set(part)) != len(part) for part in (left, right, result)):
        return None
    return left, right, result


def _einsum_product(node: fx.Node, before: fx.Node) -> Product | None:
    parts = equation(node)
    if parts is None:
        return None
    left, right, result = parts
    a, b = node.args[1]
    if len(result) < 3:
        return None
    i, j = result[-2], result[-1]
    if i in right:
        left, right, a, b = right, left, b, a
    batch = result[:-2]
    summed = [c for c in left if c not in result]
    if len(summed) != 1 or set(left) != {*batch, i, *summed} or set(right) != {*batch, j, *summed}:
        return None
    d = summed[0]
    queries, keys = arranged(a, left, batch + i + d, before), arranged(b, right, batch + j + d, before)
    reordered = any([c for c in part if c in batch] != list(batch) for part in (left, right))
    return Product(queries, keys, "einsum", reordered=reordered)


def arranged(node: fx.Node, letters: str, wanted: str, before: fx.Node) -> fx.Node:
    """The tensor with its dimensions, named by letters, in another order."""
    if letters == wanted:
        return node
    return call(before, ATEN.permute.default, node, [letters.index(letter) for letter in wanted])


def weighted(node: fx.Node, weights: fx.Node, before: fx.Node) -> Weighted | None:
    """Reads a node as weights (..., I, J) times values (..., J, D), or None."""
    name = op(node)
    if name in ("matmul", "bmm", "__matmul__") and node.args[0] is weights and node.args[1] is not weights:
        return Weighted(node.args[1]) if is_tensor(node.args[1]) and len(shape(node.args[1])) >= 3 else None
    if name != "einsum":
        return None
    parts = equation(node)
    operands = list(node.args[1])
    if parts is None or operands.count(weights) != 1:
        return None
    at = operands.index(weights)
    mine, theirs, result = parts[at], parts[1 - at], parts[2]
    batch, i, j = mine[:-2], mine[-2], mine[-1]
    extra = [c for c in theirs if c not in mine]
    if len(extra) != 1 or set(theirs) != {*batch, j, *extra} or set(result) != {*batch, i, *extra}:
        return None
    made = batch + i + extra[0]
    values = arranged(operands[1 - at], theirs, batch + j + extra[0], before)
    return Weighted(values, None if made == result else tuple(made.index(letter) for letter in result))
