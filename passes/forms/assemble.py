"""From what was read of an attention to its site: q (B, H, Nq, D), k, v, masks, and the way back to its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsify.passes.forms.arrange import Unplaced, moved, placed
from sparsify.passes.forms.axes import EXPANDS, Dim, Layout, backward, flat, leaves, resolved, sources
from sparsify.passes.forms.heads import Origin, conventional
from sparsify.passes.forms.products import Factor
from sparsify.passes.forms.scores import Side
from sparsify.passes.nodes import ATEN, call, is_tensor, op, shape
from sparsify.passes.site import Mask, Site


@dataclass
class Parts:
    """An attention in axes: factors of q, k and v, what its scores and output run over, and what takes part.

    rows, keys: the axes of queries and keys. scores: the layout of the scores; output: of the output.
    seen: layouts in which the heads may stand third from the end.
    multipliers: of the scores; after: of the output. emptying: masks that set weights to 0 after the softmax.
    """

    q: Factor
    k: Factor
    v: Factor
    rows: Dim
    keys: Dim
    scores: Layout
    output: Layout
    seen: list[Layout]
    masks: list[Side] = field(default_factory=list)
    multipliers: list[Side] = field(default_factory=list)
    after: list[Side] = field(default_factory=list)
    emptying: list[Side] = field(default_factory=list)
    sink: Side | None = None
    columns: Dim = ()


def assemble(site: Site, parts: Parts) -> None:
    """Fills in a site. Raises Unplaced where something can't be arranged."""
    before = site.output
    chains = [list(sources(factor.node, factor.layout)) for factor in (parts.q, parts.k, parts.v)]
    rows, keys = leaves(parts.rows), leaves(parts.keys)
    q_axes, v_axes = set(flat(parts.q.layout)), flat(parts.v.layout)
    inner = tuple(axis for axis in flat(parts.q.layout) if axis in set(flat(parts.k.layout)) - set(flat(parts.scores)))
    batch = tuple(axis for axis in flat(parts.scores) if axis not in {*rows, *keys})
    extra = set(batch) - q_axes - set(flat(parts.k.layout)) - set(v_axes)
    if extra:
        raise Unplaced("the scores are broadcast beyond those of q and k")
    values = tuple(axis for axis in v_axes if axis not in {*batch, *rows, *keys})
    if keys and set(keys) <= set(flat(parts.output)):
        if rows and not set(rows) & set(flat(parts.output)):
            raise Unplaced(f"the softmax is not over the keys, which {op(site.output)} sums over")
        raise Unplaced(f"{op(site.output)} mixes the heads between the softmax and the values (talking heads)")
    if set(flat(parts.output)) != {*batch, *rows, *values}:
        raise Unplaced("the product with the values sums over something else than the keys")
    heads = _heads(site, parts, batch, inner, rows, chains[0])
    # On the way to what the heads are made of, views may have split what tensors run over.
    batch, rows, keys, inner, values = map(leaves, (batch, rows, keys, inner, values))
    rest = tuple(axis for axis in batch if axis not in heads)
    shared = _shared(heads, chains[1], chains[2])
    site.q = placed(*_chosen(chains[0], (rest, heads, rows, inner)), (rest, heads, rows, inner), before, (0, 1, 2, 3))
    for name, chain, groups in (
        ("k", chains[1], (rest, shared, keys, inner)),
        ("v", chains[2], (rest, shared, keys, values)),
    ):
        setattr(site, name, placed(*_chosen(chain, groups), groups, before, (1, 2, 3)))
    _add_sides(site, parts, (rest, heads, rows, keys), shared)
    _way_back(site, parts, (rest, heads, rows, values))
    _check_heads(site)


def _heads(site: Site, parts: Parts, batch: Dim, inner: Dim, rows: Dim, chain: list[Any]) -> Dim:
    if not batch:
        return ()
    for factor in (parts.q, parts.k):
        found = Origin(factor.node, factor.layout, batch, set(inner)).heads()
        if found is not None:
            return leaves(found)
    ends = [layout for _, layout in chain if layout[-2:] == (leaves(rows), leaves(inner))]
    candidates = [layout for layout in (*ends, *parts.seen) if len(layout) >= 4]
    found, site.heads_known = conventional(candidates, batch)
    return leaves(found)


def _shared(heads: Dim, *chains: list[tuple[fx.Node, Layout]]) -> Dim:
    """The axes of the KV heads: the heads without the last ones that neither keys nor values have."""
    have = {axis for chain in chains for axis in flat(chain[-1][1])}
    end = len(heads)
    while end and heads[end - 1] not in have:
        end -= 1
    return heads[:end]


def _chosen(chain: list[tuple[fx.Node, Layout]], groups: Sequence[Dim]) -> tuple[fx.Node, Layout]:
    """Of a tensor and those that it is a view of: the nearest that needs no change, or that has no axis too many."""
    mine = {axis for group in groups for axis in group}
    found = [(node, resolved(layout)) for node, layout in chain]
    found = [(node, layout) for node, layout in found if set(flat(layout)) <= mine] or found
    for node, layout in found:
        if len(layout) == 4 and layout[1:] == tuple(groups[1:]) and layout[0] in ((), groups[0]):
            return node, layout
    return found[0]


