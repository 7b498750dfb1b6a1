"""Influence: what each candidate in the place of what a head has now does to the model's final output.

At an assignment of patterns, the model runs once with gradients. `probes` of the output (see `objective`) are followed
back to the outputs of all heads; what a candidate would change of a head's output, times these, is its effect on each
probe. Effects add up to first order, so the distance of any other assignment from the dense model is half the mean of
the squares of

    residual + sum over heads of effect[head, its candidate]

which knows that heads cancel or amplify each other. Nothing is assumed of the model but that it was caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsify.planner.probe import Key
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.site_call import SiteCall
from sparsify.planner.state import Arrays, State, digest
from sparsify.planner.study import projections


@dataclass(frozen=True)
class Sketch:
    """residual: (rows,) where the output is now, seen by each probe of each sample, from the dense one. effects: (rows,
    heads, candidates) what a candidate in the place of what a head has now adds to it. dense: the dense candidate."""

    residual: np.ndarray
    effects: np.ndarray
    dense: int

    @classmethod
    def joined(cls, sketches: Sequence[Sketch]) -> Sketch:
        return cls(
            np.concatenate([one.residual for one in sketches]),
            np.concatenate([one.effects for one in sketches]),
            sketches[0].dense,
        )

    def errors(self) -> np.ndarray:
        """(rows, heads, candidates) what a candidate adds to the output over the dense one in its head."""
        return self.effects - self.effects[:, :, self.dense, None]

    def alone(self) -> np.ndarray:
        """(heads, candidates) the distance from the dense output that a head's candidate makes by itself."""
        return 0.5 * np.square(self.errors()).mean(0)

    def together(self, chosen: np.ndarray) -> float:
        """The distance of an assignment."""
        added = self.effects[:, np.arange(self.effects.shape[1]), chosen].sum(1)
        return float(0.5 * np.square(self.residual + added).mean())


def sketch(rig: Rig, sample: Sample, chosen: np.ndarray, probes: int, seed: int) -> Arrays:
    """The sketch of one sample at an assignment (heads,), as arrays `residual` and `effects`."""
    calls: dict[Key, tuple[SiteCall, torch.Tensor, torch.Tensor]] = {}

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        added = torch.zeros_like(out, requires_grad=True)
        calls[call.key] = call, out.detach(), added
        return out + added

    reference, generator = rig.reference(sample), torch.Generator().manual_seed(seed)
    with torch.enable_grad(), frozen(rig.probe.model):
        result = rig.run(sample, rig.assignment(chosen), watch)
        leaves = [added for _, _, added in calls.values()]
        residual, found = [], []
        for value, now in rig.objective.probes(result, reference, sample, probes, generator):
            found.append(torch.autograd.grad(value.sum(), leaves, retain_graph=len(found) < probes - 1))
            residual.append(now)
    del result
    gradients = [torch.stack(of_site).float() for of_site in zip(*found, strict=True)]
    effects = [_effects(rig, *one[:2], of) for one, of in zip(calls.values(), gradients, strict=True)]
    return {"residual": torch.stack(residual).flatten().cpu().numpy(), "effects": np.concatenate(effects, 1)}


def _effects(rig: Rig, call: SiteCall, now: torch.Tensor, gradients: torch.Tensor) -> np.ndarray:
    """(probes * B, heads of the site, candidates)."""
    with torch.no_grad():
        keeps = {number: call.keep(pattern) for number, pattern in enumerate(rig.patterns)}
        found = projections(call, now, gradients, keeps)
    return torch.stack([found[number] for number in keeps], -1).flatten(0, 1).cpu().numpy()


class frozen:
    """No parameter of a model is asked for its gradient inside."""

    def __init__(self, model: object) -> None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
        self.parameters = [one for one in parameters if one.requires_grad]

    def __enter__(self) -> None:
        for one in self.parameters:
            one.requires_grad_(False)

    def __exit__(self, *failure: object) -> None:
        for one in self.parameters:
            one.requires_grad_(True)


def sketched(
    rig: Rig, samples: Sequence[Sample], chosen: np.ndarray, probes: int, state: State, progress: Progress
) -> Sketch:
    """The sketch of some samples at an assignment (heads,)."""
    progress.expect([sample.length for sample in samples])
    found = []
    for number, sample in enumerate(samples):
        progress.tell(f"influence of {len(rig.candidates)} candidates on {sample.length} tokens of {sample.kind}")
        key = "sketch", chosen.tolist(), sample.digest(), probes, number
        seed = int(digest(key)[:8], 16)
        arrays = state.of(key, lambda sample=sample, seed=seed: sketch(rig, sample, chosen, probes, seed))
        found.append(Sketch(arrays["residual"], arrays["effects"], rig.dense))
        progress.advance()
    return Sketch.joined(found)
