"""MoA's influence: the first-order change of the loss if a weight is dropped and its mass goes to the rest of its row.

For A the weights and g the loss's gradient at them, E = -A (g - sum of g A over the row) / (1 - A + eps), in the first
row -g A (arXiv 2406.14909). A candidate loses the sum of |E| over what it drops. One backward pass a sample; weights
are made again block by block. The loss is that of the model's own answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparsify.errors import InputError
from sparsify.planner.influence import frozen
from sparsify.planner.objective import Tokens
from sparsify.planner.probe import Key
from sparsify.planner.profiles.profile import Profile
from sparsify.planner.progress import Progress
from sparsify.planner.rig import Rig
from sparsify.planner.samples import Sample
from sparsify.planner.settings import Settings
from sparsify.planner.site_call import SiteCall
from sparsify.planner.state import State
from sparsify.planner.study import studied

EPSILON = 1e-6
ANSWER, MOST_ANSWERS = 8, 128  # an answer is an eighth of the length, and at most so many tokens


def moa(rig: Rig, samples: Sequence[Sample], settings: Settings, state: State, progress: Progress) -> Profile:
    """Losses by influence. Raises InputError for a model that doesn't say what token comes next."""
    if not isinstance(rig.objective, Tokens) or not rig.objective.next_token:
        raise InputError("plan: profile: moa needs a model that says what token comes next; take 'influence'")
    progress.expect([sample.length * 2 for sample in samples])
    total = np.zeros((len(rig.heads), len(rig.candidates)))
    for sample in samples:
        progress.tell(f"influence on the model's own answers, at {sample.length} tokens")
        key = "moa", sample.digest()
        found = state.of(key, lambda sample=sample: {"losses": _losses(rig, own_answers(rig, sample))})
        total += found["losses"] / len(samples)
        progress.advance()
    return Profile(total)


def own_answers(rig: Rig, sample: Sample) -> Sample:
    """A sample's beginning, and how the dense model goes on; only that counts.

    A model that can't generate answers position by position, with what it would have said next.
    """
    tokens, generate = sample.tokens, getattr(rig.probe.model, "generate", None)
    assert tokens is not None
    size = max(1, min(MOST_ANSWERS, sample.length // ANSWER))
    start = sample.length - size
    if generate is not None:
        with torch.no_grad():
            given = tokens[:, :start].to(rig.device)
            mask = torch.ones_like(given)
            made = generate(given, attention_mask=mask, max_new_tokens=size, min_new_tokens=size, do_sample=False,
                            pad_token_id=0)  # fmt: skip
        tokens = made.cpu()
    else:
        with torch.no_grad():
            said = rig.objective.reference(rig.run(sample), sample).argmax(-1).cpu()
        tokens = torch.cat([tokens[:, : start + 1], said[:, start:-1]], 1)
    weights = torch.zeros(tokens.shape)
    weights[:, start - 1 : -1] = 1.0
    return Sample(
        {**sample.inputs, "input_ids": tokens}, tokens.shape[1], tokens, weights, (), sample.kind, sample.extra
    )


def _losses(rig: Rig, sample: Sample) -> np.ndarray:
    calls: dict[Key, tuple[SiteCall, torch.Tensor]] = {}

    def watch(call: SiteCall, out: torch.Tensor) -> torch.Tensor:
        added = torch.zeros_like(out, requires_grad=True)
        calls[call.key] = call, added
        return out + added

    with torch.enable_grad(), frozen(rig.probe.model):
        result = rig.run(sample, {}, watch)
        loss = rig.objective.loss(result, torch.empty(0), sample).sum()
        gradients = torch.autograd.grad(loss, [added for _, added in calls.values()])
    with torch.no_grad():
        found = [_of_site(rig, call, of) for (call, _), of in zip(calls.values(), gradients, strict=True)]
    return np.concatenate(found)


def _of_site(rig: Rig, call: SiteCall, gradient: torch.Tensor) -> np.ndarray:
    """(heads of the site, candidates)."""
    keeps = {number: call.keep(pattern) for number, pattern in enumerate(rig.patterns)}
    total = torch.zeros(call.launch.q.shape[1], len(keeps), dtype=torch.float64)
    for rows in studied(call):
        weights = rows.shares()
        at = gradient[:, :, rows.first : rows.last].float() @ rows.values.mT
        moved = weights * (at - (at * weights).sum(-1, keepdim=True)) / (1 - weights + EPSILON)
        if rows.first + call.at.offset == 0 and call.info.causal:
            moved[:, :, 0] = (at * weights)[:, :, 0]
        size = moved.abs()
        whole = size.sum(-1)
        for number, keep in keeps.items():
            total[:, number] += (whole - rows.part(size, keep)).sum((0, 2)).double().cpu()
    return total.clamp_min(0).numpy()
