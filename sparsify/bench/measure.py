"""Measuring side by side: one process, interleaved repeats, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsify.bench.cases import Case
from sparsify.bench.peers import Inputs, Run, errors, gemm_rate, peers_of
from sparsify.patterns.count import kept_by_head

GEMM = 2048


@dataclass(frozen=True)
class Timing:
    """Seconds of one peer: the median of the repeats, the quartiles, and the first call (compilation included)."""

    median: float
    low: float
    high: float
    first: float


@dataclass(frozen=True)
class Result:
    """One case measured: timings by peer, GEMM seconds, kept pairs, and sparsify's error against the oracle."""

    case: Case
    timings: Mapping[str, Timing]
    failures: Mapping[str, str]
    gemm_flops: float
    density: float
    error: float
    bound: float

    @property
    def right(self) -> bool:
        """Whether the numbers are within the bound; a wrong case gets no speed."""
        return self.error <= self.bound + 1e-7

    @property
    def flops(self) -> float:
        """Useful work: 4 * D * kept pairs."""
        return 4.0 * self.case.head_dim * self.density * self.case.heads * self.case.length**2

    def rate(self, peer: str) -> float | None:
        """Useful FLOP/s of a peer, or None if it didn't run."""
        found = self.timings.get(peer)
        return None if found is None else self.flops / found.median

    def ratio(self, peer: str) -> float | None:
        """How many times as fast sparsify is as a peer, or None."""
        found = self.timings.get(peer)
        return None if found is None or not self.right else found.median / self.timings["sparsify"].median

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **{name: value for name, value in asdict(self.case).items() if name != "own"},
            "rule": str(self.case.rules[0]),
            "density": self.density,
            "error": self.error,
            "bound": self.bound,
            "right": self.right,
            "gemm_flops": self.gemm_flops,
            "seconds": {peer: asdict(timing) for peer, timing in self.timings.items()},
            "failures": dict(self.failures),
            "ratios": {peer: self.ratio(peer) for peer in self.timings} if self.right else {},
        }


def measure(
    case: Case, device: str, repeats: int, seconds: float, tell: Callable[[str], None], inputs: Inputs | None = None
) -> Result:
    """Prepares every peer, checks sparsify's numbers, then times all of them in turn.

    Stops after `repeats` rounds, or after `seconds` once there are five rounds. inputs: drawn, if not given.
    """
    inputs = inputs or Inputs.draw(case, device)
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    failures: dict[str, str] = {}
    with torch.inference_mode():
        for name, prepare in peers_of(case).items():
            tell(f"{case.name}: preparing {name}")
            try:
                first[name], runs[name] = _prepared(prepare, inputs, device)
            except Exception as error:
                if name == "sparsify":
                    raise
                failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        tell(f"{case.name}: checking")
        error, bound = errors(inputs, runs["sparsify"])
        runs["gemm"] = gemm_rate(inputs.q.dtype, device, GEMM)
        tell(f"{case.name}: timing")
        samples = interleaved(runs, device, repeats, seconds)
    timings = {name: timing(samples[name], first[name]) for name in first}
    kept = sum(kept_by_head(rule.keep(), head, case.length, case.length) for head, rule in enumerate(case.rules))
    gemm_flops = 2.0 * GEMM**3 / statistics.median(samples["gemm"])
    return Result(case, timings, failures, gemm_flops, kept / (case.heads * case.length**2), error, bound)


def _prepared(prepare: Callable[[Inputs], Run], inputs: Inputs, device: str) -> tuple[float, Run]:
    start = time.perf_counter()
    run = prepare(inputs)
    run()
    _wait(device)
    return time.perf_counter() - start, run


def interleaved(runs: Mapping[str, Run], device: str, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every run in each round, a run warmed up before; see `measure` for when it stops."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    for round_number in range(repeats):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            samples[name].append(time.perf_counter() - start)
        if round_number >= 4 and time.perf_counter() - begin > seconds:
            break
    return samples


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timing(samples: list[float], first: float) -> Timing:
    """Median and quartiles of seconds, with those of the first call."""
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], first)
