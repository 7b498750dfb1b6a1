"""Raises a mask tensor to a closed form: from the code that built it to a predicate over (b, h, q, k).

Before, as Hugging Face builds it (19 ATen nodes, a bool tensor of B*Q*K elements):

    le = aten.le(arange_keys[None, None, None, :], arange_queries[None, None, :, None])
    index = aten.index(padding, [arange_batch[:, None, None, None], arange_keys[None, None, None, :]])
    mask = aten.expand(aten.__and__(le, index), [B, -1, Q, K])

After: `k <= q and _0[b, k]`, with the bool padding tensor as load `_0`. No tensor over queries and keys is left.

How: an abstract interpreter (design D2, `mask_elements`) asks what the mask's element at [b, h, q, k] is, from the mask
backwards. `arange` answers with its index, views remap indices, comparisons build predicates, and what is opaque
becomes a load. What it can't follow exactly it refuses. One thing it assumes, and says so in `assumed`: integers that
the model computes (1 - mask) * min with are 0 or 1. Under the option `strict` such a mask stays a tensor.

Additive masks are sums and choices of 0 and "minus a lot": -inf, the least finite number of a dtype, or anything up to
DROPPED (the first BERTs used -10000). They differ from a predicate in one place: a row that keeps nothing is an
average over everything when its mask is finite, NaN when it is -inf, and 0 here (design D4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.expr import FALSE, TRUE, And, Expr, Load, Or, Pred, Var, as_expr, conjunction, disjunction, negate
from sparsify.passes.masks.elements import Elements, is_one
from sparsify.passes.masks.values import DROPPED, Element, Opaque, Pieces, as_bool
from sparsify.text import POSITIONS
from sparsify.walk import loads, rewrite, substitute, variables

HINT = "the site passes the tensor as it is"


@dataclass(frozen=True)
class RaisedMask:
    """A mask tensor as a predicate, and what is left of it.

    keep: over b, h, q (the query's row, from 0), k (the key's index), N and Nq (the lengths, where they are symbolic)
        and loads `_0[...]`, `_1[...]`, ...
    loads: the nodes that the loads name, all bool or integer. `load_tensors` makes tensors of those that are scalars.
    bias: the additive (floating) tensor's node that is left beside the predicate, or None.
    assumed: the names of integer inputs that count as masks of 0 and 1, because the model computes (1 - mask) * min.
    """

    keep: Pred
    loads: tuple[fx.Node, ...] = ()
    bias: fx.Node | None = None
    assumed: tuple[str, ...] = ()

    def absolute(self, offset: Expr | int) -> Pred:
        """`keep` with q as the absolute position of the query, which is `offset` in row 0."""
        return substitute(self.keep, {"q": Var("q") - offset})


def raise_mask(
    node: fx.Node, shape: tuple[int | torch.SymInt, ...], site: fx.Node | None = None
) -> RaisedMask | Refusal:
    """What the mask `node` keeps, over scores of `shape` (B, H, Q, K), read by the attention at `site`.

    The node's tensor is bool (True keeps) or floating (added to the scores) and broadcasts to `shape`. `site` matters
    for what is written in place between the mask and the attention; without one, the end of the graph. The graph is
    left as it is. A Refusal names the operation that hid the structure; the tensor can always be passed as it is.
    """
    site = site or next(reversed(node.graph.nodes))
    elements = Elements(site, shape)
    try:
        keep, bias = _split(elements, node, _top_index(elements, node, shape))
    except Opaque as why:
        return Refusal(f"mask: {why}", node.name, HINT)
    keep = elements.box.decide(keep)
    unknown = sorted(variables(keep) - set(POSITIONS))
    if unknown:
        return Refusal(f"mask: the size {unknown[0]}, which no node of the graph holds", node.name, HINT)
    if bias is node or (bias is None and _only_tensors(keep)):
        what = ", ".join(dict.fromkeys(elements.hidden[load.source] for load in loads(keep))) or "a floating-point bias"
        return Refusal(f"mask: nothing but a tensor over queries and keys is left: {what}", node.name, HINT)
    return _named(elements, keep, bias)


def _top_index(elements: Elements, node: fx.Node, shape: tuple[int | torch.SymInt, ...]) -> tuple[Expr, ...]:
    """The mask's own index. Where mask and scores both have size 1 the position stays: `q` reads better than 0."""
    sizes = elements.shape(node)
    names = "bhqk"[4 - len(sizes) :]
    stretched = [is_one(size) and not is_one(other) for size, other in zip(sizes, shape[4 - len(sizes) :], strict=True)]
    return tuple(as_expr(0) if s else Var(name) for s, name in zip(stretched, names, strict=True))


