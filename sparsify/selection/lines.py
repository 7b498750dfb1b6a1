"""Vertical-slash selection (MInference): the best columns and diagonals, the same for every query."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.patterns.selector import Selector
from sparsify.selection.geometry import Places
from sparsify.selection.order import best_list, listed, order_key
from sparsify.selection.score import join_units, normed_scores
from sparsify.selection.views import QueryView


def line_lists(selector: Selector, q: Tensor, k: Tensor, scale: float, at: Places) -> list[tuple[Tensor, Tensor]]:
    """Two lists: units that the chosen diagonals touch in each row, and what they leave of the chosen columns."""
    (view, _), weights, visible = normed_scores(selector, q, k, scale, at, at.reach.unsqueeze(1))
    columns = weights.sum(-2, keepdim=True), visible.any(-2, keepdim=True)
    diagonals = diagonals_of(weights, visible, view)
    if selector.heads.when == "unit":
        columns, diagonals = ((join_units(selector, s, c, k.shape[1]), c) for s, c in (columns, diagonals))
    lines = selector.lines
    key = torch.arange(k.shape[2], device=k.device)
    first = ((key >= at.start) & (key < at.start + lines.first))[:, None, None]
    last = (key < lines.last)[None, None, None]
    column_list, _ = _best(*columns, first, lines.verticals)
    slashes, _ = _best(*diagonals, last, lines.slashes)
    blocks = _touched(slashes.squeeze(2), selector.unit.k, k.shape[2], at)
    room = torch.sym_min(blocks.shape[-1], lines.slashes * most_touched(selector))
    return [listed(blocks, room), _left(column_list, blocks, selector.unit.k, k.shape[2], at)]


def most_touched(selector: Selector) -> int:
    """The greatest number of units that a diagonal touches in a row."""
    return (selector.unit.q + selector.unit.k - 2) // selector.unit.k + 1


def diagonals_of(weights: Tensor, visible: Tensor, view: QueryView) -> tuple[Tensor, Tensor]:
    """Sums (B, h, 1, M) of weights (B, h, n, M) over pairs whose key is 0, 1, ... positions before the query."""
    keys = weights.shape[-1]
    key = view.horizon.unsqueeze(-1) - torch.arange(keys, device=weights.device)  # (B, n, offsets)
    there = ((key >= 0) & (key < keys)).unsqueeze(1)
    at = key.clamp(0, keys - 1).unsqueeze(1)
    batch = weights.shape[0]
    shown = there & visible.expand(batch, -1, -1, -1).gather(-1, at.expand(batch, -1, -1, -1))
    moved = weights.gather(-1, at.expand_as(weights))
    return torch.where(shown, moved, 0.0).sum(-2, keepdim=True), shown.any(-2, keepdim=True)


def _best(scores: Tensor, competes: Tensor, first: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` best lines, forced ones first."""
    competes = competes.expand_as(scores)
    limit = competes.sum(-1).clamp(max=number)
    key = order_key(scores, competes, first & competes)
    return best_list(key, limit, torch.sym_min(number, scores.shape[-1]))


def _touched(slashes: Tensor, size: int, keys: int, at: Places) -> Tensor:
    """(B, L, R, U): units in which a row of queries meets one of the diagonals (B, L, S), unused ones equal to M."""
    units = at.reach.shape[-1]
    begin = size * torch.arange(units, device=slashes.device)
    low = at.rows.first.unsqueeze(-1) - begin - size + 1  # the diagonals low .. high meet the unit in the row
    high = at.rows.last.unsqueeze(-1) - begin
    low, high = (x.clamp(0, keys).unsqueeze(1).flatten(-2).int() for x in (low, high + 1))
    shape = (*slashes.shape[:2], -1)
    before = torch.searchsorted(slashes, low.expand(shape).contiguous(), out_int32=True)
    upto = torch.searchsorted(slashes, high.expand(shape).contiguous(), out_int32=True)
    return (upto > before).unflatten(-1, (-1, units)) & at.reach.unsqueeze(1)


def _left(columns: Tensor, blocks: Tensor, size: int, keys: int, at: Places) -> tuple[Tensor, Tensor]:
    """The columns (B, L, 1, V) that a row sees and that lie in none of its blocks."""
    column = columns.long().expand(-1, -1, blocks.shape[2], -1)
    units = blocks.shape[-1]
    covered = blocks.gather(-1, (column // size).clamp(max=units - 1))
    seen = (column < keys) & (column <= at.rows.horizon[:, None, :, None])
    place, count = listed(seen & ~covered, column.shape[-1])
    ends = torch.cat([column, torch.full_like(column[..., :1], keys)], -1)
    return ends.gather(-1, place.long()).int(), count
