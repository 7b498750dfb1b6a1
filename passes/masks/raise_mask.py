"""Raises mask tensors to a closed form: from the code that built them to a predicate over (b, h, q, k) and a bias.

Before, as Hugging Face builds it (19 ATen nodes, a bool tensor of B*Q*K elements):

    le = aten.le(arange_keys[None, None, None, :], arange_queries[None, None, :, None])
    index = aten.index(padding, [arange_batch[:, None, None, None], arange_keys[None, None, None, :]])
    mask = aten.expand(aten.__and__(le, index), [B, -1, Q, K])

After: `k <= q and _0[b, k]`, with the bool padding tensor as load `_0`. No tensor over queries and keys is left.

How: an abstract interpreter (`elements`) asks what the mask's element at [b, h, q, k] is, from the mask
backwards. `arange` answers with its index, views remap indices, comparisons build predicates, and what is opaque
becomes a load of the smallest tensor on the way. Elementwise operations that no closed form describes, but that depend
on few positions (k - q and h, say), are computed anew over those (`tables`). What an additive mask comes to is taken
apart (`resolve`): 0 and "minus a lot" (-inf, the least finite number of a dtype, or anything up to DROPPED) are a
predicate, all else are terms of a bias. Nothing is refused: at worst a mask is a load over queries and keys.

One thing it assumes, and says so in `assumed`: integers that the model computes (1 - mask) * min with are 0 or 1;
`exact` takes nothing for granted. Additive masks differ from a predicate in one place: a row that keeps nothing is an
average over everything when its mask is finite, NaN when it is -inf, and 0 here, as in every kernel.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify import bias as biases
from sparsify.bias import Bias, Term
from sparsify.expr import TRUE, Expr, Load, Pred, Select, Test, Var, as_expr, eq, negate
from sparsify.passes.masks.elements import Elements, is_one
from sparsify.passes.masks.resolve import Resolver, simplified
from sparsify.passes.masks.values import DROPPED, Element, Opaque, Pieces, as_bool, as_pieces
from sparsify.passes.site import Mask
from sparsify.program import MAX_RANK
from sparsify.text import POSITIONS
from sparsify.walk import loads, rewrite, substitute, variables

log = logging.getLogger("sparsify")
Shape = tuple[int | torch.SymInt, ...]


@dataclass(frozen=True)
class RaisedMask:
    """Mask tensors as a predicate and a bias.

    keep: over b, h, q (the query's row, from 0), k (the key's index), N and Nq (the lengths, where they are symbolic)
        and loads `_0[...]`, `_1[...]`, ...
    bias: what is added to the scores where `keep` holds, over the same names. sink: that of the sink, if there is one.
    loads: the nodes that the loads name. `load_tensors` makes tensors that kernels take of them.
    assumed: the names of integer inputs that count as masks of 0 and 1, because the model computes (1 - mask) * min.
    """

    keep: Pred
    bias: Bias = ()
    sink: Bias | None = None
    loads: tuple[fx.Node, ...] = ()
    assumed: tuple[str, ...] = ()

    def absolute(self, offset: Expr | int) -> Pred:
        """`keep` with q as the absolute position of the query, which is `offset` in row 0."""
        return substitute(self.keep, {"q": Var("q") - offset})


def raise_mask(node: fx.Node, shape: Shape, site: fx.Node | None = None, exact: bool = False) -> RaisedMask:
    """What one mask does: one that keeps where it is bool (or uint8), else one to be added. See `raise_masks`."""
    kept = node.meta["val"].dtype in (torch.bool, torch.uint8)
    return raise_masks([Mask("bool" if kept else "add", node)], None, shape, site, exact)


def raise_masks(
    masks: Sequence[Mask], sink: fx.Node | None, shape: Shape, site: fx.Node | None = None, exact: bool = False
) -> RaisedMask:
    """What masks do together to scores of `shape` (B, H, Q, K), read by the attention at `site`.

    Their tensors broadcast to `shape`; those that are added may be of any dtype, and True then counts as 1. That of
    `sink` broadcasts to (B, H, Q, 1). `site` matters for what is written in place between a mask and the attention,
    and new nodes go in front of it; without one, the end of the graph. The graph gains nodes only where a table is
    needed.
    """
    site = site or next(reversed(masks[0].node.graph.nodes))
    el = Elements(site, shape)
    resolver = Resolver(el, shape, exact)
    keep, terms = TRUE, ()
    for mask in masks:
        kept, added = _mask(resolver, mask, _top_index(el, mask.node, shape))
        keep, terms = keep & kept, terms + added
    found = None if sink is None else _sink(resolver, sink, (*_top_index(el, sink, shape)[:-1], as_expr(0)))
    return _named(resolver, el.box.decide(keep), terms, found)


def _top_index(el: Elements, node: fx.Node, shape: Shape) -> tuple[Expr, ...]:
    """The mask's own index. Where mask and scores both have size 1 the position stays: `q` reads better than 0."""
    sizes = el.shape(node)
    names = "bhqk"[4 - len(sizes) :]
    stretched = [is_one(size) and not is_one(other) for size, other in zip(sizes, shape[4 - len(sizes) :], strict=True)]
    return tuple(as_expr(0) if s else Var(name) for s, name in zip(stretched, names, strict=True))


