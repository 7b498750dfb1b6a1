"""Products without a sum, reductions of what doesn't change, tables looked up, and numbers put where a mask says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from sparsify.expr import Expr, Pred, as_expr
from sparsify.passes.masks.indices import ZERO, Index, Rule, argument, as_list, gathered
from sparsify.passes.masks.values import Element, Opaque, as_bool, pick
from sparsify.walk import variables

if TYPE_CHECKING:
    from sparsify.passes.masks.elements import Elements


def embedding(el: Elements, node: fx.Node, index: Index) -> Element:
    size = el.size(el.shape(node.args[0])[0])
    return el.at(node.args[0], (gathered(el, el.at(node.args[1], index[:-1]), size, index), index[-1]))


def index_put(el: Elements, node: fx.Node, index: Index) -> Element:
    """x[mask] = number, with a mask over the first dimensions."""
    base, (mask, *others), value = node.args[0], list(node.args[1]), node.args[2]  # type: ignore[arg-type]
    if (
        others
        or el.dtype(mask) != torch.bool
        or el.shape(value) not in ((), (1,))
        or argument(node, 3, "accumulate", False)
    ):
        raise Opaque("numbers put at positions that are data")
    chosen = as_bool(el.at(mask, index[: len(el.shape(mask))]))
    return pick(chosen, el.cast(el.at(value, (ZERO,) * len(el.shape(value))), node), el.at(base, index))


def outer_product(el: Elements, node: fx.Node, index: Index) -> Element:
    """A matrix product without a sum: of a column and a row."""
    a, b = node.args[0], node.args[1]
    if el.name(node) in ("outer", "ger"):
        return el.product([el.at(a, index[:1]), el.at(b, index[1:])], node)
    if min(len(el.shape(a)), len(el.shape(b))) < 2 or el.size(el.shape(a)[-1]) != as_expr(1):
        raise Opaque("a matrix product")
    batch, shape = index[:-2], el.shape(node)
    left, right = (*batch, index[-2], ZERO), (*batch, ZERO, index[-1])
    sizes = (*shape[:-2], shape[-2], 1), (*shape[:-2], 1, shape[-1])
    return el.product([el.at_shared(x, i, s) for x, i, s in zip((a, b), (left, right), sizes, strict=True)], node)


def einsum(el: Elements, node: fx.Node, index: Index) -> Element:
    """A product of elements, where no letter is summed over."""
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not output or "." in inputs or len(set(output)) < len(output) or set("".join(terms)) != set(output):
        raise Opaque("a product that is summed")
    at = dict(zip(output, index, strict=True))
    found = []
    for term, value in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        sizes = el.shape(value)
        if len(set(term)) < len(term) or any(size != el.shape(node)[output.index(c)] for c, size in zip(term, sizes)):  # noqa: B905
            raise Opaque("an einsum that broadcasts")
        found.append(el.at(value, tuple(at[letter] for letter in term)))
    return el.product(found, node)


def unchanging(el: Elements, node: fx.Node, index: Index) -> Element:
    """any, all, amax and amin over dimensions that the element doesn't change along."""
    source, dims = node.args[0], argument(node, 1, "dim")
    sizes = el.shape(source)
    given = range(len(sizes)) if dims is None or dims == [] else [dim % len(sizes) for dim in as_list(dims)]
    rest = iter(index if len(index) < len(sizes) else [i for dim, i in enumerate(index) if dim not in given])
    along = [el.fresh(node, size, dim) if dim in given else next(rest) for dim, size in enumerate(sizes)]
    element = el.at(source, tuple(along))
    if not isinstance(element, Pred | Expr) or any(variables(along[dim]) & variables(element) for dim in given):
        raise Opaque(el.name(node))
    return element


PRODUCT_RULES: dict[str, Rule] = {
    "embedding": embedding,
    "einsum": einsum,
    **dict.fromkeys(("matmul", "bmm", "mm", "outer", "ger"), outer_product),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), index_put),
    **dict.fromkeys(("any", "all", "amax", "amin"), unchanging),
}
