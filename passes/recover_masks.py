"""Recover masks: mask tensors to predicates and biases, and the position of the first query."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify import bias
from sparsify.expr import TRUE, And, Expr, Ge, Load, Pred, Var, conjunction
from sparsify.passes.aliasing import Writes
from sparsify.passes.forms.axes import EXPANDS, PERMUTES, REGROUPS
from sparsify.passes.masks.describe import describe, load_names
from sparsify.passes.masks.raise_mask import RaisedMask, load_tensors, raise_masks
from sparsify.passes.nodes import call, op, same, shape, size
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.walk import loads, substitute, variables

Q, K, N, NQ = Var("q"), Var("k"), Var("N"), Var("Nq")


@dataclass(frozen=True)
class RecoverMasks:
    """Mask tensors to predicates and biases.

    Before: sdpa(q, k, v, attn_mask=where(arange(N) <= arange(N)[:, None], 0, -inf)), or is_causal=True.
    After:  site.keep is `k <= q`, site.bias and site.sink_bias are empty; what depends on data is in site.loads.
            site.q_offset is the absolute position of query row 0: 0 if it keeps `k <= row`, else Nk - Nq. Where its
            bounds on the keys say something else, the positions of the queries are unknown.

    exact: take no integers for a mask of 0 and 1.
    """

    exact: bool = False

    def __call__(self, capture: Capture) -> None:
        known: dict[Any, tuple[RaisedMask, tuple[fx.Node, ...]]] | None = None if Writes(capture.graph) else {}
        for site in capture.open_sites():
            raised, site.loads = _raised(site, self.exact, known)
            site.load_names = load_names(raised.loads)
            site.notes += [f"{name} counts as a mask of 0 and 1" for name in raised.assumed]
            site.bias, site.sink_bias = raised.bias, raised.sink
            _place(site, raised.keep & (K <= Q if site.causal else TRUE))
            site.mask_text = "none" if site.keep == TRUE else describe(site.keep, site.load_names)


def _raised(site: Site, exact: bool, known: dict[Any, Any] | None) -> tuple[RaisedMask, tuple[fx.Node, ...]]:
    """What a site's masks come to, and the tensors of its loads. Sites that share their masks share those."""
    q, k = shape(site.q), shape(site.k)
    sizes = (q[0], q[1], q[2], k[2])
    masks = tuple(site.masks)
    if not masks and site.sink is None:
        return RaisedMask(TRUE), ()
    key = (
        tuple((mask.kind, _key(mask.node)) for mask in masks),
        site.sink,
        tuple(map(str, sizes)),
        tuple(_fixed(size) for size in sizes),
    )
    if known is None or key not in known:
        raised = raise_masks(masks, site.sink, sizes, site.output, exact)
        found = raised, load_tensors(raised, site.output)
        if known is None:
            return found
        known[key] = found
    return known[key]


def _key(node: fx.Node) -> Any:
    """The same for masks that sites arranged alike for themselves."""
    if op(node) not in ("logical_not", *REGROUPS, *PERMUTES, *EXPANDS):
        return node
    return node.target, _key(node.args[0]), str(node.args[1:]), str(node.kwargs)


def _place(site: Site, rows: Pred) -> None:
    """Rewrites a predicate over query rows into one over absolute positions, and sets where the rows begin.

    That is 0 where the model keeps `k <= row` (SDPA's flag, the first chunk in a static cache), else Nk - Nq. A bound
    `k <= row + c` with another c is no proof of a position: windows to both sides have one, too. One that compares
    with a tensor, such as a static cache's `k <= position[row]`, says what a row's position is.
    """
    q_len, k_len = shape(site.q)[2], shape(site.k)[2]
    bounds = [_known(bound, {"N": k_len, "Nq": q_len}) for bound in causal_bounds(rows)]
    gap = 0 if Q in bounds else _fixed(k_len - q_len)
    begin: Expr | int
    if gap is not None:
        begin = site.q_offset = gap
    else:
        begin, site.q_offset = N - NQ, _difference(site.output, site)
    row = {"q": Q - begin}
    site.keep, site.bias = substitute(rows, row), bias.substitute(site.bias, row)
    if site.sink_bias is not None:
        site.sink_bias = bias.substitute(site.sink_bias, row)
    if gap == 0 or Q + begin in bounds:
        return
    read = [bound for bound in bounds if loads(bound) and ("q" in variables(bound) or same(q_len, 1))]
    if read:
        site.position = substitute(read[0], row)
    elif any(map(_spans, loads(rows) + bias.loads(site.bias))) or any("q" in variables(bound) for bound in bounds):
        site.positions_known = False


def _fixed(size: Any) -> int | None:
    """A size that is the same in every run, else None."""
    found = size if isinstance(size, int) else size.node.hint
    return found if found is not None and same(size, found) else None


def _difference(before: fx.Node, site: Site) -> fx.Node:
    return call(before, operator.sub, size(before, site.k, 2), size(before, site.q, 2))


def _known(bound: Expr, sizes: dict[str, Any]) -> Expr:
    """A bound with fixed sizes filled in."""
    values = {name: found for name, size in sizes.items() if (found := _fixed(size)) is not None}
    gap = _fixed(sizes["N"] - sizes["Nq"])
    if gap is not None:
        values.setdefault("N", NQ + gap)
    return substitute(bound, values)


def causal_bounds(rows: Pred) -> list[Expr]:
    """The p, over q and launch scalars, of every bound k <= p that a predicate implies and that grows with the query.

    Those with q or a load in them: others are limits on the keys that say nothing about the queries' position.
    """
    parts = rows.parts if isinstance(rows, And) else (rows,)
    found = [part.expr + K for part in parts if isinstance(part, Ge)]
    return [bound for bound in found if "k" not in variables(bound) and ("q" in variables(bound) or loads(bound))]


def _spans(load: Load) -> bool:
    """Whether a load is one of a tensor over queries and keys."""
    return sum(bool(variables(part) & {"q", "k"}) for part in load.index) > 1


def is_causal(site: Site) -> bool:
    """Whether the model's own mask keeps no key after the query; a single last query has none."""
    if site.kind == "self" and same(shape(site.q)[2], 1) and site.position == Q:
        return True
    return conjunction([site.keep, site.position >= K]) == site.keep
