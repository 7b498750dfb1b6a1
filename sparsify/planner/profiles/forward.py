"""Profiles of each head by itself, from forward passes of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sparsify.expr import Pred
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.site_call import SiteCall
from sparsify.planner.state import State
from sparsify.planner.study import studied

Keeps = dict[int, Pred]
OfSite = Callable[[SiteCall, Keeps], torch.Tensor]  # (heads of the site, candidates)
TAU = 0.6  # the share of the attention that makes a query local, where QAdA is used


def recall(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """The attention that a candidate drops: 1 - the kept share of the weights, the mean over queries (MInference)."""
    return Profile(over_samples(rig, samples, state, progress, "recall", _dropped))


def output(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """The squared error of a head's output, as a share of the output's square."""
    return Profile(over_samples(rig, samples, state, progress, "output", _error))


def local(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """The share of queries that a candidate's keys are not enough for, estimated by the second moments of the keys.

    A query is local if exp(score) over the candidate's keys comes to `TAU` of that and of what a normal distribution of
    all keys' scores gives for the rest (Unveiling Simplicities of Attention, arXiv 2502.09647).
    """
    found = over_samples(rig, samples, state, progress, "local", _not_local)
    return Profile(found, found.max(1))


def over_samples(
    rig: Rig, samples: Sequence[Sample], state: State, progress: Progress, name: str, of_site: OfSite
) -> np.ndarray:
    """(heads, candidates): the mean of what `of_site` gives, over samples; one forward pass each."""
    progress.expect([sample.length for sample in samples])
    total = np.zeros((len(rig.heads), len(rig.candidates)))
    for sample in samples:
        progress.tell(f"profiling {name} at {sample.length} tokens")
        found = state.of((name, sample.digest()), lambda sample=sample: {"losses": _one(rig, sample, of_site)})
        total += found["losses"] / len(samples)
        progress.advance()
    return total


def _one(rig: Rig, sample: Sample, of_site: OfSite) -> np.ndarray:
    found: dict[tuple[str, int], np.ndarray] = {}

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        keeps = {number: call.keep(pattern) for number, pattern in enumerate(rig.patterns)}
        found[call.key] = of_site(call, keeps).double().cpu().numpy()
        return out

    with torch.no_grad():
        rig.run(sample, {}, watch)
    return np.concatenate([found[site.key] for site in rig.heads.sites])


def _dropped(call: SiteCall, keeps: Keeps) -> torch.Tensor:
    total = torch.zeros(call.launch.q.shape[1], len(keeps), dtype=torch.float64)
    for rows in studied(call):
        for number, keep in keeps.items():
            total[:, number] += (1 - rows.under(keep)[1]).sum((0, 2)).double().cpu()
    return total / (call.at.q_len * call.launch.q.shape[0])


def _error(call: SiteCall, keeps: Keeps) -> torch.Tensor:
    heads = call.launch.q.shape[1]
    error, whole = torch.zeros(heads, len(keeps), dtype=torch.float64), torch.zeros(heads, 1, dtype=torch.float64)
    for rows in studied(call):
        dense = rows.dense()
        whole[:, 0] += dense.square().sum((0, 2, 3)).double().cpu()
        for number, keep in keeps.items():
            error[:, number] += (rows.under(keep)[0] - dense).square().sum((0, 2, 3)).double().cpu()
    return error / whole.clamp_min(1e-30)


def _not_local(call: SiteCall, keeps: Keeps) -> torch.Tensor:
    """By mean and covariance of the keys of each head, over all keys before the block of queries and in it."""
    launch, total = call.launch, torch.zeros(call.launch.q.shape[1], len(keeps), dtype=torch.float64)
    group = launch.q.shape[1] // launch.k.shape[1]
    k = launch.k.float().repeat_interleave(group, 1)
    for rows in studied(call):
        seen = k[:, :, : _horizon(call, rows.last)]
        q = launch.q[:, :, rows.first : rows.last].float() * launch.scale
        mean, spread = seen.mean(2, keepdim=True), _covariance(seen)
        expected = (q @ mean.mT).squeeze(-1) + 0.5 * ((q @ spread) * q).sum(-1)
        top = rows.top.squeeze(-1)
        for number, keep in keeps.items():
            kept = rows.under(keep)[1] * rows.total.squeeze(-1)
            left = rows.count(call.own) - rows.count(keep)
            bulk = torch.exp((expected - top + torch.log(left.clamp_min(1e-30))).clamp_max(60.0)) * (left > 0)
            total[:, number] += (kept < TAU * (kept + bulk)).sum((0, 2)).double().cpu()
    return total / (call.at.q_len * launch.q.shape[0])


def _horizon(call: SiteCall, last: int) -> int:
    """How many keys the queries before row `last` may see."""
    return min(call.at.k_len, last + call.at.offset) if call.info.causal else call.at.k_len


def _covariance(keys: torch.Tensor) -> torch.Tensor:
    """(B, H, D, D) of keys (B, H, N, D)."""
    centred = keys - keys.mean(2, keepdim=True)
    return centred.mT @ centred / max(1, keys.shape[2] - 1)
