"""A bound on the loss that no share of the front keeps: dense attention does, and is searched back from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsify.planner.plan import DENSE, Point
from sparsify.planner.rig import Rig


def keeps(front: Sequence[Point], limit: float) -> bool:
    """Whether a plan of the front loses at most `limit` above dense attention, as validated."""
    return any(not point.uniform and point.validated <= limit for point in front)


def with_dense(front: Sequence[Point], rig: Rig) -> list[Point]:
    """The front with dense attention as the dearest plan, before the uniform points; it loses nothing."""
    choices = tuple(tuple(map(int, of)) for of in rig.heads.by_site(np.full(len(rig.heads), rig.dense)))
    own, others = ([point for point in front if point.uniform is uniform] for uniform in (False, True))
    return [*own, Point(DENSE, 1.0, False, 0.0, 0.0, 0.0, choices), *others]


def missed(front: Sequence[Point], limit: float, unit: str, chosen: Point) -> str:
    """What to know and to do where no plan of this front keeps the bound, and another one was taken."""
    nearest = min((point for point in front if not point.uniform), key=lambda point: point.validated)
    taken = (
        "every head keeps everything" if chosen.name == DENSE else f"one at {chosen.cost:.1%} of the cost was searched"
    )
    return (
        f"no share of the front loses at most +{limit:.4g} {unit}; the nearest is +{nearest.validated:.4g} at "
        f"{nearest.cost:.1%} of the cost, so {taken}; try larger shares in --front"
    )
