"""DuoAttention's gates: a * all keys + (1 - a) * a window with sinks, trained for one a a KV head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsify.patterns import Pattern, sinks, window
from sparsify.planner.influence import frozen
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.profiles.scores import by_score
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.site_call import SiteCall, attend
from sparsify.planner.state import State

SINKS, RECENT = 128, 256  # of the training; a sixteenth and an eighth of shorter samples
RATE, PRICE = 0.02, 0.05  # of AdamW; of the mean gate beside the distance
STEPS = 120  # of which a fifth warms up and a fifth cools down


def gates(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """Heads by their gate. The distance is that of the final outputs, whatever the model's are."""
    return by_score(rig, trained(rig, samples, settings, state, progress), max(settings.lengths))


def trained(
    rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress, steps: int = STEPS
) -> np.ndarray:
    """(heads,) the gates from 0 to 1, those of the heads of a KV group alike.

    Samples with planted facts count alone where there are some, as passkeys do in the published training. A step is
    kept, so a killed training goes on.
    """
    units = rig.heads.groups(joined=True)
    chosen = [sample for sample in samples if sample.needles] or list(samples)
    progress.expect([chosen[step % len(chosen)].length * 4 for step in range(steps)])
    read = [sample.digest() for sample in chosen]
    at = {"gates": np.ones(int(units.max()) + 1, np.float32), "first": 0.0, "second": 0.0}
    for step in range(steps):
        progress.tell(f"training gates, step {step + 1} of {steps}")
        sample = chosen[step % len(chosen)]
        key = "gates", step, steps, read
        at = state.of(key, lambda sample=sample, at=at, step=step: _step(rig, sample, units, at, step, steps))
        progress.advance()
    return at["gates"][units].astype(np.float64)


def _step(rig: Rig, sample: Sample, units: np.ndarray, at: dict, step: int, steps: int) -> dict[str, np.ndarray]:
    """One step of AdamW (without decay), its moments kept with the gates."""
    gate = torch.from_numpy(np.asarray(at["gates"], np.float32)).requires_grad_()
    with torch.enable_grad(), frozen(rig.probe.model):
        loss = _distance(rig, sample, gate[torch.from_numpy(units)]) + PRICE * gate.abs().mean()
        (gradient,) = torch.autograd.grad(loss, [gate])
    found, fifth = gradient.numpy(), max(1, steps // 5)
    rate = RATE * min(1.0, (step + 1) / fifth, (steps - step) / fifth)
    first = 0.9 * at["first"] + 0.1 * found
    second = 0.999 * at["second"] + 0.001 * found**2
    moved = (first / (1 - 0.9 ** (step + 1))) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
    return {"gates": np.clip(at["gates"] - rate * moved, 0, 1).astype(np.float32), "first": first, "second": second}


def _distance(rig: Rig, sample: Sample, gate: torch.Tensor) -> torch.Tensor:
    place = {site.key: rig.heads.site == number for number, site in enumerate(rig.heads.sites)}
    near = streaming(sample.length, all(site.info.causal for site in rig.heads.sites))
    reference = rig.reference(sample)

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        mine = gate[torch.from_numpy(place[call.key])].to(out).view(1, -1, 1, 1)
        local = attend(call, [call.keep(near)] * out.shape[1])
        return mine * out + (1 - mine) * local

    return rig.objective.distance(rig.run(sample, {}, watch), reference, sample).mean().cpu()


def streaming(length: int, causal: bool) -> Pattern:
    """The window with sinks of the training."""
    first, recent = min(SINKS, max(1, length // 16)), min(RECENT, max(1, length // 8))
    return sinks(first) | (window(recent) if causal else window(recent // 2 + 1, recent // 2))
