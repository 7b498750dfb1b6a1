"""From what was found to the values of a `Plan`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsify.planner.heads import Costs, Heads
from sparsify.planner.plan import HeadPlan, SitePlan
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.rig import Rig


def head_plans(
    choices: Sequence[Sequence[int]], shares: np.ndarray, profile: Profile, heads: Heads
) -> list[tuple[HeadPlan, ...]]:
    """The `HeadPlan` of every head, site by site. choices: of a point; shares: (heads, candidates)."""
    chosen = [int(one) for of in choices for one in of]
    plans = []
    for head, candidate in enumerate(chosen):
        allowed = np.isfinite(profile.losses[head])
        costs = tuple(float(one) if good else None for one, good in zip(shares[head], allowed, strict=True))
        losses = tuple(float(one) if good else None for one, good in zip(profile.losses[head], allowed, strict=True))
        score = None if profile.scores is None else float(profile.scores[head])
        plans.append(HeadPlan(candidate, costs, losses, score))
    return heads.by_site(plans)


def site_plans(rig: Rig, costs: Costs, heads: Sequence[tuple[HeadPlan, ...]]) -> tuple[SitePlan, ...]:
    """The `SitePlan` of every site, with its predicted times."""
    found = []
    for site, of in zip(rig.heads.sites, heads, strict=True):
        patterns = tuple(rig.patterns[head.candidate] for head in of)
        info, dense = site.info, (None,) * len(of)
        found.append(
            SitePlan(
                address=info.address,
                layer=info.layer,
                use=info.use,
                kind=info.kind,
                causal=info.causal,
                kv_heads=info.kv_heads,
                head_dim=site.head_dim,
                heads=of,
                seconds=tuple(costs.seconds(site, patterns, length) for length in costs.lengths),
                dense_seconds=tuple(costs.seconds(site, dense, length) for length in costs.lengths),
            )
        )
    return tuple(found)
