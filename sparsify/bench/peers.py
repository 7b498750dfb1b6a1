"""The peers that are timed beside sparsify, all on the same tensors and, but for dense SDPA, with the same mask."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sparsify.bench.cases import Case
from sparsify.bench.choice import Choice, static_part
from sparsify.errors import InputError
from sparsify.expr import Pred
from sparsify.functional import attention
from sparsify.patterns import Pattern
from sparsify.patterns.grid import grids
from sparsify.patterns.neighborhood import Neighborhood
from sparsify.sizes import size_values
from sparsify.walk import evaluate, variables

Run = Callable[[], torch.Tensor]
Mask = Callable[..., torch.Tensor]  # of (b, h, q, k), as tensors that broadcast

MASKED = 8192  # the longest for which an N x N mask is made
BLOCK = 128  # FlexAttention's own block size
EAGER = 2**27  # pairs of a block mask that is built the usual way, which takes some 20 bytes for each


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

    @functools.cached_property
    def choice(self) -> Choice:
        """What chooses, where the data choose."""
        return Choice.of(self.case.rules, self.q, self.k)

    @functools.cached_property
    def chosen(self) -> torch.Tensor:
        """What was chosen: bool (lists, rows, units)."""
        return self.choice.table(self.choice.choose(self.q, self.k), self.case.length)

    @functools.cached_property
    def keeps(self) -> Mask:
        """Which pairs are kept, chosen ones included; the same for every peer."""
        static = mask_mod(self.case.rules, self.case.length)
        if not self.case.dynamic:
            return static
        table, unit = self.chosen, self.choice.unit
        group = self.case.heads // table.shape[0]

        def keeps(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return static(b, h, q, k) & table[h // group, q // unit.q, k // unit.k]

        return keeps

    @property
    def per_head(self) -> bool:
        """Whether heads keep different pairs."""
        rules = {rule.keep() for rule in self.case.rules}
        return self.case.dynamic or len(rules) > 1 or any("h" in variables(rule) for rule in rules)

    def kept(self, heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What some heads keep for some queries: bool (heads, rows, N)."""
        device = self.q.device
        head, q = heads.to(device)[:, None, None], rows.to(device)[:, None]
        keys = torch.arange(self.case.length, device=device)
        found = self.keeps(torch.zeros((), dtype=torch.long, device=device), head, q, keys)
        return found.expand(heads.numel(), rows.numel(), self.case.length)


def sparsify(inputs: Inputs) -> Run:
    """This library, called eagerly; where the data choose, choosing is compiled, and part of the call."""
    rules, (q, k, v) = inputs.case.rules, (inputs.q, inputs.k, inputs.v)
    if not inputs.case.dynamic:
        return lambda: attention(q, k, v, rules)
    choice = inputs.choice
    return lambda: choice.attend(q, k, v, choice.choose(q, k))


def dense(inputs: Inputs) -> Run:
    """PyTorch's own fused kernel with every pair, or every causal pair."""
    return _sdpa(inputs, is_causal=inputs.case.causal)


def full(inputs: Inputs) -> Run:
    """PyTorch's own fused kernel with every pair."""
    return _sdpa(inputs)


def cudnn(inputs: Inputs) -> Run:
    """cuDNN's kernel with every pair, or every causal pair."""
    run = _sdpa(inputs, is_causal=inputs.case.causal)

    def chosen() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run()

    return chosen


def masked(inputs: Inputs) -> Run:
    """PyTorch's own kernel with the same mask as a bool tensor (built outside the timing)."""
    heads = torch.arange(inputs.case.heads if inputs.per_head else 1)
    rows = torch.arange(inputs.case.length).split(1024)
    mask = torch.cat([inputs.kept(heads, some) for some in rows], dim=1)[None]
    return _sdpa(inputs, attn_mask=mask)


def _sdpa(inputs: Inputs, **how: object) -> Run:
    gqa = inputs.case.heads != inputs.case.kv_heads
    call = functools.partial(F.scaled_dot_product_attention, enable_gqa=gqa, **how)
    return lambda: call(inputs.q, inputs.k, inputs.v)


