"""No buffer grows with the square of the length: what calls take at their highest, by trackers of three kinds.

Kernels that are C++ are seen by the process's resident memory, operators of torch by what each gives, and Triton's
interpreter by what Python and numpy allocate.
"""

from __future__ import annotations

import multiprocessing
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsify
from sparsify import patterns as p
from sparsify.bench.memory import peak_bytes

C = p.causal()
MB = 2**20
HELD = 20 * MB  # what threads hold of packed keys and of rows, whatever the length
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is looked at too seldom elsewhere")

PATTERNS = {
    "causal": C,
    "streaming": (p.sinks(4) | p.window("N/16")) & C,
    "strided": (p.window(128) | p.column_stride(8, block=64, offset="head")) & C,
    "dilated": p.dilated(8) & C,
    "columns": p.column_stride(8) & C,
    "blocks": p.topk(4, unit=64, sinks=1, local=1) & C,
    "expression": p.expr("(q - k) % 77 < 5 and k <= q"),
}


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def drawn(n: int, heads: int = 2, size: int = 16) -> list[torch.Tensor]:
    return [torch.randn(1, heads, n, size) for _ in "qkv"]


@LINUX
@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_take_what_threads_hold_and_the_output(name, monkeypatch):
    """At 16384 tokens a mask of bool has 256 MB for each head."""
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    n, pattern = 16384, PATTERNS[name]
    q, k, v = drawn(n, heads=1)
    with torch.inference_mode():
        sparsify.attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], pattern)  # built before
        assert peak_bytes(lambda: sparsify.attention(q, k, v, pattern)) < HELD + 4 * q.nbytes


@LINUX
def test_padding_costs_what_it_has(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    n = 16384
    q, k, v = drawn(n, heads=1)
    mask = torch.rand(1, 1, 1, n) > 0.2
    with torch.inference_mode():
        sparsify.attention(q, k, v, C, mask=mask)
        assert peak_bytes(lambda: sparsify.attention(q, k, v, C, mask=mask)) < HELD + 4 * q.nbytes


class Model(torch.nn.Module):
    """Causal self-attention that makes its mask for itself, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.shape[1])
        mask = (at <= at[:, None]) & kept[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@LINUX
@torch.inference_mode()
@pytest.mark.parametrize("spec", [None, {"version": 1, "sites": [{"match": "*", "heads": {"dilated": 4}}]}])
def test_a_compiled_model_makes_no_mask(spec):
    """At 8192 tokens its own would be 64 MB, and SDPA would make 256 MB of floats of it."""
    torch._dynamo.reset()
    n, model = 8192, Model().eval()
    x, kept = torch.randn(1, n, 32), torch.rand(1, n) > 0.2
    run = torch.compile(model, backend="sparsify", options={"spec": spec, "target": "cpp", "strict": True})
    run(x, kept)
    assert peak_bytes(lambda: run(x, kept)) < HELD + 8 * x.nbytes


@pytest.mark.parametrize("name", PATTERNS)
def test_operators_around_kernels_make_nothing_square(name, monkeypatch):
    """Selections are operators of torch: on blocks, of which there are far fewer."""
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    n = 4096
    q, k, v = drawn(n)
    with torch.inference_mode(), Largest() as seen:
        sparsify.attention(q, k, v, PATTERNS[name])
    assert seen.elements <= 4 * q.numel() < n * n


def test_the_interpreter_goes_tile_by_tile(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    n = 1024
    q, k, v = drawn(n, heads=1)
    for pattern in (p.window(40), p.dilated(128) & p.window(300)):
        with torch.inference_mode(), Largest() as seen:
            sparsify.attention(q, k, v, pattern)
        assert seen.elements <= 4 * q.numel() < n * n


def _in_triton(n: int) -> int:
    """Bytes at the highest of what Python and numpy allocate in one call, and the largest tensor of torch."""
    q, k, v = drawn(n, heads=1)
    call = lambda: sparsify.attention(q, k, v, p.window(40))  # noqa: E731
    with torch.inference_mode():
        call()
        tracemalloc.start()
        with Largest() as seen:
            call()
        return max(tracemalloc.get_traced_memory()[1], 4 * seen.elements)


@pytest.mark.slow
def test_triton_allocates_what_its_output_takes(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for a process of its own: Triton decides when it is imported
    monkeypatch.setenv("SPARSIFY_TARGET", "triton")
    n = 2048
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_in_triton, n).result() < n * n
