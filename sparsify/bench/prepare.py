"""What a mask costs before the first tile runs: sparsify's closed forms beside FlexAttention's block-mask builder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sparsify.bench.cases import PATTERNS
from sparsify.bench.memory import peak_bytes
from sparsify.bench.peers import mask_mod
from sparsify.patterns import Pattern
from sparsify.patterns.tiles import analyse
from sparsify.program import Program


@dataclass(frozen=True)
class Preparation:
    """Seconds, and bytes of memory at the highest, to prepare one mask."""

    what: str
    length: int
    heads: int
    seconds: float
    peak_bytes: int


def prepare_sparsify(heads: Sequence[Pattern], length: int) -> None:
    """All that happens for a new pattern and length, but for compiling: text, parsing, tile rules, sizes."""
    Program.forget_parsed()
    analyse.cache_clear()
    program = Program.parse(Program.of([pattern.keep() for pattern in heads]).text())
    for rule in program.keep:
        analyse(rule)
    program.size_values(length)


def prepare_flex(heads: Sequence[Pattern], length: int) -> None:
    """FlexAttention's own builder, a block mask for every head."""
    from torch.nn.attention.flex_attention import create_block_mask

    create_block_mask(mask_mod(heads, length), None, len(heads), length, length, "cpu")


def measure_preparation(length: int, heads: int, flex_length: int) -> list[Preparation]:
    """Prepares the per-head mixture; FlexAttention, which needs length² bytes a head, at a length of its own."""
    rules = PATTERNS["mixture"](heads)
    jobs = (("sparsify", prepare_sparsify, length), ("flex", prepare_flex, flex_length))
    found = []
    for what, job, n in jobs:
        with torch.inference_mode():
            start = time.perf_counter()
            job(rules, n)
            seconds = time.perf_counter() - start
            found.append(Preparation(what, n, heads, seconds, peak_bytes(partial(job, rules, n))))
    return found
