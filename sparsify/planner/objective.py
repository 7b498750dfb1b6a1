"""What a model's output is worth: how far it is from the dense model's, and what it loses by itself.

Near the dense output every distance here is half a square, so it has *probes*: random directions of the output such
that the mean of their squares is twice the distance. One backward pass a probe then says what a change of any head's
output does to the distance, and how the changes of two heads add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparsify.errors import InputError
from sparsify.planner.samples import Sample


class Objective(Protocol):
    """unit: of distances and losses. absolute: whether `loss` is one that dense attention has, too (else it is the
    distance, and dense attention's is 0)."""

    unit: str
    absolute: bool

    def reference(self, result: Any, sample: Sample) -> torch.Tensor:
        """What is to be remembered of the dense model's result."""

    def distance(self, result: Any, reference: torch.Tensor, sample: Sample) -> torch.Tensor:
        """(B,) how far a result is from the dense one, 0 for the same."""

    def loss(self, result: Any, reference: torch.Tensor, sample: Sample) -> torch.Tensor:
        """(B,) what a result loses."""

    def probes(
        self, result: Any, reference: torch.Tensor, sample: Sample, count: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`count` times (B,) numbers to differentiate, and (B,) what they are now above the dense output's."""


def _positions(sample: Sample, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(B, N) the share of each position, which sum to 1 in each row."""
    weights = torch.ones(shape, device=device) if sample.weights is None else sample.weights.to(device).float()
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)


@dataclass(frozen=True)
class Tokens:
    """The distribution over tokens at each position. Distance: the Kullback-Leibler divergence from the dense one's, in
    nats a token. Loss: with `next_token` the cross-entropy of the token that follows, else the divergence."""

    next_token: bool = True
    unit: str = "nats a token"

    @property
    def absolute(self) -> bool:
        return self.next_token

    def reference(self, result: Any, sample: Sample) -> torch.Tensor:
        return torch.log_softmax(logits_of(result).float(), -1)

    def distance(self, result: Any, reference: torch.Tensor, sample: Sample) -> torch.Tensor:
        here = torch.log_softmax(logits_of(result).float(), -1)
        each = (reference.exp() * (reference - here)).sum(-1)
        return (each * _positions(sample, each.shape, each.device)).sum(-1)

    def loss(self, result: Any, reference: torch.Tensor, sample: Sample) -> torch.Tensor:
        if not self.next_token:
            return self.distance(result, reference, sample)
        here = torch.log_softmax(logits_of(result).float(), -1)[:, :-1]
        tokens = sample.tokens.to(here.device)
        each = -here.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        share = _positions(sample, tokens.shape, here.device)[:, :-1]
        return (each * share).sum(-1) / share.sum(-1).clamp_min(1e-30)

    def probes(
        self, result: Any, reference: torch.Tensor, sample: Sample, count: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens drawn from the dense distribution: their gradients have the divergence's curvature (Fisher)."""
        logits, dense = logits_of(result).float(), reference.exp()
        share = _positions(sample, logits.shape[:2], logits.device).sqrt()
        centre = (dense * (logits - reference)).sum(-1)
        for _ in range(count):
            drawn = torch.multinomial(dense.flatten(0, 1).cpu(), 1, generator=generator).to(logits.device)
            drawn = drawn.view(*logits.shape[:2], 1)
            each = (logits - reference).gather(-1, drawn).squeeze(-1) - centre
            value = (each * share).sum(-1)
            yield value, value.detach()


@dataclass(frozen=True)
class Embedding:
    """One vector a row, the mean of the last hidden states over real tokens. Distance and loss: 1 - cosine."""

    unit: str = "1 - cosine"
    absolute: bool = False

    def reference(self, result: Any, sample: Sample) -> torch.Tensor:
        return self._vector(result, sample)

    def distance(self, result: Any, reference: torch.Tensor, sample: Sample) -> torch.Tensor:
        return 1 - (self._vector(result, sample) * reference).sum(-1)

    loss = distance

    def probes(
        self, result: Any, reference: torch.Tensor, sample: Sample, count: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        vector = self._vector(result, sample)
        for _ in range(count):
            value = ((vector - reference) * _signs(vector, generator)).sum(-1)
            yield value, value.detach()

    def _vector(self, result: Any, sample: Sample) -> torch.Tensor:
        states = result.last_hidden_state.float()
        mask = sample.inputs.get("attention_mask")
        if mask is None:
            return torch.nn.functional.normalize(states.mean(1), dim=-1)
        mask = mask.to(states).unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@dataclass(frozen=True)
class Values:
    """Any tensor. Distance and loss: the squared error, as a share of the dense output's square."""

    unit: str = "relative squared error"
    absolute: bool = False

    def reference(self, result: Any, sample: Sample) -> torch.Tensor:
        return _tensor(result).float().flatten(1)

    def distance(self, result: Any, reference: torch.Tensor, sample: Sample) -> torch.Tensor:
        gap = _tensor(result).float().flatten(1) - reference
        return gap.square().sum(-1) / reference.square().sum(-1).clamp_min(1e-30)

    loss = distance

    def probes(
        self, result: Any, reference: torch.Tensor, sample: Sample, count: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        scale = (2 / reference.square().sum(-1).clamp_min(1e-30)).sqrt()
        gap = _tensor(result).float().flatten(1) - reference
        for _ in range(count):
            value = (gap * _signs(gap, generator)).sum(-1) * scale
            yield value, value.detach()


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "tokens": Tokens,
    "distribution": lambda: Tokens(next_token=False),
    "embedding": Embedding,
    "values": Values,
}


def objective_for(result: Any, sample: Sample, causal: bool) -> Objective:
    """What a model's result is measured by. Raises InputError for a result without a tensor."""
    logits = getattr(result, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.dim() == 3 and sample.tokens is not None:
        return Tokens(next_token=causal)
    if isinstance(getattr(result, "last_hidden_state", None), torch.Tensor) and result.last_hidden_state.dim() == 3:
        return Embedding()
    _tensor(result)
    return Values()


def instead_of_logits(result: Any) -> str:
    """What a result has in the place of logits (B, N, tokens), in words; nothing where it has them."""
    logits = result if isinstance(result, torch.Tensor) else getattr(result, "logits", None)
    if isinstance(logits, torch.Tensor):
        return "" if logits.dim() == 3 else f"some of shape {tuple(logits.shape)}"
    names = f" with {', '.join(map(str, result.keys()))}" if hasattr(result, "keys") else ""
    return f"{type(result).__name__}{names}"


def logits_of(result: Any) -> torch.Tensor:
    """The logits (B, N, tokens) of a result. Raises InputError naming what was found instead."""
    if instead := instead_of_logits(result):
        raise InputError(f"plan: the model's result has no logits (batch, length, tokens), found {instead}")
    return result if isinstance(result, torch.Tensor) else result.logits


def _tensor(result: Any) -> torch.Tensor:
    """The first floating tensor of a result."""
    leaves = torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise InputError(f"plan: the model's result has no tensor to compare, found {type(result).__name__}")


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """+1 and -1 at random."""
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
