"""Step 0 of selection: the order in which a key head's keys are made units."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.patterns.selector import Selector
from sparsify.selection.geometry import split, usable
from sparsify.selection.order import index_of, order_key
from sparsify.selection.views import last_queries


def key_order(
    selector: Selector, q: Tensor, k: Tensor, *, scale: float, position: Tensor, valid: Tensor | None
) -> Tensor:
    """Which token each slot of the keys holds: (B, J, M) int32, a permutation inside each segment of the tokens.

    In a segment that ends before the last query does, the keys are in the order of their scores, the greatest first:
    the mean, over the last valid queries and the heads of the group, of their softmax over such segments' keys, those
    after the query included. Keys that may not be used come last. The tokens of other segments stay where they are.

    q: (B, H, N, D), k: (B, J, M, D), any float dtype; position, valid: as in `choose`.
    """
    permute, keys = selector.permute, k.shape[2]
    assert permute is not None
    q, k = q.detach().float(), k.detach().float()
    seat = torch.where(usable(position, valid, keys, True), position, -1)
    last = last_queries(q, seat.expand(q.shape[0], -1), seat.expand(q.shape[0], -1), permute.last)
    looks = last.horizon >= 0
    whole = (last.horizon.amax(-1, keepdim=True) + 1) // permute.segment * permute.segment
    shown = torch.arange(keys, device=k.device) < whole
    shown = shown if valid is None else shown & valid
    grouped = last.vectors.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    weights = torch.softmax(torch.where(shown[:, None, None], grouped @ k.mT * scale, -torch.inf), -1)
    rows = looks.repeat(1, q.shape[1] // k.shape[1])[:, None, :, None]
    scores = torch.where(rows & shown[:, None, None], weights, 0.0).sum(2) / rows.sum(2).clamp(min=1)
    scores, shown = (split(x, permute.segment, fill) for x, fill in ((scores, 0.0), (shown.unsqueeze(1), False)))
    first = index_of(order_key(scores, shown).sort(-1, descending=True).values, permute.segment)
    start = torch.arange(first.shape[-2], device=k.device) * permute.segment
    return (first + start.unsqueeze(-1)).flatten(-2)[..., :keys].int()


def gathered(k: Tensor, order: Tensor) -> Tensor:
    """Keys (B, J, M, D) by an order (B, J, M), each key head a batch entry of its own: (B * J, 1, M, D)."""
    return k.gather(2, order.long().unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])).flatten(0, 1).unsqueeze(1)


def by_key_head(x: Tensor | None, batch: int, kv_heads: int) -> Tensor | None:
    """(B or 1, n) for each key head of each batch entry: (B * J, n)."""
    return None if x is None else x.expand(batch, -1).unsqueeze(1).expand(-1, kv_heads, -1).flatten(0, 1)
