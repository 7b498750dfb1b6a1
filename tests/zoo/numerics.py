"""Compare a rewritten model with the model itself: a site that is caught wrongly is worse than one that is missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import Call, Variant
from tests.zoo.walk import run

FLOOR, FACTOR = 2e-5, 4.0


@dataclass(frozen=True)
class Difference:
    """The largest difference of an output from float64, and how much is allowed, both over the largest output.

    allowed: a few times what the model itself differs in float32, and never less than FLOOR.
    """

    found: float
    allowed: float

    @property
    def fine(self) -> bool:
        return self.found <= self.allowed  # NaN is not


@torch.no_grad()
def difference(variant: Variant, target: str = "cpp") -> Difference:
    """Runs the variant through the backend, eagerly in float32 and, where its code can, eagerly in float64."""
    entry = variant.entry
    implementation = variant.implementation if variant.implementation != "flex_attention" else entry.implementations[0]
    model, plain = entry.build(variant.implementation), entry.build(implementation)
    make = entry.calls[variant.call]
    options = {"inner": "eager", "crossover": False, "target": target}
    found = outputs(run(model, make(model), "sparsify", variant.dynamic, options), make(model))
    eager = outputs(plain(**make(plain)), make(plain))
    exact = _in_double(plain, make) or eager
    scale = max(max((float(part.abs().max()) for part in exact if part.numel()), default=1.0), 1e-30)
    return Difference(_apart(found, exact) / scale, max(FACTOR * _apart(eager, exact) / scale, FLOOR))


def _in_double(model: nn.Module, make: Any) -> list[Tensor] | None:
    """The outputs in float64, or None where the model's code mixes dtypes: it raises, or its mask overflows."""
    model.double()
    try:
        call = {name: _doubled(value) for name, value in make(model).items()}
        found = outputs(model(**call), call)
        return found if all(part.isfinite().all() for part in found) else None
    except RuntimeError:
        return None


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, tuple):
        return tuple(map(_doubled, value))
    return {name: _doubled(part) for name, part in value.items()} if isinstance(value, dict) else value


def outputs(result: Any, call: Call) -> list[Tensor]:
    """The floating tensors of a result; of those over the tokens of the call, the ones that are no padding."""
    mask = call.get("attention_mask")
    parts = [part.double() for part in _tensors(result) if part.is_floating_point()]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return parts
    return [part[mask.bool()] if part.shape[:2] == mask.shape else part for part in parts]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for part in result.values():
            yield from _tensors(part)
    elif isinstance(result, Sequence) and not isinstance(result, str):
        for part in result:
            yield from _tensors(part)


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    if [part.shape for part in found] != [part.shape for part in wanted]:
        return float("inf")
    return max((_largest(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _largest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference; what is infinite on both sides alike is none."""
    apart = torch.where(found == wanted, 0.0, (found - wanted).abs())
    return float(apart.max()) if apart.numel() else 0.0
