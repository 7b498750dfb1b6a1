"""Whether a case's numbers are right: outputs beside a dense boolean mask in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify.bench.peers import Inputs

WHOLE = 4096  # up to here every query is compared
ROWS = 1024  # of longer ones, so many of each head, drawn
PAIRS = 2**23  # compared at a time
SLACK = 1e-7  # above a bound that is 0 where SDPA happens to be exact


@dataclass(frozen=True)
class Check:
    """error: the largest absolute error of each output. bound: twice that of SDPA in this dtype, given the mask.

    rows: how many queries of each head were compared.
    """

    error: Mapping[str, float]
    bound: float
    rows: int

    def right(self, name: str) -> bool:
        """Whether an output is within the bound."""
        return within(self.error[name], self.bound)


def within(error: float, bound: float) -> bool:
    """Whether an absolute error keeps a bound; never if it is NaN."""
    return error <= bound + SLACK


def check(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> Check:
    """Compares outputs (1, H, N, D) on all queries, or on some of every head where there are many."""
    case, generator = inputs.case, torch.Generator().manual_seed(1)
    group, worst, bound, rows = case.heads // case.kv_heads, dict.fromkeys(outputs, 0.0), 0.0, torch.arange(0)
    for head in range(case.heads):
        rows = torch.arange(case.length)
        if case.length > WHOLE:
            rows = torch.randperm(case.length, generator=generator)[:ROWS].sort().values
        k, v = (_of_head(t, head // group) for t in (inputs.k, inputs.v))
        for some in rows.split(max(1, PAIRS // case.length)):
            keep = inputs.kept(torch.tensor([head]), some)
            mine = {name: _of_head(out, head)[:, :, some] for name, out in outputs.items()}
            q = _of_head(inputs.q, head)[:, :, some]
            errors, allowed = compared(q, k, v, keep, case.head_dim**-0.5, mine)
            worst = {name: max(worst[name], errors[name]) for name in worst}
            bound = max(bound, allowed)
    return Check(worst, bound, len(rows))


def _of_head(tensor: torch.Tensor, head: int) -> torch.Tensor:
    return tensor[:, head : head + 1]


def compared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scale: float,
    outputs: Mapping[str, torch.Tensor],
) -> tuple[dict[str, float], float]:
    """(error of each output, bound), for q (1, H, rows, D), k and v (1, H, N, D) and keep, bool (H, rows, N)."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~keep, -torch.inf)
    truth = torch.softmax(scores, dim=-1).nan_to_num(nan=0.0) @ v.double()
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[None], scale=scale).nan_to_num(nan=0.0)
    return {name: largest(out, truth) for name, out in outputs.items()}, 2 * largest(theirs, truth)


def largest(out: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest absolute difference; infinite where there is a NaN."""
    found = (out.double() - truth).abs().max().item()
    return found if math.isfinite(found) else math.inf
