"""Samples: attentions that are run and timed, to fit a machine's rates or to see how well they predict."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify import op
from sparsify.codegen.cpp import CppTarget
from sparsify.codegen.tuned import FEW
from sparsify.cost.estimate import estimate
from sparsify.cost.machine import DECODE_BELOW, Pace
from sparsify.cost.nest import Shape
from sparsify.functional import planned
from sparsify.patterns import Pattern
from sparsify.patterns.causal import is_causal
from sparsify.program import Program

EVICT_BYTES = 2**26  # read between calls of few queries, so that no key is in a cache, as when layers follow each other

SIDE, PRODUCTS = 512, 6  # matrix products that tell how fast the machine runs, before the calls and after them
MANY = FEW + 1  # queries: all kernels of so many or more are one

SOME_MACHINE = "epyc-zen4"  # what is read is about the same on all
LEAST, MOST = 5, 40  # calls that are timed
DRIFT, TRIES = 1.25, 2  # of the machine's pace: beyond it calls are timed again, at most so often in all

Run = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One attention: the pattern of each query head, and sizes. Chosen keys are chosen before: that isn't timed."""

    patterns: tuple[Pattern, ...]
    shape: Shape

    @property
    def read(self) -> float | None:
        """Bytes that come from memory, about: keys and values that are read; None where they may be in caches."""
        shape = self.shape
        if shape.q_len >= DECODE_BELOW:
            return None
        sizes = {"length": shape.k_len, "head_dim": shape.head_dim, "dtype": shape.dtype, "batch": shape.batch}
        given = {"kv_heads": shape.kv_heads, "q_len": shape.q_len, "machine": SOME_MACHINE}
        return estimate(self.patterns, **sizes, **given).bytes

    @property
    def causal(self) -> bool:
        """Whether no head keeps a key after the query, so that causal dense attention is its peer."""
        return self.shape.q_len > 1 and all(is_causal(one.keep()) for one in dict.fromkeys(self.patterns))

    def tensors(self) -> list[torch.Tensor]:
        """q, k and v of normal numbers, always the same."""
        shape, generator = self.shape, torch.Generator().manual_seed(0)
        sizes = ((shape.heads, shape.q_len), *((shape.kv_heads, shape.k_len),) * 2)
        kind = getattr(torch, shape.dtype)
        return [torch.randn(shape.batch, *size, shape.head_dim, generator=generator).to(kind) for size in sizes]

    def program(self) -> str:
        """The canonical text of the program that its kernel is of."""
        q, k, _ = self.tensors()
        return planned(q, k, list(self.patterns), None, None, None, laid_out=True)[0]

    def run(self) -> Run:
        """The op as a compiled model calls it: everything that doesn't depend on numbers is done, and built."""
        q, k, v = self.tensors()
        text, loads, _, *numbers = planned(q, k, list(self.patterns), None, None, None, laid_out=True)
        call = lambda: op.attention(q, k, v, loads, *numbers, text)  # noqa: E731
        call()
        return call

    def dense(self) -> Run:
        """Dense attention at the same sizes, causal if this is."""
        q, k, v = self.tensors()
        grouped = self.shape.heads != self.shape.kv_heads
        causal = self.causal and self.shape.q_len == self.shape.k_len
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def build(samples: Sequence[Sample], tell: Callable[[int], None]) -> None:
    """Builds the kernels of all samples that aren't there yet, side by side: compilers are processes of their own.

    tell: called with how many samples have their kernel.
    """
    asked: dict[tuple[str, torch.dtype, int, int], int] = {}
    for one in samples:
        key = one.program(), getattr(torch, one.shape.dtype), one.shape.head_dim, min(one.shape.q_len, MANY)
        asked[key] = asked.get(key, 0) + 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_build, *key) for key in asked]
        done = 0
        for job, count in zip(jobs, asked.values(), strict=True):
            job.result()
            done += count
            tell(done)


def _build(text: str, dtype: torch.dtype, size: int, queries: int) -> None:
    CppTarget().kernel(Program.parse(text), dtype, size, size, queries)


def pace() -> Pace:
    """How fast the machine runs now."""
    large = torch.ones(EVICT_BYTES // 4)
    return Pace(
        product=statistics.median(_products(60)), memory=statistics.median(_timed(large.sum) for _ in range(20))
    )


def seconds(run: Run, read: float | None, budget: float = 0.15, at: Pace | None = None) -> float:
    """The median of LEAST to MOST calls, for about `budget` seconds, after one that warms up.

    read: bytes that a call reads from memory, as what others left in the caches is read before it; None for calls whose
    inputs may be there. at: the pace at which the time is asked for; how fast the machine runs meanwhile is measured
    beside the calls. Where it runs otherwise, others use it: then calls are timed again, and the nearer pace counts.
    """
    if read is not None:
        return _from_memory(run, read, budget, at)
    if at is None:
        return statistics.median(_repeated(run, budget))
    found = [_at_pace(run, budget, at)]
    while min(found)[0] > DRIFT and len(found) < TRIES:
        found.append(_at_pace(run, budget, at))
    return min(found)[1]


def _from_memory(run: Run, read: float, budget: float, at: Pace | None) -> float:
    """Of such calls only what they read is faster where memory is; the rest waits for its answers."""
    large = torch.ones(EVICT_BYTES // 4)
    beside: list[float] = []
    found = statistics.median(_repeated(run, budget, lambda: beside.append(_timed(large.sum))))
    if at is None:
        return found
    return max(found + read / EVICT_BYTES * (at.memory - statistics.median(beside)), found / 4)


def _at_pace(run: Run, budget: float, at: Pace) -> tuple[float, float]:
    """By how many times the machine runs faster or slower than at a pace, before the calls or after them, and their
    median at that pace."""
    before = _products(PRODUCTS)
    found = statistics.median(_repeated(run, budget))
    after = _products(PRODUCTS)
    apart = [statistics.median(some) / at.product for some in (before, after)]
    faster = at.product / statistics.median(before + after)
    return max(*apart, *(1 / one for one in apart)), found * faster


def _repeated(run: Run, budget: float, before: Run = lambda: None) -> list[float]:
    """Seconds of calls, each after something else."""
    found: list[float] = []
    with torch.inference_mode():
        run()
        begin = time.perf_counter()
        while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - begin < budget):
            before()
            found.append(_timed(run))
    return found


def _products(count: int) -> list[float]:
    """Seconds of so many matrix products."""
    one = torch.ones(SIDE, SIDE)
    return [_timed(lambda: one @ one) for _ in range(count + 1)][1:]


def _timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
