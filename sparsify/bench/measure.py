"""Measuring side by side: one process, interleaved repeats, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sparsify.bench import gpu
from sparsify.bench.cases import Case
from sparsify.bench.check import Check, check
from sparsify.bench.cold import cold_kernels
from sparsify.bench.memory import peak_bytes
from sparsify.bench.peers import SAME, Inputs, Run, gemm_rate, peers_of
from sparsify.patterns.count import kept_by_head

GEMM = {"cpu": 2048, "cuda": 8192}  # the side, at most, of the matrix product whose rate stands for the machine's
GEMM_SECONDS = 0.5  # that it may take: where a dtype has no fast product, a smaller one tells as much
PEER_SLACK = 4  # a peer whose error is more than so many bounds has other numbers, and no ratio is told to it


@dataclass(frozen=True)
class Timing:
    """Seconds of one peer: the median of the repeats, the quartiles, and the first call (compilation included), None
    where that was not measured."""

    median: float
    low: float
    high: float
    first: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Plain data for JSON, of what was measured."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the inputs at the highest: while a peer is prepared (its mask), and in one call."""

    prepare: int
    call: int

    @property
    def peak(self) -> int:
        """The greater one."""
        return max(self.prepare, self.call)


@dataclass(frozen=True)
class Result:
    """One case measured: timings and memory by peer, why others have none, GEMM's FLOP/s, the errors. density: kept
    pairs of all length**2 pairs of a head."""

    case: Case
    timings: Mapping[str, Timing]
    failures: Mapping[str, str]
    gemm_flops: float
    density: float
    checked: Check
    memory: Mapping[str, Memory] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether the numbers are within the bound; a wrong case gets no speed."""
        return self.checked.right("sparsify")

    @property
    def flops(self) -> float:
        """Useful work: 4 * D * kept pairs."""
        return 4.0 * self.case.head_dim * self.density * self.case.heads * self.case.length**2

    @property
    def share(self) -> float:
        """Kept pairs of those that the dense peer computes: of the causal ones where the case is causal."""
        return self.density * (2 * self.case.length / (self.case.length + 1) if self.case.causal else 1)

    @property
    def rate(self) -> float | None:
        """Useful FLOP/s, or None for a wrong case."""
        return self.flops / self.timings["sparsify"].median if self.right else None

    @property
    def of_gemm(self) -> float | None:
        """The useful rate as a share of the machine's rate for matrix products, or None for a wrong case."""
        return None if self.rate is None else self.rate / self.gemm_flops

    @property
    def of_ideal(self) -> float | None:
        """The fastest dense attention's time times the share of pairs that are kept, over sparsify's time; or None."""
        ratios = [ratio for ratio in map(self.ratio, ("dense", "cudnn")) if ratio is not None]
        return min(ratios) * self.share if ratios else None

    def ratio(self, peer: str) -> float | None:
        """How many times as fast sparsify is as a peer, or None."""
        found = self.timings.get(peer)
        return None if found is None or not self.right else found.median / self.timings["sparsify"].median

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **{name: value for name, value in asdict(self.case).items() if name != "own"},
            "rule": str(self.case.rules[0]),
            "dynamic": self.case.dynamic,
            "density": self.density,
            "share": self.share,
            "error": self.checked.error["sparsify"],
            "bound": self.checked.bound,
            "checked_rows": self.checked.rows,
            "right": self.right,
            "gemm_flops": self.gemm_flops,
            "useful_flops": self.rate,
            "of_gemm": self.of_gemm,
            "of_ideal": self.of_ideal,
            "seconds": {peer: timing.as_dict() for peer, timing in self.timings.items()},
            "memory": {peer: asdict(memory) for peer, memory in self.memory.items()},
            "failures": dict(self.failures),
            "ratios": {peer: self.ratio(peer) for peer in self.timings} if self.right else {},
        }


