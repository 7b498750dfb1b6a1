"""Steps 9 to 11 of selection: forced units, the budget, the list."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from sparsify.patterns.selector import Budget, Selector
from sparsify.selection.order import best_list, best_mask, index_of, listed, order_key


def kept_lists(
    selector: Selector, scores: Tensor, competes: Tensor, forced: Tensor, dense: Tensor | None, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """The list (B, L, R, C) and count (B, L, R) of the units that the budget keeps, and the forced ones.

    scores: (B, L, R, U). competes, forced, reach: (B, 1 or L, R, U), which units compete, are forced, can be seen.
    dense: (B, 1 or L, R), rows that keep all they see.
    """
    budget = selector.budget
    assert budget is not None
    competes, forced, reach = (x.expand_as(scores) for x in (competes, forced, reach))
    capacity = _capacity(selector, scores.shape[-1])
    if budget.rule == "topk" and dense is None:
        key = order_key(scores, competes, forced)
        return best_list(key, _limit(selector, budget.value, competes, forced), capacity)
    kept = chosen_units(selector, scores, competes, forced, reach) | forced
    if dense is not None:
        kept = kept | (reach & dense.unsqueeze(-1))
    return listed(kept, capacity)


def _capacity(selector: Selector, units: int) -> int:
    """How many units a list has room for."""
    budget, force = selector.budget, selector.force
    most = budget.value if budget.rule == "topk" else budget.max
    if most is None or force.last_rows or force.exempt is not None:
        return units
    counted = force.counted and budget.rule == "topk"
    return torch.sym_min(units, int(most) + (0 if counted else selector.most_forced()))


def _limit(selector: Selector, wanted: Tensor | float, competes: Tensor, forced: Tensor) -> Tensor:
    """How many units lead the order, forced ones first, when `wanted` (B, L, R) of them are to be chosen."""
    there, given = (competes | forced).sum(-1), forced.sum(-1)
    limit = torch.clamp(given, min=wanted) if selector.force.counted else given + wanted
    return torch.minimum(limit, there).long()


def chosen_units(selector: Selector, scores: Tensor, competes: Tensor, forced: Tensor, reach: Tensor) -> Tensor:
    """What the rule chooses, as a mask (B, L, R, U)."""
    budget, counted = selector.budget, selector.force.counted
    first = forced if counted or budget.rule in ("topk", "ratio") else None
    key = order_key(scores, competes, first)
    if budget.rule == "topk":
        return best_mask(key, _limit(selector, int(budget.value), competes, forced))
    if budget.rule == "ratio":
        if budget.per == "head":
            return _ratio_per_head(selector, scores, competes, forced, reach)
        wanted = _bounded(_share(reach.sum(-1), budget.value), budget)
        return best_mask(key, _limit(selector, wanted, competes, forced))
    takes_part = competes if first is None else competes | first
    chosen = _measured(budget, scores, takes_part, first, key)
    if budget.min or budget.max is not None:
        limit = torch.minimum(_bounded(chosen.sum(-1), budget), takes_part.sum(-1))
        return best_mask(key, limit)
    return chosen


def _measured(budget: Budget, scores: Tensor, takes_part: Tensor, first: Tensor | None, key: Tensor) -> Tensor:
    """topp, relmax and threshold, each row by itself or a head's rows together."""
    if budget.per == "head":
        shape = scores.shape
        scores, takes_part = scores.flatten(-2), takes_part.flatten(-2)
        first = first.flatten(-2) if first is not None else None
        return _measured(
            Budget(budget.rule, budget.value), scores, takes_part, first, order_key(scores, takes_part, first)
        ).view(shape)
    if budget.rule == "threshold":
        return takes_part & (scores >= budget.value)
    scores = torch.where(takes_part, scores, 0.0)
    if budget.rule == "relmax":
        return takes_part & (scores >= budget.value * scores.amax(-1, keepdim=True))
    mass = scores.gather(-1, index_of(key.sort(-1, descending=True).values, scores.shape[-1])).cumsum(-1)
    limit = (mass < budget.value * mass[..., -1:]).sum(-1) + 1
    return best_mask(key, torch.minimum(limit, takes_part.sum(-1)))


def _ratio_per_head(selector: Selector, scores: Tensor, competes: Tensor, forced: Tensor, reach: Tensor) -> Tensor:
    """A share of all that a head's rows see, wherever it is best."""
    flat, there, given = (x.flatten(-2) for x in (scores, competes, forced))
    wanted = _share(reach.flatten(-2).sum(-1), selector.budget.value)
    key = order_key(flat, there, given)
    chosen = best_mask(key, _limit(selector, wanted, there, given)).view_as(scores)
    if not (selector.budget.min or selector.budget.max is not None):
        return chosen
    counts = chosen if selector.force.counted else chosen & ~forced
    by_row = _bounded(counts.sum(-1), selector.budget)
    return best_mask(order_key(scores, competes, forced), _limit(selector, by_row, competes, forced))


def _share(count: Tensor, ratio: float) -> Tensor:
    """ratio * count rounded up, without the rounding of floats: a tenth of 30 is 3. Of any it is at least one."""
    part = Fraction(str(ratio)).limit_denominator(10**6)
    return torch.maximum((count * part.numerator + part.denominator - 1) // part.denominator, count.clamp(max=1))


def _bounded(wanted: Tensor, budget: Budget) -> Tensor:
    return wanted.clamp(min=budget.min, max=budget.max)
