"""The rig: a model under the probe, with what heads may get and how results are measured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparsify.codegen.target import dtype_name
from sparsify.patterns import Pattern
from sparsify.planner.heads import Found, Heads
from sparsify.planner.objective import Objective, instead_of_logits, objective_for
from sparsify.planner.plan import DENSE, Candidate
from sparsify.planner.probe import Assignment, Key, Probe
from sparsify.planner.samples import Sample
from sparsify.planner.site_call import SiteCall

REFERENCES = 1 << 29  # bytes of dense results that are kept


@dataclass
class Rig:
    """patterns: of the candidates, None for the dense one; dense: its index. instead: what the model gives where that
    are no logits, in words; else nothing."""

    probe: Probe
    heads: Heads
    objective: Objective
    candidates: tuple[Candidate, ...]
    patterns: tuple[Pattern | None, ...]
    device: torch.device
    instead: str = ""
    _kept: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict)

    @property
    def dense(self) -> int:
        return next(number for number, one in enumerate(self.candidates) if one.name == DENSE)

    def run(self, sample: Sample, assigned: Assignment | None = None, watch: Any = None) -> Any:
        """The model's result on a sample."""
        given = {name: _moved(value, self.device) for name, value in sample.inputs.items()}
        with self.probe.under(assigned or {}, watch):
            return self.probe(**given, **sample.extra)

    def assignment(self, chosen: Sequence[int] | np.ndarray) -> Assignment:
        """The candidate of each head, as the probe takes it."""
        return self.heads.assignment([self.patterns[one] for one in chosen])

    def reference(self, sample: Sample) -> torch.Tensor:
        """The dense result of a sample."""
        key = sample.digest()
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = self.objective.reference(self.run(sample), sample)
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > REFERENCES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def distance(self, sample: Sample, assigned: Assignment) -> float:
        """How far from the dense result a sample's is, the mean over its rows."""
        reference = self.reference(sample)
        with torch.no_grad():
            return float(self.objective.distance(self.run(sample, assigned), reference, sample).mean())

    def losses(self, sample: Sample, assigned: Assignment) -> np.ndarray:
        """(B,) what a sample's rows lose."""
        reference = self.reference(sample)
        with torch.no_grad():
            return self.objective.loss(self.run(sample, assigned), reference, sample).cpu().numpy()


def set_up(
    model: Any, sample: Sample, candidates: tuple[Candidate, ...] | Callable[[bool], tuple[Candidate, ...]],
    objective: Objective | None, name: str,
) -> Rig:  # fmt: skip
    """Catches the attentions of a model by one run. candidates: or what gives them, asked whether all sites are causal.

    Raises InputError where nothing was caught.
    """
    probe, found = Probe(model), {}

    def note(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        q = call.launch.q
        found[call.key] = Found(call.info, call.own, int(q.shape[3]), dtype_name(q.dtype))
        return out

    device = next((parameter.device for parameter in getattr(model, "parameters", list)()), torch.device("cpu"))
    given = {name: _moved(value, device) for name, value in sample.inputs.items()}
    with torch.no_grad(), probe.under({}, note):
        result = probe(**given, **sample.extra)
    probe.check(name)
    sites: dict[Key, Found] = found
    causal = all(site.info.causal for site in sites.values())
    chosen = candidates(causal) if callable(candidates) else candidates
    patterns = tuple(None if one.name == DENSE else one.pattern() for one in chosen)
    objective = objective or objective_for(result, sample, causal)
    return Rig(probe, Heads(tuple(sites.values())), objective, chosen, patterns, device, instead_of_logits(result))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
