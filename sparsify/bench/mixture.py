"""`sparsify bench --mixture`: unlike heads in one site beside each of them measured alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from sparsify.bench.cases import PATTERNS
from sparsify.bench.check import Check, check
from sparsify.bench.measure import Timing, interleaved, timing
from sparsify.bench.peers import Inputs
from sparsify.bench.tables import SHORT, new_table, short
from sparsify.functional import attention

HEADS = 8
TOGETHER = "together"


@dataclass(frozen=True)
class Parts:
    """A site of unlike heads, measured: seconds of all heads in one call, and of a call for each head.

    checked: the numbers of both ways beside float64.
    """

    inputs: Inputs
    timings: dict[str, Timing]
    checked: Check

    @property
    def right(self) -> bool:
        """Whether the numbers are within the bound; a wrong case gets no speed."""
        return self.checked.right(TOGETHER) and self.checked.right("apart")

    @property
    def apart(self) -> float:
        """Seconds of all calls of single heads."""
        return sum(found.median for name, found in self.timings.items() if name != TOGETHER)

    @property
    def ratio(self) -> float | None:
        """Seconds of the one call over those of its parts, or None for a wrong case."""
        return self.timings[TOGETHER].median / self.apart if self.right else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        case = self.inputs.case
        return {
            "rules": [str(rule) for rule in case.rules],
            **{name: getattr(case, name) for name in ("length", "head_dim", "dtype", "heads", "kv_heads")},
            "error": dict(self.checked.error),
            "bound": self.checked.bound,
            "right": self.right,
            "of_parts": self.ratio,
            "seconds": {name: found.as_dict() for name, found in self.timings.items()},
        }


def measure(inputs: Inputs, repeats: int, seconds: float, tell: Callable[[str], None]) -> Parts:
    """Checks the numbers, then times the one call and those of its heads in turn."""
    case, (q, k, v) = inputs.case, (inputs.q, inputs.k, inputs.v)
    group = case.heads // case.kv_heads

    def alone(head: int) -> Callable[[], torch.Tensor]:
        kv = head // group
        mine = q[:, head : head + 1], k[:, kv : kv + 1], v[:, kv : kv + 1]
        return lambda: attention(*mine, case.rules[head])

    runs = {TOGETHER: lambda: attention(q, k, v, case.rules)} | {f"head {h}": alone(h) for h in range(case.heads)}
    with torch.inference_mode():
        tell(f"{case.name}: checking")
        made = {name: run() for name, run in runs.items()}
        parts = torch.cat([out for name, out in made.items() if name != TOGETHER], dim=1)
        found = check(inputs, {TOGETHER: made[TOGETHER], "apart": parts})
        tell(f"{case.name}: timing")
        samples = interleaved(runs, "cpu", repeats, seconds)
    return Parts(inputs, {name: timing(taken) for name, taken in samples.items()}, found)


def table(results: Sequence[Parts]) -> Table:
    """One line a case: milliseconds of one call, of its parts together, and the ratio of the two."""
    found = new_table(
        f"{HEADS} unlike heads: {len(set(PATTERNS['mixture'](HEADS)))} patterns", "ms", "parts", "of parts"
    )
    for result in results:
        case = result.inputs.case
        found.add_row(
            f"{SHORT[case.dtype]} D{case.head_dim} H{case.heads}/{case.kv_heads} {case.length}",
            short(result.timings[TOGETHER].median * 1e3)
            if result.right
            else f"WRONG {result.checked.error[TOGETHER]:.0e}",
            short(result.apart * 1e3),
            "" if result.ratio is None else f"{result.ratio:.2f}",
        )
    return found
