"""Dense attention beside a pattern: what it takes, and from which length on the pattern is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.cost.estimate import estimate, of_call
from sparsify.cost.find import machine as find_machine
from sparsify.cost.machine import DECODE_BELOW, Dense, Machine
from sparsify.cost.nest import Shape
from sparsify.patterns import Pattern
from sparsify.patterns.causal import is_causal

SHORTEST, LONGEST = 32, 2**20
STEP = 2**0.25  # between lengths that are tried, before the last ones are searched


@of_call
def dense_seconds(patterns: tuple[Pattern, ...], shape: Shape, machine: Machine) -> float:
    """What `scaled_dot_product_attention` takes in place of these patterns, causal where all of them are.

    The arguments are those of `estimate`. Raises InputError as it does.
    """
    rates = machine.dense_of(shape.dtype, shape.head_dim)
    return dense_time(shape, rates, is_dense_causal(patterns, shape)) * 1e-9


def is_dense_causal(patterns: Sequence[Pattern], shape: Shape) -> bool:
    """Whether causal dense attention does what these patterns do with the pairs that they drop."""
    return 1 < shape.q_len == shape.k_len and all(is_causal(one.keep()) for one in dict.fromkeys(patterns))


def dense_time(shape: Shape, rates: Dense, causal: bool) -> float:
    """Nanoseconds, by the rates of dense attention."""
    pairs = shape.batch * shape.heads * shape.q_len * shape.k_len
    if shape.q_len < DECODE_BELOW:
        keys = shape.batch * shape.kv_heads * shape.k_len
        return rates.launch + rates.cold + rates.few * pairs + rates.key * keys
    return rates.launch + (rates.causal if causal else rates.pair) * pairs


def crossover(patterns: Sequence[Pattern], *, q_len: int | None = None, **sizes: Any) -> int | None:
    """The length N from which on the patterns are faster than dense attention; None where they never are.

    Lengths from 32 (or q_len) to 2**20 are tried. The other arguments are those of `estimate`.
    """
    sizes["machine"] = find_machine(sizes.get("machine"))  # of a name, a file is read

    def faster(length: int) -> bool:
        mine, theirs = (of(patterns, length=length, q_len=q_len, **sizes) for of in (estimate, dense_seconds))
        return mine.seconds < theirs

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