def _mask(resolver: Resolver, mask: Mask, index: tuple[Expr, ...]) -> tuple[Pred, Bias]:
    el = resolver.el

    def read() -> tuple[Pred, Bias]:
        element = el.at(mask.node, index)
        if mask.kind == "bool":
            return _known(el, resolver.resolved(as_bool(element))), ()
        keep, bias = resolver.added(_number(element))
        return _known(el, keep), _known(el, bias)

    found = _attempt(mask.node, read)
    if found is not None:
        return found
    load = _whole(el, mask.node, index)
    if mask.kind == "add":
        return TRUE, (_whole_term(el, mask.node, load),)
    return Test(load) if el.dtype(mask.node) == torch.bool else negate(eq(load, 0)), ()


def _sink(resolver: Resolver, node: fx.Node, index: tuple[Expr, ...]) -> Bias:
    """The terms of a sink: a logit as it is, -inf and all."""
    el = resolver.el

    def read() -> Bias | None:
        element = _number(el.at(node, index))
        if not isinstance(element, Pieces):
            keep, terms = resolver.added(element)
            return _known(el, terms) if keep == TRUE else None
        if any(value <= DROPPED for value, _ in element.parts):
            return None
        return _known(el, tuple(Term(value, where=where) for value, where in element.parts if value))

    found = _attempt(node, read)
    return (_whole_term(el, node, _whole(el, node, index)),) if found is None else found


def _attempt(node: fx.Node, read: Callable[[], Any]) -> Any:
    """What a tensor was read as, or None: the tensor itself is always right."""
    try:
        return read()
    except Exception as error:
        if not isinstance(error, Opaque):
            log.warning("the mask %s could not be read; it stays a tensor", node.name, exc_info=True)
        return None


def _number(element: Element) -> Element:
    """An element that is added: True is 1, and integers that are a choice of a few are constants."""
    if isinstance(element, Pred | Select):
        with contextlib.suppress(Opaque):
            return as_pieces(element)
    return element


def _whole(el: Elements, node: fx.Node, index: tuple[Expr, ...]) -> Load:
    """A load of a mask's own tensor."""
    el.nodes[node.name] = node
    return Load(node.name, index or (as_expr(0),))


def _whole_term(el: Elements, node: fx.Node, load: Load) -> Term:
    """What adds a tensor of any dtype."""
    if el.is_float(node):
        return Term(1.0, (load,))
    return Term(1.0, where=Test(load)) if el.dtype(node) == torch.bool else Term(1.0, integer=load)


def _known(el: Elements, found: Any) -> Any:
    """A predicate or a bias, if all that it names is known where kernels run, and all that it loads can be read."""
    names = biases.variables(found) if isinstance(found, tuple) else variables(found)
    unknown = sorted(names - set(POSITIONS))
    if unknown:
        raise Opaque(f"the size {unknown[0]}, which no node of the graph holds")
    read = biases.loads(found) if isinstance(found, tuple) else loads(found)
    if any(len(load.index) > MAX_RANK for load in read):
        raise Opaque(f"a tensor of more than {MAX_RANK} dimensions")
    return found


def _named(resolver: Resolver, keep: Pred, bias: Bias, sink: Bias | None) -> RaisedMask:
    """Loads renamed `_0`, `_1`, ... in order of appearance."""
    found: dict[str, str] = {}

    def rename(leaf: Expr) -> Expr | None:
        if not isinstance(leaf, Load):
            return None
        index = tuple(rewrite(part, rename) for part in leaf.index)
        return Load(found.setdefault(leaf.source, f"_{len(found)}"), index)

    keep, bias = rewrite(keep, rename), biases.rewrite(bias, rename)
    sink = None if sink is None else biases.rewrite(sink, rename)
    nodes = resolver.el.nodes | resolver.el.scalars.nodes
    assumed = tuple(name for name in found if name in resolver.assumed)
    return RaisedMask(keep, simplified(keep, bias), sink, tuple(nodes[name] for name in found), assumed)


def load_tensors(raised: RaisedMask, site: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes of the tensors that the loads index, made before `site` where kernels can't take a load as it is.

    Scalars become tensors (1,), float64 becomes float32 (its least number becomes -inf, which drops, too).
    """
    with site.graph.inserting_before(site):
        return tuple(_tensor(node, site) for node in raised.loads)


def _tensor(node: fx.Node, site: fx.Node) -> fx.Node:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        like = site.meta["val"]
        kwargs = {"dtype": torch.int64, "device": like.device}
        made = node.graph.call_function(torch.ops.aten.full.default, ([1], node), kwargs)
        made.meta["val"] = like.new_empty([1], dtype=torch.int64)
        return made
    if value.dtype == torch.float64:
        made = node.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
        made.meta["val"] = value = value.to(torch.float32)
        made.meta["mask_name"], node = node.meta.get("mask_name", node.name), made
    if not value.dim():
        made = node.graph.call_function(torch.ops.aten.reshape.default, (node, [1]))
        made.meta["val"] = value.reshape(1)
        return made
    return node
