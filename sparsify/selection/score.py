"""Steps 2 to 8 of selection: from views to one score for each unit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify.patterns.selector import Selector
from sparsify.patterns.selector_checks import argument
from sparsify.selection.geometry import Places, edges, seen, split
from sparsify.selection.order import order_key
from sparsify.selection.search import searched_scores
from sparsify.selection.views import KeyView, QueryView, key_view, query_view


def unit_scores(
    selector: Selector, q: Tensor, k: Tensor, scale: float, at: Places, forced: Tensor, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores (B, L, R, U) float32 and which of them compete, (B, 1 or L, R, U).

    q: (B, H, N, D), k: (B, J, M, D), both float32. forced: (B, 1 or H, R, U), left out by domain `middle`.
    """
    view, scores, visible = normed_scores(selector, q, k, scale, at, forced, sums)
    rows, keys = view[0].per_row, view[1].per_unit
    scores, competes = _pool(scores, visible, rows, keys, selector.score.pool)
    if not rows:  # one row of scores for all
        competes = competes & seen(at.rows.horizon, edges(at.inside, selector.score.causal)).unsqueeze(1)
        scores = scores.expand(-1, -1, at.reach.shape[1], -1)
    scores = _smooth(scores, competes, selector.score.smooth)
    if selector.heads.when == "unit":
        heads = scores.shape[1]
        scores = join_units(selector, scores, competes, k.shape[1])
        if competes.shape[1] == heads:  # heads see other keys of a unit (rep_search), but the same units
            competes = competes[:, :: heads // scores.shape[1]]
    return scores, competes


def normed_scores(
    selector: Selector, q: Tensor, k: Tensor, scale: float, at: Places, forced: Tensor, sums: Tensor | None = None
) -> tuple[tuple[QueryView, KeyView], Tensor, Tensor]:
    """Steps 1 to 6: the views, scores (B, heads, A, C), and what is visible of them, (B, 1 or H, A, C)."""
    heads, lists = selector.heads, selector.lists(q.shape[1], k.shape[1])
    if heads.when == "query":
        q = join(q, lists, heads.op)
    queries, keys = query_view(selector, q, at), key_view(selector, k, scale, at)
    visible = seen(queries.horizon, edges(keys.inside, selector.score.causal)).unsqueeze(1)
    if selector.score.kview == "rep_search":
        scores, sees = searched_scores(queries, k, scale, at)
        visible = visible & sees
    else:
        scores = _products(queries.vectors, keys) * scale
    if selector.score.domain == "middle":
        visible = visible & ~_spread(forced, queries.per_row, keys.per_unit, scores.shape[-2:])
    scores = torch.where(visible, scores, -torch.inf)
    if heads.when == "pre":
        scores = join(scores, lists, heads.op)
    if selector.score.norm == "accumulated":
        scores = _accumulated(_norm(scores, visible, "softmax", 0), queries.horizon >= 0, selector.score.decay, sums)
        scores = torch.where(visible, scores, 0.0)
    else:
        scores = _norm(scores, visible, selector.score.norm, queries.per_row)
    if heads.when == "token":
        scores = join(scores, lists, heads.op)
    return (queries, keys), scores, visible


def _products(q: Tensor, keys: KeyView) -> Tensor:
    """(B, H, A, D) by (B, J, C, D) to (B, H, A, C), each key head serving H / J query heads."""
    grouped = q.unflatten(1, (keys.vectors.shape[1], -1)).flatten(2, 3)
    if keys.low is None:
        scores = grouped @ keys.vectors.mT
    else:
        scores = grouped.clamp(min=0) @ keys.vectors.mT + grouped.clamp(max=0) @ keys.low.mT
    return scores.unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _spread(forced: Tensor, per_row: int, per_unit: int, shape: torch.Size) -> Tensor:
    """(B, h, R, U) to the views' own slots, (B, h, A, C)."""
    return _repeat(_repeat(forced, per_row, -2, shape[0]), per_unit, -1, shape[1])


def _repeat(x: Tensor, times: int, dim: int, n: int) -> Tensor:
    """Each entry of a dimension `times` times, n in all."""
    return x.index_select(dim, torch.arange(n, device=x.device) // times) if times > 1 else x


def _norm(scores: Tensor, visible: Tensor, norm: str, per_row: int) -> Tensor:
    if norm == "softmax":
        return torch.where(visible, torch.softmax(scores, -1), 0.0)  # a row that sees nothing gives NaN
    if norm == "exp_rowmax":
        best = scores.amax(-1, keepdim=True)
        if per_row:
            best = split(best.squeeze(-1), per_row, -torch.inf).amax(-1, keepdim=True)
            best = _repeat(best, per_row, -2, scores.shape[-2])
        else:
            best = best.amax(-2, keepdim=True)
        return torch.where(visible, (scores - best).exp(), 0.0)
    return scores


def _accumulated(scores: Tensor, alive: Tensor, decay: float, sums: Tensor | None) -> Tensor:
    """(B, heads, A, C): each query's scores and what is left of those before it, and of `sums`, which goes on in place.

    alive: (B, A), which queries take part; the others count for no step.
    """
    if decay == 1.0:
        summed = scores.cumsum(-2)
    else:
        step = alive.cumsum(-1)
        apart = step.unsqueeze(-1) - step.unsqueeze(-2)
        summed = torch.where(apart >= 0, decay ** apart.clamp(min=0).float(), 0.0).tril().unsqueeze(1) @ scores
    if sums is None:
        return summed
    kept = sums[..., : scores.shape[-1]]
    summed = summed + kept.unsqueeze(-2) * decay ** alive.cumsum(-1)[:, None, :, None].float()
    kept.copy_(summed[..., -1, :])
    return summed


def _pool(scores: Tensor, visible: Tensor, per_row: int, per_unit: int, how: str) -> tuple[Tensor, Tensor]:
    """(B, h, A, C) to (B, h, R, U): the sum, max or mean over what is visible; and where anything is."""
    if per_row == per_unit == 1:
        return torch.where(visible, scores, 0.0), visible
    shown = _tiles(visible, per_row, per_unit, False)
    tiles = _tiles(torch.where(visible, scores, -torch.inf if how == "max" else 0.0), per_row, per_unit, 0.0)
    dims = (-3, -1)
    competes = shown.any(-1).any(-2)
    if how == "max":
        pooled = torch.where(shown, tiles, -torch.inf).amax(dims)
    else:
        pooled = tiles.sum(dims)
        if how == "mean":
            pooled = pooled / shown.sum(dims).clamp(min=1)
    return torch.where(competes, pooled, 0.0), competes


def _tiles(x: Tensor, per_row: int, per_unit: int, fill: float | bool) -> Tensor:
    """(..., A, C) to (..., R, per_row, U, per_unit)."""
    x = split(x, per_unit, fill)
    return split(x.movedim(-3, -1), per_row, fill).movedim((-2, -1), (-4, -3)) if per_row else x.unsqueeze(-4)


def _smooth(scores: Tensor, competes: Tensor, how: str) -> Tensor:
    """The max or mean over neighbouring units that compete."""
    width = argument(how)
    if width < 2:
        return scores
    competes = competes.expand_as(scores)
    fill = -torch.inf if how.startswith("max") else 0.0
    near = _neighbours(torch.where(competes, scores, fill), width, fill)
    if how.startswith("max"):
        smoothed = near.amax(-1)
    else:
        smoothed = near.sum(-1) / _neighbours(competes.float(), width, 0.0).sum(-1).clamp(min=1)
    return torch.where(competes, smoothed, 0.0)


def _neighbours(x: Tensor, width: int, fill: float) -> Tensor:
    """(..., U) to (..., U, width): each entry among its neighbours."""
    return pad(x, (width // 2, width // 2), value=fill).unfold(-1, width, 1)


def join_units(selector: Selector, scores: Tensor, competes: Tensor, kv_heads: int) -> Tensor:
    """Step 8: unit scores (B, heads, R, U) of the heads that choose together become one."""
    lists = selector.lists(scores.shape[1], kv_heads)
    if selector.heads.op != "best_rank":
        return join(scores, lists, selector.heads.op)
    key = order_key(scores, competes.expand_as(scores)).unflatten(1, (lists, -1))
    order = key.argsort(-1, descending=True)
    heads = order.shape[2]
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter(-1, order, place)
    head = torch.arange(heads, device=order.device)[:, None, None]
    return -(rank * heads + head).amin(2).float()


def join(x: Tensor, lists: int, op: str) -> Tensor:
    """(B, heads, ...) to (B, lists, ...): the sum, max or mean over the heads of each list."""
    if x.shape[1] == lists:
        return x
    grouped = x.unflatten(1, (lists, -1))
    return {"sum": torch.sum, "max": torch.amax, "mean": torch.mean}[op](grouped, 2)