def measure(
    case: Case, device: str, repeats: int, seconds: float, tell: Callable[[str], None], inputs: Inputs | None = None
) -> Result:
    """Prepares every peer, checks the numbers, then times all of them in turn, and last looks at their memory.

    Stops after `repeats` rounds, or after `seconds` once there are five rounds. inputs: drawn, if not given.
    """
    inputs = inputs or Inputs.draw(case, device)
    with torch.inference_mode(), cold_kernels():
        ready = _Ready(inputs, device, tell)
        tell(f"{case.name}: checking")
        found = check(inputs, {name: ready.runs[name]() for name in SAME if name in ready.runs})
        density = kept_share(inputs)
        if not found.right("sparsify"):
            return Result(case, {}, ready.failures, math.nan, density, found)
        for name in SAME[1:]:
            if name in ready.runs and found.error[name] > PEER_SLACK * found.bound + 1e-6:
                ready.drop(name, f"its numbers are wrong by {found.error[name]:.1e}")
        tell(f"{case.name}: timing")
        size = gemm_side(inputs.q.dtype, device)
        samples = interleaved(
            ready.runs | {"gemm": gemm_rate(inputs.q.dtype, device, size)}, device, repeats, seconds, True
        )
        tell(f"{case.name}: looking at memory")
        memory = {name: ready.memory(name) for name in ready.runs}
    timings = {name: timing(samples[name], ready.first[name]) for name in ready.runs}
    gemm_flops = 2.0 * size**3 / statistics.median(samples["gemm"])
    return Result(case, timings, ready.failures, gemm_flops, density, found, memory)


class _Ready:
    """The peers of a case, prepared and called once: `runs`, seconds of the `first` results, and `failures`."""

    def __init__(self, inputs: Inputs, device: str, tell: Callable[[str], None]) -> None:
        self.inputs, self.device, self.prepare = inputs, device, peers_of(inputs.case, device)
        self.runs: dict[str, Run] = {}
        self.first: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        for name, prepare in self.prepare.items():
            tell(f"{inputs.case.name}: preparing {name}")
            try:
                self.first[name], self.runs[name] = _prepared(prepare, inputs, device)
            except Exception as error:
                if name == "sparsify":
                    raise
                self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def drop(self, name: str, why: str) -> None:
        """Leaves a peer out."""
        del self.runs[name]
        self.failures[name] = why

    def memory(self, name: str) -> Memory:
        """What a peer takes, everything being compiled: its mask is built once more for that."""
        prepare = peak_bytes(lambda: self.prepare[name](self.inputs), self.device)
        return Memory(prepare, peak_bytes(self.runs[name], self.device))


def _prepared(prepare: Callable[[Inputs], Run], inputs: Inputs, device: str) -> tuple[float, Run]:
    start = time.perf_counter()
    run = prepare(inputs)
    run()
    _wait(device)
    return time.perf_counter() - start, run


def gemm_side(dtype: torch.dtype, device: str) -> int:
    """The side of the matrix product to time: the greatest power of two that is neither too large nor too slow."""
    side = 256
    while side < GEMM[device]:
        run = gemm_rate(dtype, device, side)
        run()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if 8 * (time.perf_counter() - start) > GEMM_SECONDS:
            break
        side *= 2
    return side


def kept_share(inputs: Inputs) -> float:
    """Kept pairs of all pairs."""
    case = inputs.case
    if not case.dynamic and not inputs.q.is_cuda:
        kept = sum(kept_by_head(rule.keep(), head, case.length, case.length) for head, rule in enumerate(case.rules))
        return kept / (case.heads * case.length**2)
    step = case.heads // inputs.chosen.shape[0] if case.dynamic else 1 if inputs.per_head else case.heads
    heads = torch.arange(0, case.heads, step)  # those of a list keep the same
    rows = torch.arange(case.length).split(256)
    kept = sum(int(inputs.kept(heads, some).count_nonzero()) for some in rows)
    return kept / (len(heads) * case.length**2)


def interleaved(
    runs: Mapping[str, Run], device: str, repeats: int, seconds: float, kernels: bool = False
) -> dict[str, list[float]]:
    """Seconds of every run in each round, a run warmed up before; see `measure` for when it stops.

    kernels: on a GPU, the time that the device takes, of captured calls (`bench.gpu`).
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    captured = kernels and device != "cpu"
    ready = {name: gpu.Replayed(run) if captured else run for name, run in runs.items()}
    for run in ready.values():
        run()
    begin = time.perf_counter()
    for round_number in range(repeats):
        for name, run in ready.items():
            samples[name].append(run.seconds() if isinstance(run, gpu.Replayed) else _seconds(run, device))
        if round_number >= 4 and time.perf_counter() - begin > seconds:
            break
    return samples


def _seconds(run: Run, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timing(samples: list[float], first: float | None = None) -> Timing:
    """Median and quartiles of seconds, with those of the first call if it was measured."""
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], first)
