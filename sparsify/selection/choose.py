"""choose: a selector's lists for given queries and keys."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.patterns.selector import Selector, Unit
from sparsify.selection.budget import kept_lists
from sparsify.selection.cover import cover_list
from sparsify.selection.geometry import Places, dense_rows, edges, forced_units, places, seen, split
from sparsify.selection.lines import line_lists
from sparsify.selection.permute import by_key_head, gathered
from sparsify.selection.score import join_units, unit_scores
from sparsify.selection.views import self_similarity


def choose(
    selector: Selector,
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    position: Tensor,
    valid: Tensor | None = None,
    causal: bool = True,
    scores: Tensor | None = None,
    order: Tensor | None = None,
    sums: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """One (index, count) for each of `selector.units()`.

    index: (B, L, R, C) int32, the chosen units in ascending order, unused entries equal to the number of units.
    count: (B, L, R) int32. L = selector.lists(H, J), R = ceil(N / selector.unit.q), rows counted from the first query.

    q: (B, H, N, D), k: (B, J, M, D), any float dtype; scores are float32. scale: of the dot products.
    position: (B or 1, N) int64, each query's position among the keys; rises by at most 1 from query to query. A
        negative one takes the query out.
    valid: (B or 1, M) bool, keys that may be used; with `causal` a query on a key that may not be used is out, too. A
        row without queries keeps nothing.
    causal: a query sees the keys up to its own position only.
    scores: (B, H or J or 1, R, U), a learned hook's unit scores.
    order: (B, J, M), what `key_order` gives, where the selector has a `permute`; units are then of its slots.
    sums: (B, heads, views of keys or more) float32, what the norm `accumulated` has summed before this call; this
        call's queries are added in place.
    Raises InputError for tensors that do not fit.
    """
    _check(selector, q, k, position, valid, causal, scores)
    _check_order(selector, k, causal, order)
    if q.shape[2] == 1 and not selector.score.stride and not selector.lines:
        selector = replace(selector, unit=Unit(1, selector.unit.k))  # a row of one query needs no filling up
    q, k = q.detach().float(), k.detach().float()
    if order is None:
        return _lists(selector, q, k, scale, places(selector, position, valid, k.shape[2], causal), scores, sums)
    batch, kv_heads = k.shape[:2]
    q, k, order = q.unflatten(1, (kv_heads, -1)).flatten(0, 1), gathered(k, order), order.flatten(0, 1).long()
    position, valid = by_key_head(position, batch, kv_heads), by_key_head(valid, batch, kv_heads)
    at = places(selector, position, valid, k.shape[2], causal, order)
    lists = _lists(selector, q, k, scale, at, None)
    return [tuple(x.unflatten(0, (batch, kv_heads)).flatten(1, 2) for x in pair) for pair in lists]  # type: ignore[misc]


def _lists(
    selector: Selector,
    q: Tensor,
    k: Tensor,
    scale: float,
    at: Places,
    scores: Tensor | None,
    sums: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The lists over the slots of keys that `at` speaks of."""
    if selector.lines:
        by_number = selector.lines.cover is None
        return line_lists(selector, q, k, scale, at) if by_number else [cover_list(selector, q, k, scale, at)]
    forced, dense = _forced(selector, q, k, at)
    if scores is None:
        unit_score, competes = unit_scores(selector, q, k, scale, at, forced, sums)
    else:
        unit_score, competes = _learned(selector, scores, q.shape[1], k.shape[1], at, forced)
    return [kept_lists(selector, unit_score, competes, forced, dense, at.reach.unsqueeze(1))]


def _forced(selector: Selector, q: Tensor, k: Tensor, at: Places) -> tuple[Tensor, Tensor | None]:
    """Forced units (B, 1 or H, R, U), and rows that keep all they see (B, 1 or H, R)."""
    forced = forced_units(selector, at).unsqueeze(1)
    dense = dense_rows(selector, at).unsqueeze(1) if selector.force.last_rows else None
    bar = selector.force.exempt
    if bar is None:
        return forced, dense
    columns = (self_similarity(k, at.inside) < bar).repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows = self_similarity(q, split(at.seat, selector.unit.q, -1) >= 0) < bar
    forced = forced | (columns.unsqueeze(2) & at.reach.unsqueeze(1))
    return forced, rows if dense is None else rows | dense


def _learned(
    selector: Selector, scores: Tensor, heads: int, kv_heads: int, at: Places, forced: Tensor
) -> tuple[Tensor, Tensor]:
    competes = seen(at.rows.horizon, edges(at.inside, selector.score.causal)).unsqueeze(1)
    if selector.score.domain == "middle":
        competes = competes & ~forced
    scores, lists = scores.detach().float(), selector.lists(heads, kv_heads)
    if scores.shape[1] > lists:
        scores = join_units(selector, scores, competes, kv_heads)
    elif scores.shape[1] < lists:
        scores = scores.repeat_interleave(lists // scores.shape[1], 1)
    return scores, competes


def _check(
    selector: Selector,
    q: Tensor,
    k: Tensor,
    position: Tensor,
    valid: Tensor | None,
    causal: bool,
    scores: Tensor | None,
) -> None:
    heads, queries = q.shape[1:3]
    kv_heads, keys = k.shape[1:3]
    if heads % kv_heads:
        raise InputError(f"q: {heads} query heads are no multiple of the {kv_heads} key heads")
    if position.dim() != 2 or position.shape[1] != queries:
        raise InputError(f"position: expected (batch or 1, {queries}), found {tuple(position.shape)}")
    if valid is not None and (valid.dim() != 2 or valid.shape[1] != keys or valid.dtype != torch.bool):
        raise InputError(f"valid: expected bool of (batch or 1, {keys}), found {valid.dtype} of {tuple(valid.shape)}")
    if (scores is None) != (selector.learned is None):
        raise InputError(f"scores: the selector's hook is {selector.learned!r}, found {type(scores).__name__}")
    if scores is not None and (scores.dim() != 4 or scores.shape[1] not in (1, kv_heads, heads)):
        raise InputError(
            f"scores: expected (batch, 1, {kv_heads} or {heads}, rows, units), found {tuple(scores.shape)}"
        )
    if selector.lines and not causal:
        raise InputError("causal: lines are diagonals behind the query, so the attention must be causal")


def _check_order(selector: Selector, k: Tensor, causal: bool, order: Tensor | None) -> None:
    if (order is None) != (selector.permute is None):
        wanted = "none" if selector.permute is None else "the keys' order"
        raise InputError(f"order: expected {wanted} for this selector, found {type(order).__name__}")
    if order is None:
        return
    if tuple(order.shape) != tuple(k.shape[:3]):
        raise InputError(f"order: expected (batch, key heads, keys) = {tuple(k.shape[:3])}, found {tuple(order.shape)}")
    if not causal:
        raise InputError(
            "causal: with permute a query sees earlier segments and its own, so the attention must be causal"
        )