def flex(inputs: Inputs) -> Run:
    """FlexAttention compiled by Inductor, with the block mask of the same pattern (built outside the timing).

    Blocks that the data chose give the mask the size of its blocks, so that none is looked at in vain.
    """
    case, mask = inputs.case, block_mask(inputs)
    compiled = _compiled_flex(flex_attention)
    return lambda: compiled(inputs.q, inputs.k, inputs.v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def block_mask(inputs: Inputs) -> BlockMask:
    """FlexAttention's mask of a case, by its own builder where that doesn't take too much memory.

    A larger one is built by compiled code on a CPU. On a GPU, where Inductor can take minutes to compile that, it is
    built from some queries at a time: what that saves is to FlexAttention's advantage.
    """
    case, n = inputs.case, inputs.case.length
    heads = case.heads if inputs.per_head else None
    size = (inputs.choice.unit.q, inputs.choice.unit.k) if case.dynamic else (BLOCK, BLOCK)
    large = (heads or 1) * n * n > EAGER
    if large and inputs.q.is_cuda:
        return mask_by_rows(inputs, torch.arange(heads or 1), size)
    return create_block_mask(inputs.keeps, None, heads, n, n, inputs.q.device, size, _compile=large)


def mask_by_rows(inputs: Inputs, heads: torch.Tensor, size: tuple[int, int]) -> BlockMask:
    """A block mask from what the queries of one row of blocks keep, row after row."""
    n, (rows, columns) = inputs.case.length, size
    some, whole = [], []
    for queries in torch.arange(n).split(rows):
        keep = F.pad(inputs.kept(heads, queries), (0, -n % columns, 0, rows - len(queries)))
        blocks = keep.unflatten(2, (-1, columns))
        some.append(blocks.any(dim=(1, 3)))
        whole.append(blocks.all(dim=(1, 3)))
    full = torch.stack(whole, 1)
    found = [_listed(blocks) for blocks in (torch.stack(some, 1) & ~full, full)]
    return BlockMask.from_kv_blocks(*found[0], *found[1], size, inputs.keeps, (n, n))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks are set in each row, and their numbers first, of bool (heads, rows, columns)."""
    numbers = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None], numbers.to(torch.int32)[None]


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
    return lambda: call(q, k, v, **rule).flatten(1, -3).transpose(1, 2)


@functools.cache
def _compiled_flex(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(function, dynamic=False)


def mask_mod(heads: Sequence[Pattern], length: int) -> Mask:
    """The patterns of the heads, but for what data choose, at this length, as FlexAttention's mask function."""
    rules: dict[Pred, list[int]] = {}
    for head, pattern in enumerate(heads):
        rules.setdefault(static_part(pattern.keep()), []).append(head)
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
PEERS: dict[str, Callable[[Inputs], Run]] = {
    "sparsify": sparsify, "dense": dense, "cudnn": cudnn, "full": full, "mask": masked, "flex": flex, "natten": natten,
}  # fmt: skip
SAME = ("sparsify", "mask", "flex", "natten")  # those that have the same mask: their numbers are compared


def peers_of(case: Case, device: str = "cpu") -> dict[str, Callable[[Inputs], Run]]:
    """The peers of a case.

    `full` goes with causal cases, whose dense peer is causal; `mask` where the mask is affordable; cuDNN's with 16 bits
    on an NVIDIA GPU; NATTEN's with neighborhoods and where it is installed.
    """
    near = any(map(grids, case.rules)) and importlib.util.find_spec("natten") is not None
    half = device == "cuda" and torch.version.cuda is not None and case.dtype != "float32"
    there = {"full": case.causal, "mask": case.length <= MASKED, "natten": near, "cudnn": half}
    return {name: prepare for name, prepare in PEERS.items() if there.get(name, True)}


def gemm_rate(dtype: torch.dtype, device: str, size: int) -> Run:
    """A square matrix product of this dtype: what the machine can do at its best."""
    a = torch.randn(size, size).to(device, dtype)
    return lambda: a @ a
