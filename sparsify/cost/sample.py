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
from sparsify.cost.machine import DECODE_BELOW, Pace
from sparsify.cost.nest import Shape
from sparsify.functional import planned
from sparsify.patterns import Pattern
from sparsify.patterns.causal import is_causal
from sparsify.program import Program

EVICT_BYTES = 2**26  # read between calls of few queries, so that no key is in a cache, as when layers follow each other

SIDE, PRODUCTS = 512, 6  # matrix products that tell how fast the machine runs, before the calls and after them
MANY = FEW + 1  # queries: all kernels of so many or more are one

DRIFT, TRIES = 1.25, 2  # of the machine's pace: beyond it calls are timed again, at most so often in all

Run = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One attention: the pattern of each query head, and sizes. Chosen keys are chosen before: that isn't timed."""

    patterns: tuple[Pattern, ...]
    shape: Shape

    @property
    def cold(self) -> bool:
        """Whether keys are to come from memory."""
        return self.shape.q_len < DECODE_BELOW

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


def seconds(
    run: Run, cold: bool, budget: float = 0.15, least: int = 5, most: int = 40, at: Pace | None = None
) -> float:  # fmt: skip
    """The median of calls for about so many seconds, after one that warms up.

    at: the pace at which the time is asked for; how fast the machine runs meanwhile is measured beside the calls. Where
    that is far from it, others use the machine, and calls are timed again: the time at the nearest pace counts.
    """
    found = [_at_pace(run, cold, budget, least, most, at)]
    while at is not None and min(found)[0] > DRIFT and len(found) < TRIES:
        found.append(_at_pace(run, cold, budget, least, most, at))
    return min(found)[1]


def _at_pace(
    run: Run, cold: bool, budget: float, least: int, most: int, at: Pace | None
) -> tuple[float, float]:  # fmt: skip
    """By how many times the machine runs faster or slower than at a pace, before the calls or after them, and their
    median at that pace."""
    large = torch.ones(EVICT_BYTES // 4) if cold else None
    found: list[float] = []
    beside: list[float] = []
    with torch.inference_mode():
        run()
        beside += [] if cold or at is None else _products(PRODUCTS)
        begin = time.perf_counter()
        while len(found) < least or (len(found) < most and time.perf_counter() - begin < budget):
            if large is not None:
                beside.append(_timed(large.sum))
            found.append(_timed(run))
        beside += [] if cold or at is None else _products(PRODUCTS)
    if at is None:
        return 1.0, statistics.median(found)
    asked, half = at.memory if cold else at.product, len(beside) // 2
    apart = [statistics.median(some) / asked for some in (beside[:half], beside[half:])]
    return max(*apart, *(1 / one for one in apart)), statistics.median(found) * asked / statistics.median(beside)


def _products(count: int) -> list[float]:
    """Seconds of so many matrix products."""
    one = torch.ones(SIDE, SIDE)
    return [_timed(lambda: one @ one) for _ in range(count + 1)][1:]


def _timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
