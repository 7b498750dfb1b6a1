"""Dense attention beside a pattern: what it takes, and from which length on the pattern is faster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsify.cost.estimate import check, estimate
from sparsify.cost.find import machine as find_machine
from sparsify.cost.machine import FEW, Dense, Machine
from sparsify.cost.nest import Shape
from sparsify.patterns import Pattern
from sparsify.patterns.causal import is_causal

SHORTEST, LONGEST = 32, 2**20
STEP = 2**0.25  # between lengths that are tried, before the last ones are searched


def dense_seconds(
    patterns: Sequence[Pattern],
    *,
    kv_heads: int | None = None,
    length: int,
    head_dim: int,
    dtype: str = "float32",
    machine: Machine | str | Path | None = None,
    q_len: int | None = None,
    batch: int = 1,
) -> float:
    """What `scaled_dot_product_attention` takes in place of these patterns, causal where all of them are.

    The arguments are those of `estimate`. Raises InputError as it does.
    """
    heads = len(patterns)
    queries = length if q_len is None else q_len
    shape = Shape(heads, heads if kv_heads is None else kv_heads, queries, length, head_dim, dtype, batch)
    check(patterns, shape)
    rates = find_machine(machine).dense_of(dtype, head_dim)
    return dense_time(shape, rates, is_dense_causal(patterns, shape)) * 1e-9


def is_dense_causal(patterns: Sequence[Pattern], shape: Shape) -> bool:
    """Whether causal dense attention does what these patterns do with the pairs that they drop."""
    return 1 < shape.q_len == shape.k_len and all(is_causal(one.keep()) for one in dict.fromkeys(patterns))


def dense_time(shape: Shape, rates: Dense, causal: bool) -> float:
    """Nanoseconds, by the rates of dense attention."""
    pairs = shape.batch * shape.heads * shape.q_len * shape.k_len
    if shape.q_len < FEW:
        return rates.launch + rates.few * pairs + rates.key * shape.batch * shape.kv_heads * shape.k_len
    return rates.launch + (rates.causal if causal else rates.pair) * pairs


def crossover(
    patterns: Sequence[Pattern],
    *,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: str = "float32",
    machine: Machine | str | Path | None = None,
    q_len: int | None = None,
    batch: int = 1,
) -> int | None:
    """The length N from which on the patterns are faster than dense attention; None where they never are.

    Lengths from 32 (or q_len) to 2**20 are tried. The arguments are those of `estimate`.
    """
    given = find_machine(machine)

    def faster(length: int) -> bool:
        sizes = {"kv_heads": kv_heads, "length": length, "head_dim": head_dim, "dtype": dtype, "batch": batch}
        found = estimate(patterns, machine=given, q_len=q_len, **sizes)  # type: ignore[arg-type]
        return found.seconds < dense_seconds(patterns, machine=given, q_len=q_len, **sizes)  # type: ignore[arg-type]

    low, high = max(SHORTEST, q_len or 0), LONGEST
    if not faster(high):
        return None
    while high > low and faster(max(low, int(high / STEP))):
        high = max(low, int(high / STEP))
    low = max(low, int(high / STEP))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high
