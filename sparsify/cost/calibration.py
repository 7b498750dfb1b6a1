"""Calibration: a machine's rates from runs of the real kernels on it, in under two minutes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch

from sparsify import codegen
from sparsify import patterns as p
from sparsify.cost import find
from sparsify.cost.dense_rates import dense_rates
from sparsify.cost.fit import check_fit, fitted, predicted
from sparsify.cost.machine import Machine, Pace, Rates
from sparsify.cost.nest import Shape, cpp_nest
from sparsify.cost.sample import Sample, build, pace, seconds
from sparsify.cost.selection_rates import selection_rates
from sparsify.errors import InputError
from sparsify.patterns import Pattern
from sparsify.runtime import tuned
from sparsify.runtime.machine import cpu_model

DTYPES, HEAD_DIMS = ("float32", "bfloat16"), (64, 128)
READ_BYTES = 2**28  # of the tensor whose sum tells how fast memory is read
PASSES = 3  # over all samples, the median of which counts

Progress = Callable[[str, int, int], None]  # what is going on, steps done, all steps
CAUSAL = p.causal()

# One kernel each; sizes in N give several patterns to one kernel. The numbers are lengths of keys.
PREFILL: tuple[tuple[Pattern, tuple[int, ...]], ...] = (
    (CAUSAL, (200, 700, 2000, 40, 110, 20)),  # the last is all call
    (p.window("N/8"), (600, 1800, 3900, 64, 130)),
    ((p.sinks(4) | p.window("N/16 + 16")) & CAUSAL, (900, 3000)),
    (p.dilated(4) & p.window("N/4"), (500, 1500)),
    ((p.window("N/32") | p.column_stride(6, block=32)) & CAUSAL, (1200, 2600)),
    (p.column_stride(2000) & CAUSAL, (6000,)),  # most of whose tiles are empty
    (p.neighborhood([24, 40], [7, 9]), (960,)),
    (p.neighborhood([32, 48], [16, 16], 8), (1536,)),
    (p.neighborhood([40, 44], 9), (1760,)),  # of boxes of which parts are kept
    (p.neighborhood([12, 12, 12], 3), (1728,)),  # of which few parts are
)
# Queries, heads, key heads and keys of few queries; for some of those kernels.
DECODE = ((1, 8, 8, 9000), (1, 8, 2, 20000), (4, 2, 2, 5000), (1, 2, 1, 700), (16, 4, 2, 4000), (2, 8, 1, 12000))
DECODED = (0, 2, 4)


def calibrate(progress: Progress | None = None) -> Machine:
    """This machine, measured: the rates of its kernels by dtype and head size, of dense attention and of choosing.

    progress: called with what is going on, and how many of how many steps are done. It takes one to two minutes on an
    idle machine. Kernels are those that run by default, whatever was tuned. `save` keeps the result, and
    `machine(None)` then finds it. Raises InputError where the C++ target can't run, with the reason, and where no rates
    fit the times, as when other work runs beside it.
    """
    refusal = codegen.target("cpp").unavailable()
    if refusal is not None:
        raise InputError(f"calibrate: {refusal}")
    tell, given = progress or (lambda what, done, every: None), samples()
    steps = len(given) * (1 + PASSES) + 2
    with torch.inference_mode(), tuned.forced({}):
        build(given, lambda done: tell("building kernels", done, steps))
        at = pace()
        times = _timed(given, lambda done: tell("timing attention", len(given) + done, steps), at)
        tell("timing dense attention", steps - 2, steps)
        dense = dense_rates(DTYPES, HEAD_DIMS, at)
        tell("timing selections", steps - 1, steps)
        chosen = selection_rates(at)
        first = Machine(
            name=find.this_name(),
            about=f"{cpu_model()}, {find.cores()} threads",
            target="cpp",
            arch=find.isa(),
            cores=find.cores(),
            memory=_memory(at),
            launch=4e3,
            cold=5e4,
            fork=2e3,
            measured=True,
            sources=(f"sparsify calibrated it, with torch {torch.__version__}",),
            rates=tuple(_guess(dtype, size) for dtype, size in product(DTYPES, HEAD_DIMS)),
            dense=dense,
            selection=chosen,
            pace=at,
        )
    tell("fitting", steps, steps)
    found = fitted(first, given, [1e9 * time for time in times])
    check_fit("attention", predicted(found, given), 1e9 * np.array(times))
    return found


def samples() -> list[Sample]:
    """What is timed, one head size and dtype after the other."""
    found = []
    for dtype, size in product(DTYPES, HEAD_DIMS):
        for number, (pattern, lengths) in enumerate(PREFILL):
            for heads, length in zip((2, 4, 2, 8, 4, 2), lengths, strict=False):
                found.append(Sample((pattern,) * heads, Shape(heads, 2, length, length, size, dtype)))
            for queries, heads, kv_heads, keys in DECODE if number in DECODED else ():
                found.append(Sample((pattern,) * heads, Shape(heads, kv_heads, queries, keys, size, dtype)))
    return found


def _guess(dtype: str, size: int) -> Rates:
    """Rates to begin with: how cores share work is known about as well as these are."""
    nest = cpp_nest(Shape(1, 1, 4096, 4096, size, dtype), find.isa(), find.cores())
    pair = size / 20
    return Rates(
        dtype=dtype, head_dim=size, tile=(nest.rows, nest.keys), full=pair, masked=0.5, live=pair, partial=20.0,
        visit=300.0, empty=100.0, pack=size / 4, row=size / 2, read=size / 3, direct=size / 12, item=1000.0,
    )  # fmt: skip


def _timed(given: Sequence[Sample], tell: Callable[[int], None], at: Pace) -> list[float]:
    found: list[list[float]] = [[] for _ in given]
    for turn in range(PASSES):
        for i, one in enumerate(given):
            found[i].append(seconds(one.run(), one.read, 0.06, at=at))
            tell(turn * len(given) + i + 1)
    return list(map(statistics.median, found))


def _memory(at: Pace) -> float:
    """Bytes a second at which all cores read what is in no cache."""
    large = torch.ones(READ_BYTES // 4)
    return READ_BYTES / seconds(large.sum, READ_BYTES, 0.3, at=at)
