"""The peers that are timed beside sparsify, all on the same tensors and, but for dense SDPA, with the same mask."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify import codegen
from sparsify.bench.cases import Case
from sparsify.codegen.oracle import kept, oracle
from sparsify.codegen.target import Launch
from sparsify.errors import InputError
from sparsify.expr import Pred
from sparsify.functional import attention
from sparsify.patterns import Pattern
from sparsify.patterns.grid import grids
from sparsify.patterns.neighborhood import Neighborhood
from sparsify.program import Program
from sparsify.sizes import size_values
from sparsify.walk import evaluate, substitute, variables

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """q (1, H, N, D), k and v (1, Hkv, N, D) of one case, drawn with a fixed seed."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def draw(cls, case: Case, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def one(heads: int) -> torch.Tensor:
            return torch.randn(1, heads, case.length, case.head_dim, generator=generator).to(device, dtype)

        return cls(case, one(case.heads), one(case.kv_heads), one(case.kv_heads))

    def launch(self) -> Launch:
        """The call as a program, which the oracle understands."""
        program = Program.of([rule.keep() for rule in self.case.rules], target=codegen.choose(self.q.device.type))
        return Launch(program, self.q, self.k, self.v, (), 0, self.case.head_dim**-0.5)


def sparsify(inputs: Inputs) -> Run:
    """This library, called eagerly."""
    rules = inputs.case.rules
    return lambda: attention(inputs.q, inputs.k, inputs.v, rules)


def dense(inputs: Inputs) -> Run:
    """PyTorch's own fused kernel with every pair, or every causal pair."""
    gqa, causal = inputs.case.heads != inputs.case.kv_heads, inputs.case.causal
    return lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=causal, enable_gqa=gqa)


def flex(inputs: Inputs) -> Run:
    """FlexAttention compiled by Inductor, with the block mask of the same pattern (built outside the timing)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, n = inputs.case, inputs.case.length
    per_head = len({rule.keep() for rule in case.rules}) > 1 or any("h" in variables(r.keep()) for r in case.rules)
    heads = case.heads if per_head else None
    mask = create_block_mask(mask_mod(case.rules, n), None, heads, n, n, device=inputs.q.device)
    compiled = _compiled_flex(flex_attention)
    return lambda: compiled(inputs.q, inputs.k, inputs.v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def natten(inputs: Inputs) -> Run:
    """NATTEN's own operator on tensors in its layout; on CPUs it has FlexAttention, not compiled, and no other."""
    import natten as library

    case, found = inputs.case, grids(inputs.case.rules[0])
    one = found[0] if len(found) == 1 and found[0].tokens == case.length else None
    if not isinstance(one, Neighborhood) or set(one.border) != {"shift"}:
        raise InputError("NATTEN has no such pattern")
    q, k, v = (t.transpose(1, 2).contiguous().unflatten(1, one.shape) for t in (inputs.q, inputs.k, inputs.v))
    call = getattr(library, f"na{len(one.shape)}d")
    rule = {"kernel_size": one.window, "stride": one.stride, "dilation": one.dilation, "is_causal": one.causal}
    return lambda: call(q, k, v, **rule)


@functools.cache
def _compiled_flex(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(function, dynamic=False)


def mask_mod(heads: Sequence[Pattern], length: int) -> Callable[..., torch.Tensor]:
    """The patterns of the heads, at this length, as FlexAttention's mask function of (b, h, q, k)."""
    rules: dict[Pred, list[int]] = {}
    for head, pattern in enumerate(heads):
        rules.setdefault(pattern.keep(), []).append(head)
    sizes = size_values(frozenset().union(*map(variables, rules)), length)

    def keeps(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        env = {"b": b, "h": h, "q": q, "k": k, "N": length, "Nq": length, **sizes}
        found = q < 0
        for rule, numbers in rules.items():
            mine = q >= 0 if len(rules) == 1 else functools.reduce(torch.logical_or, [h == head for head in numbers])
            found = found | (mine & evaluate(rule, env))
        return found

    return keeps


# Name -> how to prepare it. Sparsify first: the ratios are against it.
PEERS: dict[str, Callable[[Inputs], Run]] = {"sparsify": sparsify, "dense": dense, "flex": flex}


def peers_of(case: Case) -> dict[str, Callable[[Inputs], Run]]:
    """The peers of a case: NATTEN, too, for neighborhoods and where it is installed."""
    near = any(map(grids, case.rules)) and importlib.util.find_spec("natten") is not None
    return PEERS | {"natten": natten} if near else PEERS


def errors(inputs: Inputs, run: Run) -> tuple[float, float]:
    """(error, bound): the largest absolute error against the float64 oracle, and what is allowed.

    The bound is twice the error of PyTorch's own SDPA in this dtype on the same inputs and mask. One head at a time,
    so that the float64 score matrix fits into memory.
    """
    launch, group = inputs.launch(), inputs.case.heads // inputs.case.kv_heads
    out = run().double()
    worst = allowed = 0.0
    for head in range(inputs.case.heads):
        q, k, v = inputs.q[:, head : head + 1], *(t[:, head // group : head // group + 1] for t in (inputs.k, inputs.v))
        rule = substitute(launch.program.rule_of(head), {"h": head})
        one = Launch(Program.of([rule], target=launch.program.target), q, k, v, (), 0, launch.scale)
        truth = oracle(one)
        reference = F.scaled_dot_product_attention(q, k, v, attn_mask=kept(one)).double().nan_to_num(nan=0.0)
        worst = max(worst, (out[:, head : head + 1] - truth).abs().max().item())
        allowed = max(allowed, 2 * (reference - truth).abs().max().item())
    return worst, allowed


def gemm_rate(dtype: torch.dtype, device: str, size: int = 2048) -> Run:
    """A square matrix product of this dtype: what the machine can do at its best."""
    a = torch.randn(size, size).to(device, dtype)
    return lambda: a @ a
