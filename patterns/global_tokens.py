"""global_tokens: positions that see everything and that everything sees (Longformer, BigBird, registers, text)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.expr import Expr, Pred, disjunction
from sparsify.foldable import foldable
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.ranges import joined, read_pairs

MAX_RUNS = 64  # each run of neighbouring positions costs every kernel a comparison or two per tile
FAR = 2**30  # positions are written with at most nine digits


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """q in positions or k in positions; the positions are sorted and disjoint: 7 or, for a run of them, "0-3"."""

    positions: tuple[int | str, ...]

    def keep(self) -> Pred:
        runs = [pair for part in self.positions for pair in read_pairs(part, limit=FAR)]
        return disjunction(_inside(axis, run) for axis in (Q, K) for run in runs)

    def __str__(self) -> str:
        return f"global_tokens({list(self.positions)})"


def _inside(axis: Expr, run: tuple[int, int]) -> Pred:
    return (axis >= run[0]) & (axis <= run[1])


def global_tokens(positions: int | str | Sequence[int | str]) -> Pattern:
    """The given absolute positions attend to every key and are attended to by every query.

    Positions are non-negative integers, ranges such as "0-76" (both ends included) or "0-3,7", or a list of those.
    """
    try:
        found = _positions((positions,) if isinstance(positions, int | str) else tuple(positions))
    except (TypeError, ValueError):
        expected = "expected non-negative integers, or ranges such as '0-76'"
        raise PatternError(f"global_tokens.positions: {expected}, found {positions!r}") from None
    if len(found) > MAX_RUNS:
        raise PatternError(
            f"global_tokens.positions: expected at most {MAX_RUNS} runs of neighbours, found {len(found)}"
        )
    return GlobalTokens(found)


@foldable
def _positions(parts: tuple[int | str, ...]) -> tuple[int | str, ...]:
    runs = joined(sorted(pair for part in parts for pair in read_pairs(part, limit=FAR)))
    return tuple(first if first == last else f"{first}-{last}" for first, last in runs)
