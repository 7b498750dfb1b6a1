"""The oracle: attention under a dense boolean mask in float64. Every kernel's output is compared with this."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.codegen.target import Launch
from sparsify.patterns.dense_mask import position_env
from sparsify.walk import evaluate

if TYPE_CHECKING:
    import torch


def kept(launch: Launch) -> torch.Tensor:
    """What the program's predicates keep, evaluated at every pair: bool (B, Hq, Nq, Nk)."""
    import torch

    program, shape = launch.program, (*launch.q.shape[:3], launch.k.shape[2])
    env = position_env(shape[1], shape[2], shape[3], launch.q_offset, launch.q.device)
    env["b"] = torch.arange(shape[0], device=launch.q.device).view(-1, 1, 1, 1)
    env |= dict(zip(program.sizes(), program.size_values(shape[3]), strict=True))
    env |= {f"_{i}": load for i, load in enumerate(launch.loads)}
    rules = [torch.as_tensor(evaluate(keep, env), device=launch.q.device).expand(shape) for keep in program.keep]
    return torch.stack([rules[rule][:, h] for h, rule in enumerate(program.heads)], dim=1)


def oracle(launch: Launch) -> torch.Tensor:
    """The output (B, Hq, Nq, Dv) in float64; a row that keeps nothing gives 0."""
    import torch

    group = launch.q.shape[1] // launch.k.shape[1]
    q, k, v = launch.q.double(), *(t.double().repeat_interleave(group, dim=1) for t in (launch.k, launch.v))
    scores, cap = q @ k.transpose(-1, -2) * launch.scale, launch.program.softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    keep = kept(launch)
    if launch.mask is not None and launch.mask.dtype == torch.bool:
        keep = keep & launch.mask
    elif launch.mask is not None:
        scores = scores + launch.mask.double()
    weights = torch.softmax(scores.masked_fill(~keep, -torch.inf), dim=-1)
    return weights.nan_to_num(nan=0.0) @ v
