"""Rates of dense attention, measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.optimize import nnls

from sparsify import patterns as p
from sparsify.cost.fit import check_fit
from sparsify.cost.machine import Dense, Pace
from sparsify.cost.nest import Shape
from sparsify.cost.sample import Sample, seconds

LEAST = 1e-6
PASSES = 3  # the median of which counts
LONG = ((8, 8, 40), (4, 4, 110), (2, 2, 64), (2, 2, 256), (4, 4, 700), (4, 2, 1400))  # heads, key heads, length
FEW_QUERIES = ((8, 8, 1, 6000), (8, 2, 1, 6000), (2, 2, 4, 3000), (8, 1, 1, 1000), (4, 4, 1, 300), (2, 1, 1, 128))


def dense_rates(dtypes: Sequence[str], head_dims: Sequence[int], at: Pace) -> tuple[Dense, ...]:
    """Those of `scaled_dot_product_attention` on this machine, at a pace."""
    return tuple(_rates(dtype, size, at) for dtype, size in product(dtypes, head_dims))


def _rates(dtype: str, size: int, at: Pace) -> Dense:
    """Least squares in relative error. Short calls of many queries tell the launch, those of few what they take beside
    it, which can't be less than 0."""
    rows, times = [], []
    for causal, (heads, kv_heads, length) in product((False, True), LONG):
        shape = Shape(heads, kv_heads, length, length, size, dtype)
        pairs = float(heads * length**2)
        rows.append([1.0, 0.0 if causal else pairs, pairs if causal else 0.0, 0.0, 0.0, 0.0])
        times.append(_seconds(shape, causal, at))
    for heads, kv_heads, queries, keys in FEW_QUERIES:
        rows.append([1.0, 0.0, 0.0, float(heads * queries * keys), float(kv_heads * keys), 1.0])
        times.append(_seconds(Shape(heads, kv_heads, queries, keys, size, dtype), False, at))
    counts = np.array(rows)
    found, _ = nnls(counts / np.array(times)[:, None] * 1e-9, np.ones(len(times)))
    check_fit("dense attention", counts @ found, 1e9 * np.array(times))
    launch, pair, causal, few, key, cold = (max(float(value), LEAST) for value in found)
    return Dense(
        dtype=dtype, head_dim=size, launch=launch, cold=cold, pair=pair, causal=causal, few=few, key=key,
    )  # fmt: skip


def _seconds(shape: Shape, causal: bool, at: Pace) -> float:
    one = Sample((p.causal() if causal else p.dense(),) * shape.heads, shape)
    run = one.dense()
    return statistics.median(seconds(run, one.read, 0.05, at=at) for _ in range(PASSES))
