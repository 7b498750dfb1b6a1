"""Recover masks: mask tensors to predicates, and the position of the first query."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from sparsify.expr import (
    TRUE,
    And,
    Expr,
    Ge,
    Load,
    Pred,
    Sum,
    Var,
    conjunction,
    constant,
    rewrite,
    substitute,
    variables,
)
from sparsify.passes.describe import describe, load_names
from sparsify.passes.nodes import ATEN, call, dtype, same, shape, size
from sparsify.passes.raise_mask import load_tensors, raise_mask
from sparsify.passes.runner import Capture
from sparsify.passes.site import Mask, Site

Q, K, N, NQ = Var("q"), Var("k"), Var("N"), Var("Nq")


@dataclass(frozen=True)
class RecoverMasks:
    """Mask tensors to predicates.

    Before: sdpa(q, k, v, attn_mask=where(arange(N) <= arange(N)[:, None], 0, -inf)), or is_causal=True.
    After:  site.keep is `k <= q` and no tensor is left; what can't be raised stays in site.rest as a tensor mask.
            site.q_offset is the absolute position of query row 0: from the model's own causal bound, else Nk - Nq.
    """

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites():
            rows, names = _raised(site)
            _place(site, rows)
            tensor = [] if site.rest is None else ["a bias" if site.rest.kind == "add" else "a tensor mask"]
            words = [] if site.keep == TRUE else [describe(site.keep, names)]
            site.mask_text = " & ".join(words + tensor) or "none"


def _raised(site: Site) -> tuple[Pred, tuple[str, ...]]:
    """The predicate over query rows that a site's masks come to, and the names of its loads; the rest is kept."""
    q, k = shape(site.q), shape(site.k)
    rows = K <= Q if site.causal else TRUE
    loads: list[fx.Node] = []
    names: list[str] = []
    rest: list[Mask] = []
    for mask in site.masks:
        found = raise_mask(mask.node, (q[0], q[1], q[2], k[2]), site.output)
        if not found:
            site.notes.append(str(found))
            rest.append(mask)
            continue
        site.notes += [f"{name} counts as a mask of 0 and 1" for name in found.assumed]
        rows &= _renumbered(found.keep, len(loads))
        loads += load_tensors(found, site.output)
        names += load_names(found.loads)
        if found.bias is not None:
            rest.append(Mask("add", found.bias))
    site.loads = tuple(loads)
    site.rest = _combined(rest, site)
    return rows, tuple(names)


def _renumbered(keep: Pred, by: int) -> Pred:
    """Loads `_0`, `_1`, ... as `_by`, `_by+1`, ...: behind those of the masks before."""

    def rename(leaf: Expr) -> Expr | None:
        if not isinstance(leaf, Load):
            return None
        return Load(f"_{int(leaf.source[1:]) + by}", tuple(rewrite(part, rename) for part in leaf.index))

    return rewrite(keep, rename) if by else keep


def _place(site: Site, rows: Pred) -> None:
    """Rewrites a predicate over query rows into one over absolute positions, and sets where the rows begin."""
    q_len, k_len = shape(site.q)[2], shape(site.k)[2]
    before = site.output
    bound = causal_bound(rows, {"N": k_len, "Nq": q_len})
    if bound is None or bound == N - NQ or same(bound, k_len - q_len):
        known = 0 if same(k_len, q_len) else k_len - q_len if isinstance(k_len - q_len, int) else None
        begin: Expr | int = N - NQ if known is None else known
        site.q_offset = known if known is not None else _difference(before, site)
    else:
        begin = site.q_offset = bound
    site.positions_known = bound is not None or site.rest is None or same(q_len, k_len)
    site.keep = substitute(rows, {"q": Q - begin})


def _difference(before: fx.Node, site: Site) -> fx.Node:
    return call(before, operator.sub, size(before, site.k, 2), size(before, site.q, 2))


def causal_bound(rows: Pred, sizes: dict[str, Any]) -> Any:
    """The c of a bound k <= row + c that a predicate implies: an int, N - Nq, or None if there is none."""
    parts = rows.parts if isinstance(rows, And) else (rows,)
    known = {name: found for name, found in sizes.items() if isinstance(found, int)}
    for part in parts:
        if not isinstance(part, Ge) or not isinstance(part.expr, Sum):
            continue
        rest = part.expr - Q + K
        if variables(rest) & {"q", "k"} or "[" in str(rest):
            continue
        rest = substitute(rest, known)
        number = constant(rest)
        if number is not None:
            return number
        if rest == N - NQ:
            return rest
    return None


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


def is_causal(keep: Pred) -> bool:
    """Whether a predicate keeps no key after the query."""
    return conjunction([keep, K <= Q]) == keep
