"""Columns and diagonals of whole units, as many as hold a share of the attention (FlexPrefill)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.patterns.selector import Force, Heads, Lines, Score, Selector
from sparsify.selection.budget import chosen_units
from sparsify.selection.geometry import Places, split
from sparsify.selection.lines import diagonals_of
from sparsify.selection.order import best_mask, listed, order_key
from sparsify.selection.score import normed_scores, unit_scores
from sparsify.selection.views import QueryView, means

BY_MEANS = Score("mean", "mean", norm="softmax")


def cover_list(selector: Selector, q: Tensor, k: Tensor, scale: float, at: Places) -> tuple[Tensor, Tensor]:
    """The list of each row's units: the chosen columns and diagonals, or what the budget chooses by means."""
    lines, size = selector.lines, selector.unit.k
    (view, _), weights, visible = normed_scores(selector, q, k, scale, at, at.reach.unsqueeze(1))
    queries = (view.horizon >= 0).sum(-1).clamp(min=1)[:, None, None]
    columns, diagonals = weights.sum(-2) / queries, diagonals_of(weights, visible, view)[0].squeeze(-2) / queries
    on_units = split(columns, size, 0.0).sum(-1)
    by_means = None
    if lines.switch is not None:
        by_means = _divergence(on_units, _predicted(view, k, scale, at)) < lines.switch
    unit = torch.arange(on_units.shape[-1], device=q.device)
    first = (unit >= at.start // size) & (unit < at.start // size + lines.first)
    diagonal = split(diagonals, size, 0.0).sum(-1)
    verticals = _best(on_units, _number(columns, size, lines, by_means), first.unsqueeze(1))
    slashes = _best(diagonal, _number(diagonals, size, lines, by_means), (unit < lines.last)[None, None])
    kept = verticals.unsqueeze(-2)
    for end in (at.rows.first, at.rows.last):  # in two units, where a row's queries don't begin with a unit
        kept = kept | _along(slashes, end.unsqueeze(-1) // size - unit)
    if by_means is not None:
        kept = kept | (by_means[..., None, None] & _by_means(selector, q, k, scale, at))
    return listed(kept & at.reach.unsqueeze(1), kept.shape[-1])


def _number(mass: Tensor, size: int, lines: Lines, by_means: Tensor | None) -> Tensor:
    """How many units of lines (B, H): the single ones that hold the share `cover` of mass (B, H, M), in units."""
    held = mass.sort(-1, descending=True).values.cumsum(-1)
    number = (((held <= lines.cover).sum(-1) + 1) // size + 1).clamp(min=lines.least)
    return number if by_means is None else torch.where(by_means, lines.least, number)


def _best(mass: Tensor, number: Tensor, first: Tensor) -> Tensor:
    """The best units (B, H, U) of lines, those that come first leading."""
    every = torch.ones_like(mass, dtype=torch.bool)
    return best_mask(order_key(mass, every, first.expand_as(mass)), number.clamp(max=mass.shape[-1]))


def _along(slashes: Tensor, offset: Tensor) -> Tensor:
    """(B, H, R, U): whether the diagonal at an offset (B, R, U), in units, is among the chosen (B, H, U)."""
    rows, units = offset.shape[-2:]
    place = offset.clamp(0, units - 1).flatten(1).unsqueeze(1).expand(*slashes.shape[:2], -1)
    return slashes.gather(-1, place).unflatten(-1, (rows, units)) & (offset >= 0).unsqueeze(1)


def _predicted(view: QueryView, k: Tensor, scale: float, at: Places) -> Tensor:
    """(B, H, U): the attention that the mean of the view's queries pays to the means of units."""
    there = (view.horizon >= 0)[:, None, :, None]
    mean = torch.where(there, view.vectors, 0.0).sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp(min=1)
    keys = means(k, at.inside).repeat_interleave(mean.shape[1] // k.shape[1], 1)
    scores = (mean @ keys.mT).squeeze(-2) * scale
    seen = at.reach.any(-2).unsqueeze(1)
    return torch.where(seen, torch.softmax(torch.where(seen, scores, -torch.inf), -1), 0.0)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """The root of the Jensen-Shannon divergence of distributions (..., U), with natural logarithms."""
    middle = (p + q) / 2

    def half(x: Tensor) -> Tensor:
        return torch.xlogy(x, torch.where(x > 0, x / middle, 1.0)).sum(-1) / 2

    return (half(p) + half(q)).clamp(min=0).sqrt()


def _by_means(selector: Selector, q: Tensor, k: Tensor, scale: float, at: Places) -> Tensor:
    """What the budget chooses by the means of blocks, as a mask (B, H, R, U)."""
    plain = Selector(selector.budget, selector.unit, BY_MEANS, Heads("head"), Force())
    nothing = torch.zeros_like(at.reach).unsqueeze(1)
    scores, competes = unit_scores(plain, q, k, scale, at, nothing)
    competes, nothing, reach = (x.expand_as(scores) for x in (competes, nothing, at.reach.unsqueeze(1)))
    return chosen_units(plain, scores, competes, nothing, reach)
