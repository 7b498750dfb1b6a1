"""Drawn attentions, for `sparsify bench --simulate`: patterns of all kinds and sizes at lengths of all kinds."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from sparsify import patterns as p
from sparsify.cost.nest import Shape
from sparsify.cost.sample import Sample
from sparsify.patterns import Pattern

CAUSAL = p.causal()
SCOPES = ("head", "kv_group")
SHORTEST, LONGEST = 384, 8192  # keys of a prefill
CACHE = 65536  # most keys of a decode step
LEAST_KEYS = 64  # at which a pattern is compared with dense attention: with less than a tile both are all call
PAIRS = 2**27  # most pairs of all heads, so that no sample takes much longer than others


@dataclass(frozen=True)
class Crossing:
    """A pattern for all heads, to be compared with dense attention at lengths from `shortest` to `longest`; q_len: how
    many queries there are, None for all."""

    pattern: Pattern
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    q_len: int | None
    shortest: int
    longest: int

    def at(self, length: int) -> Sample:
        """The sample at one length."""
        shape = Shape(self.heads, self.kv_heads, self.q_len or length, length, self.head_dim, self.dtype)
        return Sample((self.pattern,) * self.heads, shape)


def draw_crossings(seed: int, count: int, dtypes: tuple[str, ...]) -> list[Crossing]:
    """So many of them, always the same for a seed; every third is of one query."""
    source = random.Random(seed)
    return [_crossing(source, number, source.choice(dtypes)) for number in range(count)]


def _crossing(source: random.Random, number: int, dtype: str) -> Crossing:
    head_dim, (heads, kv_heads) = source.choice((64, 128)), source.choice(((4, 4), (8, 8), (8, 2)))
    reach = _log(source, 32, 512)
    pattern = source.choice(
        (
            p.window(reach),
            (p.sinks(4) | p.window(reach)) & CAUSAL,
            p.block_window(64, 1 + reach // 64) & CAUSAL,
            p.window("N/8 + 16"),
        )
    )
    if number % 3 == 2:
        return Crossing(pattern, heads, kv_heads, head_dim, dtype, 1, 4 * LEAST_KEYS, 16384)
    return Crossing(pattern, heads, kv_heads, head_dim, dtype, None, LEAST_KEYS, 1500)


def draw(seed: int, count: int, dtypes: tuple[str, ...]) -> list[Sample]:
    """So many samples, always the same for a seed; two of seven are decode steps or other few queries."""
    source = random.Random(seed)
    return [_sample(source, number, dtypes) for number in range(count)]


def _sample(source: random.Random, number: int, dtypes: tuple[str, ...]) -> Sample:
    dtype, head_dim = source.choice(dtypes), source.choice((64, 64, 128, 128, 32, 80, 96))
    heads = source.choice((2, 4, 4, 8))
    kv_heads = source.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    if number % 7 in (2, 5):
        length, queries = _log(source, 1024, CACHE), source.choice((1, 1, 1, 2, 4, 16))
        patterns = _patterns(source, heads, length)
        return Sample(patterns, Shape(heads, kv_heads, queries, length, head_dim, dtype))
    if number % 7 == 6:
        pattern = _neighborhood(source)
        length = math.prod(pattern.arguments()["shape"])
        return Sample((pattern,) * heads, Shape(heads, kv_heads, length, length, head_dim, dtype))
    batch = source.choice((1, 1, 1, 2))
    longest = min(LONGEST, math.isqrt(PAIRS // (heads * batch)))
    length = _log(source, SHORTEST, longest)
    queries = source.choice((length, length, length, length // 3))
    return Sample(_patterns(source, heads, length), Shape(heads, kv_heads, queries, length, head_dim, dtype, batch))


def _patterns(source: random.Random, heads: int, length: int) -> tuple[Pattern, ...]:
    """One pattern for all heads, or two that are mixed."""
    kinds = [_pattern(source, length) for _ in range(source.choice((1, 1, 2)))]
    return tuple(source.choice(kinds) for _ in range(heads))


def _pattern(source: random.Random, length: int) -> Pattern:
    reach = _log(source, 16, length)
    block = source.choice((16, 32, 64, 100, 128))
    return source.choice(
        (
            lambda: CAUSAL,
            lambda: p.window(reach),
            lambda: p.window(reach, ahead=_log(source, 1, 256)),
            lambda: (p.sinks(_log(source, 1, 256)) | p.window(reach)) & CAUSAL,
            lambda: p.block_window(block, max(1, reach // block)) & CAUSAL,
            lambda: (p.window(reach) | p.column_stride(source.randint(2, 12), block=block)) & CAUSAL,
            lambda: p.same_block(reach) & CAUSAL,
            lambda: p.dilated(source.randint(2, 9)) & p.window(reach),
            lambda: p.topk(source.randint(2, 12), unit=source.choice((16, 64)), scope=source.choice(SCOPES)) & CAUSAL,
            lambda: (p.global_tokens(f"0-{_log(source, 1, 100)}") | p.window(reach)) & CAUSAL,
        )
    )()


def _neighborhood(source: random.Random) -> Pattern:
    shape = [source.randint(16, 72) for _ in range(2)]
    if source.random() < 0.3:
        shape = [source.randint(3, 8), source.randint(10, 24), source.randint(10, 24)]
    window = [source.randint(3, max(3, side // 2)) for side in shape]
    return p.neighborhood(shape, window, stride=1 if source.random() < 0.6 else [source.randint(1, w) for w in window])


def _log(source: random.Random, low: int, high: int) -> int:
    """A number between two, small ones as likely as large ones."""
    return round(math.exp(source.uniform(math.log(low), math.log(max(low, high)))))
