"""global_tokens: positions that see everything and that everything sees (Longformer, BigBird)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.expr import Expr, Pred, disjunction
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.ranges import of_numbers

MAX_RUNS = 64  # each run of neighbouring positions costs every kernel a comparison or two per tile


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """q in positions or k in positions; the positions are sorted, distinct, non-negative integers."""

    positions: tuple[int, ...]

    def keep(self) -> Pred:
        return disjunction(_inside(axis, run) for axis in (Q, K) for run in of_numbers(self.positions))

    def __str__(self) -> str:
        return f"global_tokens({list(self.positions)})"


def _inside(axis: Expr, run: tuple[int, int]) -> Pred:
    return (axis >= run[0]) & (axis <= run[1])


def global_tokens(positions: Iterable[int]) -> Pattern:
    """The given absolute positions attend to every key and are attended to by every query."""
    found = list(positions) if isinstance(positions, Iterable) and not isinstance(positions, str) else positions
    if not isinstance(found, list) or not all(isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in found):
        raise PatternError(f"global_tokens.positions: expected non-negative integers, found {positions!r}")
    pattern = GlobalTokens(tuple(sorted(set(found))))
    runs = len(of_numbers(pattern.positions))
    if runs > MAX_RUNS:
        raise PatternError(f"global_tokens.positions: expected at most {MAX_RUNS} runs of neighbours, found {runs}")
    return pattern
