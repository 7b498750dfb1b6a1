"""Uniform baselines: one window with sinks for all heads, the largest within a cost; the best of a few kinds counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sparsify.planner.heads import Costs
from sparsify.planner.plan import Candidate, Point
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig

SINKS = {True: (0, 4), False: (0, 1)}  # of windows for causal attention, and for attention to both sides
Measured = Callable[[Any], float]


def uniforms(
    rig: Rig, costs: Costs, measure: Callable[[Candidate], float], budgets: Sequence[float], progress: Progress
) -> list[Point]:
    """The best uniform window at each of some costs, as points; none where no window is so cheap.

    measure: the distance of a candidate given to all heads.
    """
    causal = all(site.info.causal for site in rig.heads.sites)
    found = []
    for budget in budgets:
        progress.tell(f"one window for all heads at {budget:.3g} of the cost")
        options = [(measure(one), one) for one in _largest(costs, causal, budget)]
        if options:
            distance, best = min(options, key=lambda option: option[0])
            cost = max(costs.share([best.pattern()] * len(rig.heads), length) for length in costs.lengths)
            found.append(Point(best.name, cost, True, None, distance, None, (), best.form))
    return found


def _largest(costs: Costs, causal: bool, budget: float) -> Iterator[Candidate]:
    """For each number of sinks the largest window within a budget, if there is one."""
    for sinks in SINKS[causal]:
        low, high = 0, max(costs.lengths)
        while low < high:
            middle = (low + high + 1) // 2
            fits = _cost(costs, window(causal, sinks, middle)) <= budget * (1 + 1e-9)
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            yield window(causal, sinks, low)


def _cost(costs: Costs, one: Candidate) -> float:
    return float(costs.shares([one.pattern()]).sum(1).max())


def window(causal: bool, sinks: int, size: int) -> Candidate:
    """The last `size` keys, or so many to both sides, and some sinks."""
    span: Any = size if causal else {"size": size // 2 + 1, "ahead": (size - 1) // 2}
    form = {"window": span} | ({"sinks": sinks} if sinks else {})
    return Candidate(f"window {size}" + (f" + {sinks} sink{'s'[: sinks > 1]}" if sinks else ""), form)
