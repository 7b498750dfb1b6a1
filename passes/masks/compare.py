"""A predicate and a bias against the mask tensors that they were recovered from: the first place where they differ."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsify.passes.masks.values import DROPPED


class Difference(NamedTuple):
    """Where two masks differ first, and what each does to the score there."""

    at: tuple[int, ...]
    found: str
    expected: str


def first_difference(kept: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> Difference | None:
    """Where `kept` (bool) with `bias` (float64) does to a score what `mask` (bool, or floating to be added) does not.

    All three broadcast to one shape. Adding DROPPED or less counts as dropping. Biases are equal to within 4 ulp of the
    mask's dtype.
    """
    kept, bias, mask = torch.broadcast_tensors(kept, bias, mask)
    if mask.dtype == torch.bool:
        wanted, added, equal = mask, torch.zeros_like(bias), bias == 0
    else:
        wanted, added = ~(mask <= DROPPED), mask.double()
        near = torch.finfo(mask.dtype).eps * 4
        equal = torch.isclose(bias, added, rtol=near, atol=near, equal_nan=True)
    found = kept & ~(bias <= DROPPED)
    differs = (found != wanted) | (found & wanted & ~equal)
    if not differs.any():
        return None
    at = tuple(differs.nonzero()[0].tolist())
    return Difference(at, _effect(found[at], bias[at]), _effect(wanted[at], added[at]))


def _effect(kept: torch.Tensor, bias: torch.Tensor) -> str:
    return ("keeps the pair" + (f" and adds {float(bias):g}" if bias else "")) if kept else "drops the pair"
