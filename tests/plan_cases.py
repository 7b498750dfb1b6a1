"""A made-up plan with pictures, as a planner would leave one: for what draws, prints and stores plans."""

from __future__ import annotations

import numpy as np

from sparsify.planner.pictures import GAMMA, Pictures, SitePicture
from sparsify.planner.plan import Candidate, HeadPlan, Model, Plan, Point, SitePlan, Validation

LENGTHS = (1024, 2048)
CANDIDATES = (
    Candidate("dense", "dense"),
    *(Candidate(f"window{n}", {"sinks": 4, "window": n}) for n in (16, 32, 64, 128, 256, 512)),
    *(Candidate(f"span{b}", {"moa_head": {"beta": b, "max_new": 0}}) for b in (0.125, 0.25, 0.5)),
    Candidate("stride8", {"window": 64, "column_stride": {"every": 8, "block": 16}}),
    Candidate("top16", {"topk": {"unit": 16, "keep": 16}}),
)
SHARES = (1.0, 0.03, 0.04, 0.07, 0.13, 0.26, 0.5, 0.16, 0.28, 0.55, 0.2, 0.3)


def made_up_plan(layers: int = 4, heads: int = 8, kv_heads: int = 4, seed: int = 0) -> Plan:
    """Heads of early layers are local, some later ones look far."""
    draw = np.random.default_rng(seed)
    sites, retrieval, total = [], [], layers * heads
    for layer in range(layers):
        made = []
        for head in range(heads):
            far = draw.random() ** 2 * (0.2 + layer / layers)
            losses = [0.0] + [round(float(far * (1 - s) ** 2 * draw.uniform(0.5, 1.5) * 0.05), 6) for s in SHARES[1:]]
            choice = int(np.argmin([loss + 0.012 * share for loss, share in zip(losses, SHARES, strict=True)]))
            if far > 0.5:
                retrieval.append((far, layer, head))
            costs = tuple(round(share / total, 6) for share in SHARES)
            made.append(HeadPlan(choice, costs, tuple(losses), round(float(far), 3)))
        dense = (0.004 * (1 + layer % 2), 0.015 * (1 + layer % 2))
        share = sum(SHARES[head.candidate] for head in made) / heads
        ours = tuple(t * (share + 0.05) for t in dense)
        sites.append(
            SitePlan(f"model.layers.{layer}.self_attn", layer, 0, "self", True, kv_heads, 64, tuple(made), ours, dense)
        )
    front = [
        Point(f"budget {c:g}", c, False, p, m, v)
        for c, p, m, v in ((0.12, 0.06, 0.07, 0.081), (0.25, 0.011, 0.014, 0.017), (0.5, 0.001, 0.0018, -0.0004))
    ]
    front += [
        Point(f"sinks 4, window {n}", c, True, None, m, m * 1.1, (), {"sinks": 4, "window": n})
        for n, c, m in ((128, 0.13, 0.31), (256, 0.24, 0.12), (400, 0.36, 0.13), (512, 0.5, 0.03))
    ]
    rows = [
        Validation(one.name, data, 4096, one.cost, 1.2 + one.validated * times, one.validated * times)
        for one in front
        for data, times in (("text", 1), ("recall", 2))
    ]
    ranked = tuple((layer, head) for _, layer, head in sorted(retrieval, reverse=True))
    return Plan(
        Model("made/up-model <8B>", "0123456789abcdef"), "a machine, 2 threads", LENGTHS, "time", "25 %",
        "second moment", "bits per byte", CANDIDATES, tuple(sites), tuple(front), 1, tuple(rows), 0.01, 0.004,
        ranked, 123,
    )  # fmt: skip


def made_up_pictures(plan: Plan, cells: int = 64, tokens: int = 2048, seed: int = 1) -> Pictures:
    """Attention with a sink, a band and, where a head scores high, some far columns; bands as masks."""
    draw, size = np.random.default_rng(seed), tokens // cells
    q, k = np.mgrid[:cells, :cells]
    sites = []
    for site in plan.sites:
        attention, kept, dropped, recall = [], [], [], []
        for head in site.heads:
            scores = -((q - k) / (1 + 12 * (head.score or 0))) * 1.0 + 4 * (k == 0)
            scores = scores + 3 * (head.score or 0) * (draw.random(cells) > 0.85) + draw.normal(0, 0.4, (cells, cells))
            weights = np.where(k <= q, np.exp(scores), 0)
            weights /= weights.sum(-1, keepdims=True)
            share = SHARES[head.candidate]
            mask = (k <= q) & ((q - k <= share * cells * 0.6) | (k == 0))
            attention.append(np.rint(255 * weights**GAMMA))
            kept.append(255 * mask)
            dropped.append(255 * ((weights > 0) & ~mask))
            recall.append(float((weights * mask).sum() / cells))
        grids = [np.array(grid, np.uint8) for grid in (attention, kept, dropped)]
        sites.append(SitePicture(tokens, tokens, size, *grids, np.array(recall)))
    return Pictures(tuple(sites))