def _split(elements: Elements, node: fx.Node, index: tuple[Expr, ...]) -> tuple[Pred, fx.Node | None]:
    """(predicate, what else is added where it holds). Raises Opaque if not even a part of it can be followed."""
    try:
        return _kept(elements.at(node, index)), None
    except Opaque as found:
        why, name = found, elements.name(node)
        if not elements.is_float(node) or name not in ("add", "where", "masked_fill") or node.kwargs:
            raise
        if str(node.target).split(".")[1].endswith("_"):
            raise
    if name == "add":
        for one, other in ((0, 1), (1, 0)):
            try:
                keep = _kept(elements.broadcast(node.args[one], node, index))
            except Opaque:
                continue
            rest, bias = _operand(elements, node, other, index)
            return keep & rest, bias
        raise why
    condition = as_bool(elements.broadcast(node.args[0 if name == "where" else 1], node, index))
    then, other = (1, 2) if name == "where" else (2, 0)
    for chosen, dropped, where in ((then, other, condition), (other, then, negate(condition))):
        try:
            nothing = _kept(elements.broadcast(node.args[dropped], node, index)) == FALSE
        except Opaque:
            continue
        if nothing:
            rest, bias = _operand(elements, node, chosen, index)
            return where & rest, bias
    raise why


def _operand(elements: Elements, node: fx.Node, position: int, index: tuple[Expr, ...]) -> tuple[Pred, fx.Node]:
    """A floating operand that isn't a mask: what of it is, and the bias that is left."""
    value = node.args[position]
    if not isinstance(value, fx.Node) or not elements.is_float(value):
        raise Opaque("a bias that is a number")
    try:
        keep, bias = _split(elements, value, elements.stretched(value, index, elements.shape(node)))
    except Opaque:
        return TRUE, _unwritten(elements, value)
    return keep, bias if bias is not None else _unwritten(elements, value)


def _unwritten(elements: Elements, node: fx.Node) -> fx.Node:
    write = elements.writes.between(node, elements.site)
    if write is not None:
        raise Opaque(f"{write.name} writes into the bias {node.name}")
    return node


def _kept(element: Element) -> Pred:
    """What an element of a mask keeps: True, or 0 of an additive mask."""
    if isinstance(element, Pred):
        return element
    if not isinstance(element, Pieces):
        raise Opaque("an integer mask: neither bool nor floating")
    other = [value for value, _ in element.parts if value != 0 and not value <= DROPPED]
    if other:
        raise Opaque(f"a floating-point bias with values such as {other[0]:g}")
    return disjunction(where for value, where in element.parts if value == 0)


def _only_tensors(keep: Pred) -> bool:
    """Whether nothing is known of the predicate but tensors over queries and keys."""
    return any(map(_is_large, loads(keep))) and _without_tensors(keep) == TRUE


def _without_tensors(pred: Pred) -> Pred:
    """The least that is known without them: each comparison with such a load taken to hold."""
    if isinstance(pred, And | Or):
        join = conjunction if isinstance(pred, And) else disjunction
        return join(map(_without_tensors, pred.parts))
    return TRUE if any(map(_is_large, loads(pred))) else pred


def _is_large(load: Load) -> bool:
    return variables(load) >= {"q", "k"}


def _named(elements: Elements, keep: Pred, bias: fx.Node | None) -> RaisedMask:
    """Loads renamed `_0`, `_1`, ... in order of appearance."""
    found: dict[str, str] = {}

    def rename(leaf: Expr) -> Expr | None:
        if not isinstance(leaf, Load):
            return None
        index = tuple(rewrite(part, rename) for part in leaf.index)
        return Load(found.setdefault(leaf.source, f"_{len(found)}"), index)

    keep = rewrite(keep, rename)
    nodes = elements.nodes | elements.scalars.nodes
    assumed = tuple(name for name in found if name in elements.assumed)
    return RaisedMask(keep, tuple(nodes[name] for name in found), bias, assumed)


def load_tensors(raised: RaisedMask, site: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes of the tensors that the loads index, made before `site` where a load is a scalar: those are (1,)."""
    with site.graph.inserting_before(site):
        return tuple(_tensor(node, site) for node in raised.loads)


def _tensor(node: fx.Node, site: fx.Node) -> fx.Node:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor) and value.dim():
        return node
    if isinstance(value, torch.Tensor):
        made = node.graph.call_function(torch.ops.aten.reshape.default, (node, [1]))
        made.meta["val"] = value.reshape(1)
        return made
    like = site.meta["val"]
    kwargs = {"dtype": torch.int64, "device": like.device}
    made = node.graph.call_function(torch.ops.aten.full.default, ([1], node), kwargs)
    made.meta["val"] = like.new_empty([1], dtype=torch.int64)
    return made
