"""The representative of each unit of keys, found by halving (HiP)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify.selection.geometry import Places, blocks_in, split
from sparsify.selection.views import QueryView


def searched_scores(view: QueryView, k: Tensor, scale: float, at: Places) -> tuple[Tensor, Tensor]:
    """Scores (B, H, A, U) of the views with the representatives that their row finds, and which of those they see.

    A search begins with a whole unit and goes on with the half whose middle key has the greater score, by the best of
    the row's queries that see it; the left one of equals, and never a half without a key that the row sees. So a
    unit of S keys takes log2(S) steps of two products.
    """
    views = view.vectors.shape[2]
    per_row = view.per_row or views
    rows = blocks_in(views, per_row)
    q = pad(view.vectors, (0, 0, 0, rows * per_row - views)).unflatten(2, (rows, per_row))
    horizon = split(view.horizon, per_row, -1)  # (B, R, views of a row)
    token = _representatives(q, horizon, k, scale, at)
    scores, sees = _scored(q, horizon, k, scale, at, token)
    first = torch.arange(views, device=k.device)  # a slice would be a guard on whether the last row is full
    return scores.flatten(2, 3).index_select(2, first), sees.flatten(2, 3).index_select(2, first)


def _representatives(q: Tensor, horizon: Tensor, k: Tensor, scale: float, at: Places) -> Tensor:
    """Tokens (B, H, R, U)."""
    units, size = at.inside.shape[-2:]
    there = at.inside.flatten(-2).unsqueeze(1)
    there = there & (torch.arange(units * size, device=k.device) <= horizon.amax(-1).unsqueeze(-1))
    before = pad(there.long().cumsum(-1), (1, 0)).unsqueeze(1)  # so many keys that the row sees before each token
    before = before.expand(*q.shape[:2], -1, -1)
    begin = (torch.arange(units, device=k.device) * size).expand(*q.shape[:3], units)
    while size > 1:
        size //= 2
        halves = torch.stack([begin, begin + size])
        left, right = (before.gather(-1, half + size) > before.gather(-1, half) for half in halves)
        scores, sees = zip(*(_scored(q, horizon, k, scale, at, half + size // 2) for half in halves), strict=True)
        best = [torch.where(seen, score, -torch.inf).amax(-2) for score, seen in zip(scores, sees, strict=True)]
        begin = torch.where(right & (~left | (best[1] > best[0])), begin + size, begin)
    return begin


def _scored(q: Tensor, horizon: Tensor, k: Tensor, scale: float, at: Places, token: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of queries q (B, H, R, A, D) with a token for each unit, (B, H, R, A, U), and which of them are seen."""
    kv_heads, keys = k.shape[1:3]
    place = token.clamp(max=keys - 1).unflatten(1, (kv_heads, -1)).flatten(2)
    found = k.gather(2, place.unsqueeze(-1).expand(*place.shape, k.shape[3]))
    found = found.unflatten(2, (-1, *token.shape[2:])).flatten(1, 2)  # (B, H, R, U, D)
    usable = at.inside.flatten(-2)[:, None, None].expand(*token.shape[:3], -1).gather(-1, token)
    sees = usable.unsqueeze(-2) & (token.unsqueeze(-2) <= horizon[:, None, :, :, None])
    return q @ found.mT * scale, sees
