"""Whether a launch's numbers are right: some of its queries beside the oracle in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify import bias
from sparsify.bench.check import largest
from sparsify.codegen.oracle import environment, kept, oracle_rows
from sparsify.codegen.slots import gathered, tokens
from sparsify.codegen.target import Launch

PAIRS = 2**23  # of queries and keys, over all heads, that are compared


@dataclass(frozen=True)
class Truth:
    """What a launch has to give.

    rows: the slots that are compared. expected: float64 (B, Hq, rows, Dv). bound: twice PyTorch's own error in the
    dtype, as in `sparsify bench`. usual: what the kernel gives by default, which is right there: all rows are compared
    with that, too. Where these are larger than any in `rows`, as in the first rows of causal rules, they are rounded by
    more than the bound.
    """

    launch: Launch
    rows: torch.Tensor
    expected: torch.Tensor
    bound: float
    usual: torch.Tensor

    @classmethod
    def of(cls, launch: Launch, run: Callable[[Launch], torch.Tensor]) -> Truth:
        """Of a launch that `run` runs by default."""
        rows = _some(launch)
        usual, expected = run(launch), oracle_rows(launch, rows)[0]
        bound = 2 * _largest(_theirs(launch, rows), expected) + 1e-7
        found = cls(launch, rows, expected, bound, usual)
        if any(launch.program.skips):  # a kernel may leave out what the oracle doesn't
            bound = max(bound, 2 * found.error(usual))
        return cls(launch, rows, expected, bound, usual)

    def error(self, out: torch.Tensor) -> float:
        """The largest absolute error; infinite where there is a NaN."""
        usual, ulps = self.usual.double(), 2 * torch.finfo(self.usual.dtype).eps  # of its weights and of itself
        apart = ((out.double() - usual).abs() - ulps * usual.abs()).nan_to_num(nan=math.inf) / 2
        beyond = apart.max().item() if out.numel() else 0.0  # each may be off by the bound
        return max(_largest(self._at_rows(out), self.expected), beyond if beyond > self.bound else 0.0)

    def _at_rows(self, out: torch.Tensor) -> torch.Tensor:
        queries = self.launch.program.queries
        if queries is None:
            return out[:, :, self.rows]
        held = tokens(queries, "q", out.shape[2], environment(self.launch))
        return gathered(out, *held)[:, :, self.rows]


def _some(launch: Launch) -> torch.Tensor:
    """Slots of queries, drawn, the first and the last among them; all of few."""
    slots, keys = (environment(launch)[name].numel() for name in "qk")
    many = max(2, PAIRS // (launch.q.shape[0] * launch.q.shape[1] * keys))
    if many >= slots:
        return torch.arange(slots)
    drawn = torch.randperm(slots - 2, generator=torch.Generator().manual_seed(1))[: many - 2] + 1
    return torch.cat([torch.tensor([0]), drawn.sort().values, torch.tensor([slots - 1])])


def _theirs(launch: Launch, rows: torch.Tensor) -> torch.Tensor:
    """What PyTorch itself computes in the launch's dtype with the mask: by SDPA, or as operations where it can't."""
    program, env, group = launch.program, environment(launch), launch.q.shape[1] // launch.k.shape[1]
    q, k, v = launch.q, *(t.repeat_interleave(group, dim=1) for t in (launch.k, launch.v))
    if program.queries is not None:
        q = gathered(q, *tokens(program.queries, "q", q.shape[2], env))
    if program.keys is not None:
        k, v = (gathered(t, *tokens(program.keys, "k", k.shape[2], env)) for t in (k, v))
    q, env = q[:, :, rows], env | {"q": env["q"][..., rows, :]}
    terms, low = bias.evaluate(program.bias, env), torch.finfo(q.dtype).min
    add = torch.where(terms.isinf(), terms, terms.clamp(low, -low)).to(q)  # without a bias, terms are a CPU's 0
    add = add.masked_fill(~kept(launch, env), -torch.inf)
    if program.softcap is None and program.sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=add, scale=launch.scale).nan_to_num(nan=0.0)
    scores, cap = q @ k.mT * launch.scale, program.softcap
    scores = (scores if cap is None else torch.tanh(scores / cap) * cap) + add
    if program.sink is not None:
        logit = bias.evaluate(program.sink, env).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit.to(scores.dtype)], -1)
    return (torch.softmax(scores, -1)[..., : v.shape[2]] @ v).nan_to_num(nan=0.0)


def _largest(out: torch.Tensor, truth: torch.Tensor) -> float:
    return largest(out, truth) if out.numel() else 0.0
