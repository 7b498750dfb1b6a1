"""What a run of cases comes to, dtype by dtype: geometric means over the static ones, and the worst of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sparsify.bench.measure import Result

PEERS = ("dense", "cudnn", "full", "mask", "flex", "natten")


@dataclass(frozen=True)
class Summary:
    """One dtype. cases: the right static ones. ratios, of_gemm, of_ideal: geometric means, None without a case.

    worst: by peer, the least ratio and the case that has it. below_floor: how many of the `flex_cases`, those that
    FlexAttention ran, are below FLOOR. wrong: how many static cases have wrong numbers.
    """

    FLOOR: ClassVar[float] = 1.2

    dtype: str
    cases: int
    ratios: Mapping[str, float]
    of_gemm: float | None
    of_ideal: float | None
    worst: Mapping[str, tuple[float, str]]
    below_floor: int
    flex_cases: int
    wrong: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def summaries(results: Sequence[Result]) -> list[Summary]:
    """One for each dtype that has static cases, in order of appearance."""
    static = [result for result in results if not result.case.dynamic]
    return [
        _summary(dtype, [result for result in static if result.case.dtype == dtype])
        for dtype in dict.fromkeys(result.case.dtype for result in static)
    ]


def _summary(dtype: str, results: Sequence[Result]) -> Summary:
    right = [result for result in results if result.right]
    found = {peer: {r.case.name: ratio for r in right if (ratio := r.ratio(peer)) is not None} for peer in PEERS}
    found = {peer: ratios for peer, ratios in found.items() if ratios}
    flex = found.get("flex", {})
    return Summary(
        dtype=dtype,
        cases=len(right),
        ratios={peer: statistics.geometric_mean(ratios.values()) for peer, ratios in found.items()},
        of_gemm=_mean(r.of_gemm for r in right),
        of_ideal=_mean(r.of_ideal for r in right),
        worst={peer: min((ratio, name) for name, ratio in ratios.items()) for peer, ratios in found.items()},
        below_floor=sum(ratio < Summary.FLOOR for ratio in flex.values()),
        flex_cases=len(flex),
        wrong=len(results) - len(right),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.geometric_mean(there) if there else None
