"""Step 1 of selection: what is looked at in place of the queries and keys themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from sparsify.patterns.selector import Selector
from sparsify.selection.geometry import Places, blocks_in, inside_of, split


class QueryView(NamedTuple):
    """vectors (B, H, A, D); horizon (B, A), the last key position that each sees; per_row, how many a row has (0: all
    of them are every row's), the last row fewer."""

    vectors: Tensor
    horizon: Tensor
    per_row: int


class KeyView(NamedTuple):
    """vectors (B, J, C, D), the greatest values for minmax, the keys themselves for rep_search, and low, the least
    values (None else); inside (B, C, tokens); per_unit, how many a unit has, the last unit fewer."""

    vectors: Tensor
    low: Tensor | None
    inside: Tensor
    per_unit: int


def query_view(selector: Selector, q: Tensor, at: Places) -> QueryView:
    """The view of queries q (B, H, N, D) float32."""
    score, size = selector.score, selector.unit.q
    if score.last:
        return last_queries(q, at.seat, at.horizon, score.last)
    if score.stride:
        stride = score.stride
        groups = blocks_of(q, split(at.seat, stride, -1) >= 0).flip(-2).flatten(-2) / stride
        return QueryView(groups, split(at.horizon, stride, -1).amax(-1), size // stride)
    if score.qview == "mean" and size > 1:
        return QueryView(means(q, split(at.seat, size, -1) >= 0), at.rows.horizon, 1)
    return QueryView(q, at.horizon, size)


def last_queries(q: Tensor, seat: Tensor, horizon: Tensor, n: int) -> QueryView:
    """The last n valid queries of q (B, H, N, D), in order; seat and horizon (B or 1, N) as those of `Places`."""
    step = torch.arange(seat.shape[-1], device=q.device)
    order = torch.where(seat >= 0, step, step - seat.shape[-1])  # padding stands before all others
    best = order.topk(torch.sym_min(n, seat.shape[-1])).values.flip(-1)
    rank = torch.where(best >= 0, best, best + seat.shape[-1])
    horizon = horizon.gather(-1, rank)
    rows = rank[:, None, :, None].expand(q.shape[0], q.shape[1], -1, q.shape[3])
    return QueryView(q.gather(2, rows), horizon, 0)


def key_view(selector: Selector, k: Tensor, scale: float, at: Places) -> KeyView:
    """The view of keys k (B, J, M, D) float32. It depends on no query, so whoever holds a cache can keep it."""
    kview, size = selector.score.kview, selector.unit.k
    if selector.score.stride:
        stride = selector.score.stride
        inside = inside_of(at.valid, k.shape[2], stride, k.device)
        return KeyView(blocks_of(k, inside).flatten(-2), None, inside, size // stride)
    if kview == "mean" and size > 1:
        return KeyView(means(k, at.inside), None, at.inside, 1)
    if kview == "rep_search":  # which key stands for a unit depends on the queries
        return KeyView(k, None, at.inside, 1)
    if kview == "attn_pool":
        return KeyView(_attention_pool(k, scale, at.inside), None, at.inside, 1)
    if kview == "minmax":
        blocks, inside = _blocks(k, at.inside.shape[-1]), at.inside[:, None, :, :, None]
        low = torch.where(inside, blocks, torch.inf).amin(-2)
        return KeyView(torch.where(inside, blocks, -torch.inf).amax(-2), low, at.inside, 1)
    return KeyView(k, None, inside_of(at.valid, k.shape[2], 1, k.device), size)


def means(x: Tensor, inside: Tensor) -> Tensor:
    """(B, H, n, D) to (B, H, blocks, D): the mean over the tokens `inside` (B, blocks, size); 0 of none."""
    return blocks_of(x, inside).sum(-2) / inside.sum(-1).clamp(min=1)[:, None, :, None]


def _attention_pool(k: Tensor, scale: float, inside: Tensor) -> Tensor:
    """(B, J, M, D) to (B, J, U, D): the keys of a unit, weighted by the attention that their mean pays them."""
    blocks, shown = blocks_of(k, inside), inside.unsqueeze(1)
    scores = (blocks @ means(k, inside).unsqueeze(-1)).squeeze(-1) * scale
    weights = torch.where(shown, torch.softmax(torch.where(shown, scores, -torch.inf), -1), 0.0)
    return (weights.unsqueeze(-1) * blocks).sum(-2)


def blocks_of(x: Tensor, inside: Tensor) -> Tensor:
    """(B, H, n, D) to (B, H, blocks, size, D), 0 where a token is not `inside`."""
    return torch.where(inside[:, None, :, :, None], _blocks(x, inside.shape[-1]), 0.0)


def _blocks(x: Tensor, size: int) -> Tensor:
    if size == 1:
        return x.unsqueeze(-2)
    blocks = blocks_in(x.shape[2], size)
    return pad(x, (0, 0, 0, blocks * size - x.shape[2])).unflatten(2, (blocks, size))


def self_similarity(x: Tensor, inside: Tensor) -> Tensor:
    """(B, H, blocks): the mean cosine of all pairs of tokens in a block, each with itself included."""
    return means(normalize(x, dim=-1), inside).square().sum(-1)
