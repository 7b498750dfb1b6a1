"""Recover masks: mask tensors to predicates, and the position of the first query."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.expr import TRUE, And, Expr, Ge, Load, Pred, Var, conjunction
from sparsify.passes.masks.describe import describe, load_names
from sparsify.passes.masks.raise_mask import HINT, RaisedMask, load_tensors, raise_mask
from sparsify.passes.nodes import ATEN, call, dtype, same, shape, size
from sparsify.passes.runner import Capture
from sparsify.passes.site import Mask, Site
from sparsify.walk import loads, rewrite, substitute, variables

Q, K, N, NQ = Var("q"), Var("k"), Var("N"), Var("Nq")


log = logging.getLogger("sparsify")


@dataclass(frozen=True)
class RecoverMasks:
    """Mask tensors to predicates.

    Before: sdpa(q, k, v, attn_mask=where(arange(N) <= arange(N)[:, None], 0, -inf)), or is_causal=True.
    After:  site.keep is `k <= q` and no tensor is left; what can't be raised stays in site.rest as a tensor mask.
            site.q_offset is the absolute position of query row 0: 0 if it keeps `k <= row`, else Nk - Nq. Where its
            bounds on the keys say something else, the positions of the queries are unknown.

    exact: leave a mask as a tensor that is one only if the integers it is made of are 0 and 1.
    """

    exact: bool = False

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites():
            rows, names = _raised(site, self.exact)
            site.load_names = names
            _place(site, rows)
            tensor = [] if site.rest is None else ["a bias" if site.rest.kind == "add" else "a tensor mask"]
            words = [] if site.keep == TRUE else [describe(site.keep, names)]
            site.mask_text = " & ".join(words + tensor) or "none"


def _raised(site: Site, exact: bool) -> tuple[Pred, tuple[str, ...]]:
    """The predicate over query rows that a site's masks come to, and the names of its loads; the rest is kept."""
    q, k = shape(site.q), shape(site.k)
    rows = K <= Q if site.causal else TRUE
    tensors: list[fx.Node] = []
    names: list[str] = []
    rest: list[Mask] = []
    for mask in site.masks:
        found = _closed_form(mask.node, (q[0], q[1], q[2], k[2]), site)
        if found and found.assumed and exact:
            found = Refusal(f"mask: {found.assumed[0]} may hold other numbers than 0 and 1", mask.node.name, HINT)
        if not found:
            site.notes.append(str(found))
            rest.append(mask)
            continue
        site.notes += [f"{name} counts as a mask of 0 and 1" for name in found.assumed]
        rows &= _renumbered(found.keep, len(tensors))
        tensors += load_tensors(found, site.output)
        names += load_names(found.loads)
        if found.bias is not None:
            rest.append(Mask("add", found.bias))
    site.loads = tuple(tensors)
    site.rest = _combined(rest, site)
    return rows, tuple(names)


def _closed_form(node: fx.Node, sizes: tuple[Any, ...], site: Site) -> RaisedMask | Refusal:
    """A mask that fails to be read, for whatever reason, stays a tensor: that is always right."""
    try:
        return raise_mask(node, sizes, site.output)
    except Exception as error:
        log.warning("the mask %s could not be read; it stays a tensor", node.name, exc_info=True)
        return Refusal(f"mask: {type(error).__name__}: {error}", node.name, HINT)


def _renumbered(keep: Pred, by: int) -> Pred:
    """Loads `_0`, `_1`, ... as `_by`, `_by+1`, ...: behind those of the masks before."""

    def rename(leaf: Expr) -> Expr | None:
        if not isinstance(leaf, Load):
            return None
        return Load(f"_{int(leaf.source[1:]) + by}", tuple(rewrite(part, rename) for part in leaf.index))

    return rewrite(keep, rename) if by else keep


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
    site.keep = substitute(rows, {"q": Q - begin})
    if gap == 0 or Q + begin in bounds:
        return
    read = [bound for bound in bounds if loads(bound) and ("q" in variables(bound) or same(q_len, 1))]
    if read:
        site.position = substitute(read[0], {"q": Q - begin})
    elif site.rest is not None or any("q" in variables(bound) for bound in bounds):
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


def _combined(masks: list[Mask], site: Site) -> Mask | None:
    """One tensor mask that does what several do."""
    before = site.output
    keeps = [mask.node for mask in masks if mask.kind == "bool"]
    added = [_as_float(mask.node, site) for mask in masks if mask.kind == "add"]
    keep = reduce(lambda a, b: call(before, ATEN.logical_and.default, a, b), keeps) if keeps else None
    bias = reduce(lambda a, b: call(before, ATEN.add.Tensor, a, b), added) if added else None
    if bias is None:
        return None if keep is None else Mask("bool", keep)
    if keep is None:
        return Mask("add", bias)
    empty = call(before, ATEN.full_like.default, bias, float("-inf"))
    return Mask("add", call(before, ATEN.where.self, keep, bias, empty))


def _as_float(node: fx.Node, site: Site) -> fx.Node:
    """An additive mask in a dtype that kernels take."""
    if dtype(node) in (torch.float32, torch.bfloat16, torch.float16):
        return node
    return call(site.output, ATEN.to.dtype, node, torch.float32)


def is_causal(site: Site) -> bool:
    """Whether the model's own mask keeps no key after the query; a single last query has none."""
    if site.kind == "self" and same(shape(site.q)[2], 1) and site.position == Q:
        return True
    return conjunction([site.keep, site.position >= K]) == site.keep