def _add_sides(site: Site, parts: Parts, groups: tuple[Dim, ...], shared: Dim) -> None:
    before = site.output
    batch, heads, rows, keys = groups
    for side in parts.multipliers:
        axes = set(flat(side.layout))
        if not axes & set(keys):
            site.q = _times(site.q, side, (batch, heads, rows, ()), before)
        elif axes <= {*batch, *shared, *keys}:
            site.k = _times(site.k, side, (batch, shared, keys, ()), before)
        else:
            raise Unplaced("the scores are multiplied by a tensor that differs from key to key")
    for side in parts.masks:
        node = _with_factors(side, groups, before)
        if side.negated:
            node = call(before, ATEN.logical_not.default, node)
        site.masks.append(Mask("bool" if side.kind == "bool" else "add", node))
    if parts.sink is not None:
        site.sink = _with_factors(_unexpanded(parts.sink), (batch, heads, rows, leaves(parts.columns)), before)
        if parts.columns:
            site.sink = call(before, ATEN.logsumexp.default, site.sink, [-1], True)


def _unexpanded(side: Side) -> Side:
    """What a sink is expanded from."""
    while op(side.node) in EXPANDS:
        side.layout = backward(side.node, side.layout) or side.layout
        side.node = side.node.args[0]
    return side


def _with_factors(side: Side, groups: tuple[Dim, ...], before: fx.Node) -> fx.Node:
    node = placed(side.node, side.layout, groups, before, broadcast=True)
    for name, factor in side.factors:
        if isinstance(factor, Side):
            factor = placed(factor.node, factor.layout, groups, before, broadcast=True)
        node = _apply(name, node, factor, before)
    return node


def _times(node: Any, side: Side, groups: tuple[Dim, ...], before: fx.Node) -> fx.Node:
    return _apply(side.kind, node, placed(side.node, side.layout, groups, before, broadcast=True), before)


def _apply(name: str, node: Any, factor: Any, before: fx.Node) -> fx.Node:
    packet = ATEN.mul if name == "mul" else ATEN.div
    return call(before, packet.Tensor if is_tensor(factor) else packet.Scalar, node, factor)


def _way_back(site: Site, parts: Parts, groups: tuple[Dim, ...]) -> None:
    """Sets how the op's result (B, H, Nq, Dv) becomes the output."""
    before, output = site.output, resolved(parts.output)
    keys = set(leaves(parts.keys))
    factors: list[tuple[str, Any]] = []
    for side in parts.after:
        if set(flat(side.layout)) & keys:
            raise Unplaced("the weights are multiplied by a tensor that differs from key to key")
        node = side.node
        if is_tensor(node):
            node = placed(node, side.layout, (*groups[:3], ()), before, broadcast=True)
        factors.append((side.kind, node))
    fills = [_row_mask(side, parts, groups, before) for side in parts.emptying]
    fills = [node for node in fills if node is not None]
    if not factors and not fills and output == resolved(groups):
        return

    def restore(new: fx.Node) -> fx.Node:
        for name, factor in factors:
            new = _apply(name, new, factor, before)
        for mask in fills:
            new = call(before, ATEN.masked_fill.Scalar, new, mask, 0.0)
        return moved(new, groups, output, before)

    site.restore = restore
    site.restored_with = [node for node in (*(factor for _, factor in factors), *fills) if isinstance(node, fx.Node)]


def _row_mask(side: Side, parts: Parts, groups: tuple[Dim, ...], before: fx.Node) -> fx.Node | None:
    """The rows of the output that are 0; None where the weights were masked as the scores were, which says nothing
    new: a row that keeps nothing gives 0 in every kernel."""
    if set(flat(side.layout)) & set(leaves(parts.keys)):
        if any(_same_mask(side, mask) for mask in parts.masks):
            return None
        raise Unplaced("the weights are masked after the softmax, and not as the scores are")
    node = placed(side.node, side.layout, (*groups[:3], ()), before, broadcast=True)
    return node if side.negated else call(before, ATEN.logical_not.default, node)


def _same_mask(a: Side, b: Side) -> bool:
    alike = a.node is b.node and a.negated == b.negated and b.kind == "bool"
    return alike and resolved(a.layout) == resolved(b.layout)


def _check_heads(site: Site) -> None:
    heads, kv_heads = shape(site.q)[1], shape(site.k)[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        site.refuse("the number of heads is dynamic", "mark the head dimension as static")
    elif heads % kv_heads:
        site.refuse(f"{heads} query heads are no multiple of {kv_heads} key heads")


def zero_dimensional(number: float, before: fx.Node) -> fx.Node:
    """A number as a tensor (1, 1, 1, 1)."""
    device = before.meta["val"].device
    return call(before, ATEN.full.default, [1, 1, 1, 1], number, dtype=torch.float32, device=device)
