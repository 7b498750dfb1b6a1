"""What an attention costs on a machine: counted from the tile program that its kernels run, without running it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sparsify.codegen.cpp import MAX_SIZE
from sparsify.codegen.target import DTYPES
from sparsify.codegen.triton.target import MAX_HEAD_DIM
from sparsify.cost.find import machine as find_machine
from sparsify.cost.machine import Machine
from sparsify.cost.nest import Shape
from sparsify.cost.result import Estimate
from sparsify.cost.site import site_of
from sparsify.cost.time import site_cost
from sparsify.errors import InputError, nearest
from sparsify.patterns import Pattern

Result = TypeVar("Result")

LONGEST = 2**24  # tokens: arrays of query tiles are made


def of_call(made: Callable[[tuple[Pattern, ...], Shape, Machine], Result]) -> Callable[..., Result]:
    """A function of patterns, their shape and a machine as one of what users say of a call, checked."""

    def given(
        patterns: Sequence[Pattern],
        *,
        kv_heads: int | None = None,
        length: int,
        head_dim: int,
        dtype: str = "float32",
        machine: Machine | str | Path | None = None,
        q_len: int | None = None,
        batch: int = 1,
    ) -> Result:
        found, queries = find_machine(machine), length if q_len is None else q_len
        if isinstance(patterns, str) or not isinstance(patterns, Sequence):
            raise InputError(f"cost: patterns: expected one pattern for each query head, found {patterns!r}")
        heads = len(patterns)
        shape = Shape(heads, heads if kv_heads is None else kv_heads, queries, length, head_dim, dtype, batch)
        check(patterns, shape)
        return made(tuple(patterns), shape, found)

    given.__name__, given.__qualname__, given.__doc__ = made.__name__, made.__qualname__, made.__doc__
    given.__module__, given.__annotations__["return"] = made.__module__, made.__annotations__["return"]
    return given


@of_call
def estimate(patterns: tuple[Pattern, ...], shape: Shape, machine: Machine) -> Estimate:
    """What one call of attention costs, for q (batch, heads, q_len, head_dim) and keys of (batch, kv_heads, length,
    head_dim).

    patterns: that of each query head. kv_heads: as many as heads, if not given. q_len: the last so many positions are
    queries; all of them (prefill) if not given, 1 is decoding. machine: as `cost.machine` takes it. Nothing is run.
    What a selection keeps is taken from its budget; where scores decide how much that is, for a quarter of what a query
    sees. Raises InputError for what doesn't fit together, as `sparsify.attention` would.
    """
    return _estimate(patterns, shape, machine)


def check(patterns: Sequence[Pattern], shape: Shape) -> None:
    """Raises InputError for patterns and sizes that do not go together."""
    if not patterns or not all(isinstance(one, Pattern) for one in patterns):
        raise InputError(f"cost: patterns: expected one pattern for each query head, found {patterns!r}")
    for name, value in (("length", shape.k_len), ("head_dim", shape.head_dim), ("batch", shape.batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"cost: {name}: expected an integer >= 1, found {value!r}")
    if shape.k_len > LONGEST:
        raise InputError(f"cost: length: expected at most {LONGEST} tokens, found {shape.k_len}")
    if not isinstance(shape.q_len, int) or not 1 <= shape.q_len <= shape.k_len:
        raise InputError(f"cost: q_len: expected an integer from 1 to the length {shape.k_len}, found {shape.q_len!r}")
    if not isinstance(shape.kv_heads, int) or shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        raise InputError(f"cost: kv_heads: {shape.heads} query heads are no multiple of {shape.kv_heads!r}")
    if not isinstance(shape.dtype, str):
        what = f"expected one of {', '.join(sorted(DTYPES))} as a string"
        raise InputError(f"cost: dtype: {what}, found {shape.dtype!r}")
    if shape.dtype not in DTYPES:
        raise InputError(f"cost: dtype: found '{shape.dtype}'; {nearest(shape.dtype, DTYPES)}")
    for one in dict.fromkeys(patterns):
        if wrong := one.fits(shape.k_len):
            raise InputError(f"cost: patterns: {wrong}")


@functools.lru_cache(maxsize=1024)
def _estimate(patterns: tuple[Pattern, ...], shape: Shape, machine: Machine) -> Estimate:
    largest = {"cpp": MAX_SIZE, "triton": MAX_HEAD_DIM}[machine.target]
    if shape.head_dim > largest:
        what = f"expected at most {largest}, as the kernels of {machine.name} have it, found {shape.head_dim}"
        raise InputError(f"cost: head_dim: {what}")
    return site_cost(site_of(patterns, shape), machine)
