"""`sparsify bench --decode`: one query over a long cache, beside dense SDPA and the rate at which memory is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from sparsify import patterns as p
from sparsify.bench.cases import pick
from sparsify.bench.check import compared
from sparsify.bench.measure import Timing, interleaved, timing
from sparsify.bench.report import json_path, machine, write
from sparsify.bench.tables import SHORT, new_table
from sparsify.functional import attention
from sparsify.patterns import Pattern

KEYS, HEAD_DIM, HEADS = 32768, 128, 8
READ_BYTES = 2**28  # of the tensor whose sum tells how fast memory is read: more than caches hold
STREAMING = (p.sinks(4) | p.window(1024)) & p.causal()


@dataclass(frozen=True)
class DecodeCase:
    """One query of each of `HEADS` heads, on k and v of (1, kv_heads, KEYS, HEAD_DIM)."""

    name: str
    heads: tuple[Pattern, ...]
    kv_heads: int = 2


CASES = (
    DecodeCase("streaming", (STREAMING,) * HEADS),
    DecodeCase("causal", (p.causal(),) * HEADS),
    DecodeCase("mixture", (p.causal(), *(STREAMING,) * (HEADS - 1)), kv_heads=8),
)


@dataclass(frozen=True)
class Decoded:
    """One case measured: seconds of `sparsify`, of `dense` SDPA and of reading `READ_BYTES`.

    kept: bytes of the keys and values that some head of a group keeps. error, bound: as in `sparsify bench`.
    """

    case: DecodeCase
    dtype: str
    timings: dict[str, Timing]
    kept: int
    error: float
    bound: float

    @property
    def right(self) -> bool:
        """Whether the numbers are within the bound; a wrong case gets no speed."""
        return self.error <= self.bound + 1e-7

    @property
    def of_memory(self) -> float | None:
        """The rate at which kept bytes are read, as a share of that of one large tensor; None for a wrong case."""
        seconds = {name: found.median for name, found in self.timings.items()}
        return self.kept * seconds["memory"] / (READ_BYTES * seconds["sparsify"]) if self.right else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.case.name,
            "rules": [str(rule) for rule in self.case.heads],
            "kv_heads": self.case.kv_heads,
            "keys": KEYS,
            "head_dim": HEAD_DIM,
            "dtype": self.dtype,
            "kept_bytes": self.kept,
            "error": self.error,
            "bound": self.bound,
            "right": self.right,
            "of_memory": self.of_memory,
            "seconds": {name: asdict(found) for name, found in self.timings.items()},
        }


def named(names: Sequence[str] | None) -> tuple[DecodeCase, ...]:
    """The cases of these names, or all. Raises InputError."""
    known = {case.name: case for case in CASES}
    return tuple(pick(known, names))


def measure(case: DecodeCase, dtype: str, repeats: int, seconds: float, tell: Callable[[str], None]) -> Decoded:
    """Checks the numbers, then times; what is read in between leaves no key in a cache, as the layers of a model do."""
    g, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    q, k, v = (
        torch.randn(1, heads, length, HEAD_DIM, generator=g).to(kind)
        for heads, length in ((HEADS, 1), (case.kv_heads, KEYS), (case.kv_heads, KEYS))
    )
    large = torch.ones(READ_BYTES // 4)
    runs = {
        "sparsify": lambda: attention(q, k, v, case.heads),
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=case.kv_heads != HEADS),
        "memory": large.sum,
    }
    with torch.inference_mode():
        tell(f"{case.name}: checking")
        group = HEADS // case.kv_heads
        keep = torch.stack([rule.mask(HEADS, 1, KEYS)[h] for h, rule in enumerate(case.heads)])
        whole = (t.repeat_interleave(group, dim=1) for t in (k, v))
        errors, bound = compared(q, *whole, keep, HEAD_DIM**-0.5, {"out": runs["sparsify"]()})
        pairs = int(keep.view(case.kv_heads, group, KEYS).any(1).sum())
        tell(f"{case.name}: timing")
        samples = interleaved(runs, "cpu", repeats, seconds)
    timings = {name: timing(found, statistics.median(found)) for name, found in samples.items()}
    return Decoded(case, dtype, timings, pairs * 2 * HEAD_DIM * kind.itemsize, errors["out"], bound)


def table(results: Sequence[Decoded]) -> Table:
    """One line a case: milliseconds, those of dense SDPA, the ratio, and the share of the rate of memory."""
    found = new_table(f"one query over {KEYS} keys", "ms", "dense", "ratio", "kept MB", "of memory")
    for result in results:
        mine, dense = (result.timings[name].median * 1e3 for name in ("sparsify", "dense"))
        found.add_row(
            f"{result.case.name} {HEADS}/{result.case.kv_heads} {SHORT[result.dtype]}",
            f"{mine:.2f}" if result.right else f"WRONG {result.error:.0e}",
            f"{dense:.2f}",
            f"{dense / mine:.2f}x" if result.right else "",
            f"{result.kept / 1e6:.1f}",
            "" if result.of_memory is None else f"{result.of_memory:.0%}",
        )
    return found


def write_json(results: Sequence[Decoded], path: Path) -> Path:
    """Writes machine and results."""
    about = machine("cpu")
    return write({"machine": about, "results": [result.as_dict() for result in results]},
                 json_path(path, about["machine"] + " decode"))  # fmt: skip
