"""`sparsify bench --selection`: what choosing keys costs and what it saves, beside dense SDPA."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from sparsify import patterns as p
from sparsify.bench.cases import pick
from sparsify.bench.check import compared, within
from sparsify.bench.choice import Choice
from sparsify.bench.measure import Timing, interleaved, timing
from sparsify.bench.tables import SHORT
from sparsify.codegen.oracle import environment
from sparsify.codegen.target import Launch
from sparsify.patterns import Pattern
from sparsify.program import Program
from sparsify.walk import evaluate

ROWS = 64  # queries that are compared with the oracle, for which a whole float64 score matrix would be too large


@dataclass(frozen=True)
class SelectionCase:
    """A selection on q (1, heads, queries, D) and k, v (1, kv_heads, keys, D)."""

    name: str
    about: str
    pattern: Pattern
    queries: int
    keys: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64


QUARTER = {"rule": "ratio", "value": 0.25}
MEAN = {"qview": "mean", "kview": "mean"}
CASES = (
    SelectionCase(
        "blocks",
        "a quarter of the 64-blocks, by block means",
        p.select(QUARTER, {"q": 64, "k": 64}, MEAN, {"scope": "head"}, {"sink": 1, "local": 1, "counted": True})
        & p.causal(),
        16384,
        16384,
    ),
    SelectionCase(
        "strided",
        "a quarter of the 128-blocks, by anti-diagonals of stride 16",
        p.select(
            QUARTER,
            {"q": 128, "k": 128},
            {"kview": "strided(16)", "norm": "softmax"},
            {"scope": "head"},
            {"sink": 1, "local": 1, "counted": True},
        )
        & p.causal(),
        16384,
        16384,
    ),
    SelectionCase(
        "pages",
        "64 pages of 16 by their bounds, for one query",
        p.topk(64, unit=16, score="minmax_bound"),
        1,
        32768,
        kv_heads=2,
        head_dim=128,
    ),
    SelectionCase(
        "tokens",
        "the best 1024 tokens, for one query",
        p.topk(1024, unit=1, score="token"),
        1,
        32768,
        kv_heads=2,
        head_dim=128,
    ),
)


@dataclass(frozen=True)
class Selected:
    """One case measured: seconds of the whole, of the choice, of the attention over it, and of dense SDPA.

    share: kept pairs of those that a causal model has. error, bound: as in `sparsify bench`, on some of the queries.
    """

    case: SelectionCase
    dtype: str
    timings: dict[str, Timing]
    share: float
    error: float
    bound: float

    @property
    def right(self) -> bool:
        """Whether the numbers are within the bound; a wrong case gets no speed."""
        return within(self.error, self.bound)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as dense SDPA, selection included, or None for a wrong case."""
        return self.timings["dense"].median / self.timings["whole"].median if self.right else None

    @property
    def choosing(self) -> float:
        """The selection's share of the time."""
        return self.timings["select"].median / (self.timings["select"].median + self.timings["attend"].median)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        case = {name: value for name, value in asdict(replace(self.case, pattern=None)).items() if name != "pattern"}
        return {
            **case,
            "pattern": str(self.case.pattern),
            "dtype": self.dtype,
            "share": self.share,
            "error": self.error,
            "bound": self.bound,
            "right": self.right,
            "ratio": self.ratio,
            "selection_share": self.choosing,
            "seconds": {name: found.as_dict() for name, found in self.timings.items()},
        }


def named(names: Sequence[str] | None) -> tuple[SelectionCase, ...]:
    """The cases of these names, or all. Raises InputError."""
    known = {case.name: case for case in CASES}
    return tuple(pick(known, names))


def measure(case: SelectionCase, dtype: str, repeats: int, seconds: float, tell: Callable[[str], None]) -> Selected:
    """Compiles the selection, checks the attention over what it chose, and times both beside dense SDPA."""
    g, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    q, k, v = (
        torch.randn(1, heads, length, case.head_dim, generator=g).to(kind)
        for heads, length in ((case.heads, case.queries), (case.kv_heads, case.keys), (case.kv_heads, case.keys))
    )
    choice = Choice.of((case.pattern,) * case.heads, q, k)
    tell(f"{case.name}: compiling the selection")
    with torch.inference_mode():
        lists = choice.choose(q, k)
        gqa, causal = case.heads != case.kv_heads, case.queries > 1
        runs = {
            "whole": lambda: choice.attend(q, k, v, choice.choose(q, k)),
            "select": lambda: choice.choose(q, k)[0],
            "attend": lambda: choice.attend(q, k, v, lists),
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa),
        }
        tell(f"{case.name}: checking")
        offset, scale = case.keys - case.queries, case.head_dim**-0.5
        launch = Launch(Program.parse(choice.text), q, k, v, tuple(lists), offset, scale)
        share, error, bound = _checked(launch, runs["whole"]())
        tell(f"{case.name}: timing")
        samples = interleaved(runs, "cpu", repeats, seconds)
    timings = {name: timing(found) for name, found in samples.items()}
    return Selected(case, dtype, timings, share, error, bound)


def _checked(launch: Launch, out: torch.Tensor) -> tuple[float, float, float]:
    """(share of kept pairs, error, bound) on queries drawn from all rows, one at a time."""
    q, group = launch.q, launch.q.shape[1] // launch.k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (launch.k, launch.v))
    rows = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(1))[:ROWS].sort().values
    shares, worst, allowed = [], 0.0, 0.0
    for row in rows.tolist():
        keep = _kept_row(launch, row)
        one, mine = q[:, :, row : row + 1], {"out": out[:, :, row : row + 1]}
        errors, bound = compared(one, k, v, keep[0], launch.scale, mine)
        worst, allowed = max(worst, errors["out"]), max(allowed, bound)
        shares.append(float(keep.sum() / (keep.shape[1] * (row + launch.q_offset + 1))))
    return statistics.mean(shares), worst, allowed


def _kept_row(launch: Launch, row: int) -> torch.Tensor:
    """What one query keeps: bool (1, H, 1, Nk), from the program's predicate and lists."""
    env = environment(launch) | {"q": torch.tensor([[row + launch.q_offset]])}
    (rule,) = launch.program.keep
    return torch.as_tensor(evaluate(rule, env)).expand(1, launch.q.shape[1], 1, launch.k.shape[2])


def table(results: Sequence[Selected]) -> Table:
    """One line a case: milliseconds, the ratio to dense SDPA, the selection's share of the time, kept pairs."""
    found = Table(title="selection and attention beside dense SDPA (medians of interleaved repeats)")
    found.title_justify = "left"
    for column in ("case", "ms", "dense", "ratio", "choosing", "kept"):
        found.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for result in results:
        whole, dense = (result.timings[name].median * 1e3 for name in ("whole", "dense"))
        found.add_row(
            f"{result.case.name} {result.case.queries}x{result.case.keys} {SHORT[result.dtype]}",
            f"{whole:.2f}" if result.right else f"WRONG {result.error:.0e}",
            f"{dense:.2f}",
            "" if result.ratio is None else f"{result.ratio:.2f}x",
            f"{result.choosing:.0%}",
            f"{result.share:.1%}",
        )
    return found
