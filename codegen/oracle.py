"""The oracle: attention under a dense boolean mask in float64. Every kernel's output is compared with this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify import bias
from sparsify.codegen.target import Launch
from sparsify.patterns.dense_mask import position_env
from sparsify.walk import evaluate

if TYPE_CHECKING:
    import torch


def kept(launch: Launch) -> torch.Tensor:
    """What the program's predicates keep, evaluated at every pair: bool (B, Hq, Nq, Nk)."""
    import torch

    program, shape, env = launch.program, _shape(launch), environment(launch)
    rules = [torch.as_tensor(evaluate(keep, env), device=launch.q.device).expand(shape) for keep in program.keep]
    return torch.stack([rules[rule][:, h] for h, rule in enumerate(program.heads)], dim=1)


def _shape(launch: Launch) -> tuple[int, int, int, int]:
    batch, heads, q_len, _ = launch.q.shape
    return batch, heads, q_len, launch.k.shape[2]


def environment(launch: Launch) -> dict[str, Any]:
    """What the names in a program's predicates and biases stand for, each broadcastable to (B, Hq, Nq, Nk)."""
    import torch

    program, (batch, heads, q_len, k_len) = launch.program, _shape(launch)
    env = position_env(heads, q_len, k_len, launch.q_offset, launch.q.device)
    env["b"] = torch.arange(batch, device=launch.q.device).view(-1, 1, 1, 1)
    env |= dict(zip(program.sizes(), program.size_values(k_len), strict=True))
    return env | {f"_{i}": load for i, load in enumerate(launch.loads)}


def oracle(launch: Launch) -> torch.Tensor:
    """The output (B, Hq, Nq, Dv) in float64; a row that keeps nothing gives 0."""
    import torch

    group = launch.q.shape[1] // launch.k.shape[1]
    q, k, v = launch.q.double(), *(t.double().repeat_interleave(group, dim=1) for t in (launch.k, launch.v))
    scores, cap = q @ k.transpose(-1, -2) * launch.scale, launch.program.softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    env = environment(launch)
    scores = scores + bias.evaluate(launch.program.bias, env)
    scores = scores.masked_fill(~kept(launch), -torch.inf)
    sink = launch.program.sink
    if sink is not None:
        logit = bias.evaluate(sink, env).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : v.shape[2]]
    return weights.nan_to_num(nan=0.0) @ v
