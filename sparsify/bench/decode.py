"""`sparsify bench --decode`: one query over a long cache, layer after layer and alone, beside dense SDPA, the rate at
which memory is read, and a sum of as many bytes as are kept, which starts as cold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from sparsify import patterns as p
from sparsify.bench.cases import pick
from sparsify.bench.check import compared, within
from sparsify.bench.measure import Timing, interleaved, timing
from sparsify.bench.tables import SHORT, new_table
from sparsify.functional import attention
from sparsify.patterns import Pattern

KEYS, HEAD_DIM = 32768, 128
STREAMING = (p.sinks(4) | p.window(1024)) & p.causal()


@dataclass(frozen=True)
class Size:
    """How much is measured on a kind of device: sequences, query heads, and the bytes of the tensor whose sum tells how
    fast memory is read (more than caches hold).

    layers: at most how many caches are gone through in a row, as in a model; times are of one. cache_bytes: that these
    may take together; another cache, and as many bytes as are kept of each, come on top.
    """

    batch: int
    heads: int
    read_bytes: int
    layers: int
    cache_bytes: int

    def layers_of(self, bytes_of_one: int) -> int:
        """How many caches are gone through, each of so many bytes."""
        return max(1, min(self.layers, self.cache_bytes // bytes_of_one))


SIZES = {"cpu": Size(1, 8, 2**28, 16, 2**30), "cuda": Size(8, 32, 2**31, 4, 2**35)}


@dataclass(frozen=True)
class DecodeCase:
    """One query of each head, on keys and values that `group` heads share; the pattern of every head."""

    name: str
    rules: Callable[[int], tuple[Pattern, ...]]
    group: int = 4


CASES = (
    DecodeCase("streaming", lambda heads: (STREAMING,) * heads),
    DecodeCase("causal", lambda heads: (p.causal(),) * heads),
    DecodeCase("mixture", lambda heads: (p.causal(), *(STREAMING,) * 7) * (heads // 8), group=1),
)


@dataclass(frozen=True)
class Decoded:
    """One case measured: seconds of `sparsify`, of `dense` SDPA, of reading as many bytes as `size` says (`memory`) and
    as many as are kept (`read`), and of one call `alone`, on another cache, after a read that left nothing of its code
    and PyTorch's in the processor's caches.

    layers: how many calls in a row the other times are shares of; `memory` and `alone` are whole. kept: bytes of the
    keys and values that some head of a group keeps. error, bound: as in `sparsify bench`.
    """

    case: DecodeCase
    size: Size
    layers: int
    dtype: str
    timings: dict[str, Timing]
    kept: int
    error: float
    bound: float

    @property
    def right(self) -> bool:
        """Whether the numbers are within the bound; a wrong case gets no speed."""
        return within(self.error, self.bound)

    @property
    def of_memory(self) -> float | None:
        """The rate at which kept bytes are read, as a share of that of one large tensor; None for a wrong case."""
        seconds = self._seconds
        return self.kept * seconds["memory"] / (self.size.read_bytes * seconds["sparsify"]) if self.right else None

    @property
    def of_read(self) -> float | None:
        """How long a sum of as many bytes takes, as a share of the time; None for a wrong case."""
        return self._seconds["read"] / self._seconds["sparsify"] if self.right else None

    @property
    def _seconds(self) -> dict[str, float]:
        return {name: found.median for name, found in self.timings.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.case.name,
            "rules": [str(rule) for rule in self.case.rules(self.size.heads)],
            "batch": self.size.batch,
            "layers": self.layers,
            "kv_heads": self.size.heads // self.case.group,
            "keys": KEYS,
            "head_dim": HEAD_DIM,
            "dtype": self.dtype,
            "kept_bytes": self.kept,
            "error": self.error,
            "bound": self.bound,
            "right": self.right,
            "of_memory": self.of_memory,
            "of_read": self.of_read,
            "seconds": {name: found.as_dict() for name, found in self.timings.items()},
        }


def named(names: Sequence[str] | None) -> tuple[DecodeCase, ...]:
    """The cases of these names, or all. Raises InputError."""
    known = {case.name: case for case in CASES}
    return tuple(pick(known, names))


def measure(
    case: DecodeCase, dtype: str, device: str, repeats: int, seconds: float, tell: Callable[[str], None]
) -> Decoded:
    """Checks the numbers, then times; what is read in between, other caches or a large tensor, takes the keys' place in
    the processor's caches, as the layers of a model do."""
    size, kind = SIZES[device], getattr(torch, dtype)
    rules, shape = case.rules(size.heads), (size.batch, size.heads // case.group)
    g = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEAD_DIM, generator=g, device=device, dtype=kind)

    layers = size.layers_of(2 * math.prod(shape) * KEYS * HEAD_DIM * kind.itemsize)
    q, caches = drawn(size.batch, size.heads, 1), [[drawn(*shape, KEYS) for _ in "kv"] for _ in range(1 + layers)]
    large = torch.ones(size.read_bytes // 4, device=device)
    keep = torch.stack([rule.mask(size.heads, 1, KEYS)[h] for h, rule in enumerate(rules)])
    pairs = size.batch * int(keep.view(shape[1], case.group, KEYS).any(1).sum())
    kept = pairs * 2 * HEAD_DIM * kind.itemsize
    as_many = [torch.ones(kept // 4, device=device) for _ in range(layers)]
    caches, other = caches[1:], caches[0]
    runs = {  # `memory` after `dense`: what that wrote is written back before ours is timed
        "dense": lambda: [F.scaled_dot_product_attention(q, k, v, enable_gqa=case.group > 1) for k, v in caches],
        "memory": large.sum,
        "alone": lambda: [attention(q, *other, rules)],
        "sparsify": lambda: [attention(q, k, v, rules) for k, v in caches],
        "read": lambda: [one.sum() for one in as_many],
    }
    with torch.inference_mode():
        tell(f"{case.name}: checking")
        whole = (t.repeat_interleave(case.group, dim=1) for t in caches[0])
        errors, bound = compared(q, *whole, keep.to(device), HEAD_DIM**-0.5, {"out": runs["sparsify"]()[0]})
        tell(f"{case.name}: timing")
        samples = interleaved(runs, device, repeats, seconds, True)
    samples |= {name: [one / layers for one in samples[name]] for name in ("sparsify", "dense", "read")}
    timings = {name: timing(found) for name, found in samples.items()}
    return Decoded(case, size, layers, dtype, timings, kept, errors["out"], bound)


def table(results: Sequence[Decoded]) -> Table:
    """One line a case: milliseconds, those of a call alone and of dense SDPA, the ratio, the share of the rate of
    memory, and how long a sum of as many bytes takes, as a share of the time."""
    found = new_table(f"one query over {KEYS} keys", "ms", "alone", "dense", "ratio", "kept MB", "of memory", "of read")
    for result in results:
        mine, alone, dense = (result.timings[name].median * 1e3 for name in ("sparsify", "alone", "dense"))
        found.add_row(
            f"{result.case.name} {result.size.heads}/{result.size.heads // result.case.group} {SHORT[result.dtype]}",
            f"{mine:.3f}" if result.right else f"WRONG {result.error:.0e}",
            f"{alone:.3f}" if result.right else "",
            f"{dense:.3f}",
            f"{dense / mine:.2f}x" if result.right else "",
            f"{result.kept / 1e6:.1f}",
            "" if result.of_memory is None else f"{result.of_memory:.0%}",
            "" if result.of_read is None else f"{result.of_read:.0%}",
        )
    return found
