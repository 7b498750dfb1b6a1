"""Which factor of a product of scores is the queries and which the keys, and what is a row, a key or a batch."""

from __future__ import annotations

from sparsify.errors import Refusal
from sparsify.passes.forms.arrange import Unplaced
from sparsify.passes.forms.assemble import Parts
from sparsify.passes.forms.axes import Dim, flat, leaves, resolved
from sparsify.passes.forms.products import Product
from sparsify.passes.forms.scores import Scores
from sparsify.passes.forms.weights import Descent, weighted


def roles(scores: Scores, over: Dim, way: Descent) -> Parts:
    """The parts of the attention whose softmax runs over the dimension `over` of the scores' layout."""
    product, sink = scores.product, scores.sink
    if sink is not None and leaves(over) != (sink.wide,):
        raise Unplaced("the softmax is not over the scores and their sinks")
    keys = leaves(over if sink is None else sink.keys)
    side = _side_of_keys(product, keys)
    found = weighted(way, resolved(scores.layout), sink)
    if isinstance(found, Refusal):
        raise Unplaced(found.reason)
    rows = _rows(product, keys, side)
    layout = tuple(keys if sink is not None and sink.wide in leaves(dim) else leaves(dim) for dim in scores.layout)
    return Parts(
        q=product.factors[1 - side],
        k=product.factors[side],
        v=found.values,
        rows=rows,
        keys=keys,
        scores=layout,
        output=found.layout,
        seen=[one for one in map(resolved, (product.layout, layout)) if set(one[-2:]) == {rows, keys}],
        masks=scores.masks,
        multipliers=scores.multipliers,
        after=found.multipliers,
        emptying=found.emptying,
        sink=None if sink is None else sink.side,
        columns=() if sink is None else sink.columns,
    )


def _alone(product: Product, side: int) -> list[Dim]:
    """The dimensions of the scores that come from one factor alone."""
    return [leaves(dim) for dim, alone in zip(product.layout, product.alone, strict=True) if alone == side]


def _side_of_keys(product: Product, keys: Dim) -> int:
    """The factor that the keys come from: 1 in q·kᵀ, 0 in k·qᵀ."""
    for side in (1, 0):
        if all(set(dim) & set(keys) for dim in _alone(product, side) if dim or keys) and _has(product, side, keys):
            return side
    for side in (1, 0):
        if _has(product, side, keys):
            return side
    raise Unplaced("the softmax is not over the keys of the product")


def _has(product: Product, side: int, keys: Dim) -> bool:
    """Whether the keys are of this factor and not of the other."""
    mine, other = (set(flat(product.factors[i].layout)) for i in (side, 1 - side))
    return set(keys) <= mine - other


def _rows(product: Product, keys: Dim, side: int) -> Dim:
    """The axes of the queries: the last of what the other factor alone has, in as many dimensions as the keys."""
    count = sum(bool(set(dim) & set(keys)) for dim in _alone(product, side))
    return tuple(axis for dim in _alone(product, 1 - side)[-max(count, 1) :] for axis in dim)
