"""`sparsify bench --simulate`: what the simulator predicts beside what is measured, on drawn patterns and shapes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from scipy.stats import spearmanr

from sparsify import patterns as p
from sparsify.bench.draws import Crossing
from sparsify.bench.tables import SHORT, new_table, short
from sparsify.cost import Machine, crossover, estimate
from sparsify.cost import sample as samples
from sparsify.cost.sample import Sample, seconds
from sparsify.progress import Bar

MEDIAN, NINETIETH, RANKS, FACTOR = 0.12, 0.30, 0.97, 1.5  # what a calibrated machine is to keep
STEP = 2**0.5  # between the lengths at which a pattern and dense attention are timed
BUDGET, TURNS = 0.07, 3  # seconds for timing one thing, and how often: the median counts, as in calibration
DENSE = p.dense()
FASTER = 3  # lengths in a row at which a pattern is faster end the search


@dataclass(frozen=True)
class Predicted:
    """A sample with its measured and its predicted seconds, both at the pace at which the machine was calibrated."""

    sample: Sample
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to what was measured, below 0 where too little was predicted."""
        return self.predicted / self.measured - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self.sample.shape),
            "patterns": list(map(str, self.sample.patterns)),
            "measured": self.measured,
            "predicted": self.predicted,
            "error": self.error,
        }


@dataclass(frozen=True)
class Crossed:
    """The length from which on a pattern is faster than dense attention, measured and predicted; None for never."""

    crossing: Crossing
    measured: float | None
    predicted: int | None

    @property
    def factor(self) -> float:
        """How many times too long or too short the prediction is."""
        if self.measured is None or self.predicted is None:
            return 1.0 if self.measured == self.predicted else math.inf
        return max(self.predicted / self.measured, self.measured / self.predicted)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        case = {name: value for name, value in vars(self.crossing).items() if name != "pattern"}
        found = {"measured": self.measured, "predicted": self.predicted, "factor": self.factor}
        return {**case, "pattern": str(self.crossing.pattern), **found}


@dataclass(frozen=True)
class Accuracy:
    """What all samples come to: quantiles of the errors' sizes, the rank correlation, and the worst crossover."""

    median: float
    ninetieth: float
    ranks: float
    factor: float

    @classmethod
    def of(cls, found: Sequence[Predicted], crossed: Sequence[Crossed]) -> Accuracy:
        errors = sorted(abs(one.error) for one in found)
        ranks = float(spearmanr([one.measured for one in found], [one.predicted for one in found]).statistic)
        place = math.ceil(0.9 * len(errors)) - 1
        worst = max((one.factor for one in crossed), default=1.0)
        return cls(statistics.median(errors), errors[place], ranks, worst)

    @property
    def holds(self) -> bool:
        """Whether it is as good as a calibrated machine's is to be."""
        within = self.median <= MEDIAN and self.ninetieth <= NINETIETH and self.factor <= FACTOR
        return within and self.ranks >= RANKS

    def __str__(self) -> str:
        return (
            f"error: median {self.median:.1%} (at most {MEDIAN:.0%}), 90th percentile {self.ninetieth:.1%}"
            f" ({NINETIETH:.0%}); rank correlation {self.ranks:.4f} (at least {RANKS}); worst crossover within a factor"
            f" of {self.factor:.2f} ({FACTOR})"
        )


def build(jobs: Sequence[Sample | Crossing]) -> None:
    """Builds the kernels of all jobs."""
    with Bar([1.0] * len(jobs)) as steps, torch.inference_mode():
        steps.tell("building kernels")

        def tell(done: int) -> None:
            while steps.done < done:
                steps.advance()

        samples.build([one.at(one.shortest) if isinstance(one, Crossing) else one for one in jobs], tell)


def measured(job: Sample | Crossing, given: Machine, tell: Callable[[str], None]) -> Predicted | Crossed:
    """Times one sample and predicts it, or a crossover. Keys are chosen before, so choosing is in neither."""
    if isinstance(job, Crossing):
        return _cross(job, given, tell)
    shape = job.shape
    tell(f"{shape.q_len} x {shape.k_len}, {job.patterns[0]}")
    with torch.inference_mode():
        run = job.run()
    times = [seconds(run, job.read, BUDGET, at=given.pace) for _ in range(TURNS)]
    return Predicted(job, statistics.median(times), _predicted(job, given))


def _predicted(sample: Sample, given: Machine) -> float:
    shape = sample.shape
    found = estimate(
        sample.patterns, kv_heads=shape.kv_heads, length=shape.k_len, head_dim=shape.head_dim, dtype=shape.dtype,
        machine=given, q_len=shape.q_len, batch=shape.batch,
    )  # fmt: skip
    return found.seconds - found.select_seconds


def _cross(crossing: Crossing, given: Machine, tell: Callable[[str], None]) -> Crossed:
    """Finds where a pattern becomes faster than dense attention, by timing both at lengths that grow."""
    predicted = crossover(
        (crossing.pattern,) * crossing.heads, kv_heads=crossing.kv_heads, head_dim=crossing.head_dim,
        dtype=crossing.dtype, machine=given, q_len=crossing.q_len,
    )  # fmt: skip
    ratios: list[tuple[int, float]] = []
    for length in _lengths(crossing):
        tell(f"{crossing.pattern} at {length}")
        sample = crossing.at(length)
        with torch.inference_mode():
            dense = Sample((DENSE,) * crossing.heads, sample.shape)
            runs = (sample.run(), sample.read), (sample.dense(), dense.read)
            pair = [seconds(run, read, BUDGET, at=given.pace) for run, read in runs]
        ratios.append((length, pair[0] / pair[1]))
        if len(ratios) >= FASTER and all(ratio < 1 for _, ratio in ratios[-FASTER:]):
            break
    known = None if predicted is None else max(predicted, crossing.shortest)  # where measuring begins
    return Crossed(crossing, _crossed(ratios), known)


def _lengths(crossing: Crossing) -> list[int]:
    count = int(math.log(crossing.longest / crossing.shortest, STEP)) + 1
    return [round(crossing.shortest * STEP**i) for i in range(count)]


def _crossed(ratios: Sequence[tuple[int, float]]) -> float | None:
    """Where the ratio last comes below 1, between two lengths by a line through logarithms."""
    slower = [i for i, (_, ratio) in enumerate(ratios) if ratio >= 1]
    if not slower:
        return float(ratios[0][0])
    if slower[-1] == len(ratios) - 1:
        return None
    (low, above), (high, below) = ratios[slower[-1]], ratios[slower[-1] + 1]
    part = math.log(above) / (math.log(above) - math.log(below))
    return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))


def table(results: Sequence[Predicted]) -> Table:
    """One line a sample: milliseconds measured and predicted, and the error."""
    found = new_table("predicted beside measured", "ms", "predicted", "error", first="queries x keys, heads, D")
    found.add_column("patterns")
    for one in results:
        shape = one.sample.shape
        sizes = f"{shape.q_len}x{shape.k_len} {shape.heads}/{shape.kv_heads} {shape.head_dim} {SHORT[shape.dtype]}"
        sizes += f" B{shape.batch}" if shape.batch > 1 else ""
        kinds = "; ".join(map(str, dict.fromkeys(one.sample.patterns)))
        found.add_row(sizes, short(one.measured * 1e3), short(one.predicted * 1e3), f"{one.error:+.0%}", kinds)
    return found


def crossover_table(results: Sequence[Crossed]) -> Table:
    """One line a pattern: the length from which on it is faster than dense attention."""
    found = new_table("faster than dense attention from this length on", "measured", "predicted", "factor")
    for one in results:
        case = one.crossing
        name = f"{case.pattern} {case.heads}/{case.kv_heads} {case.head_dim} {SHORT[case.dtype]}"
        name += "" if case.q_len is None else f", {case.q_len} query"
        lengths = ["never" if n is None else f"{n:.0f}" for n in (one.measured, one.predicted)]
        found.add_row(name, *lengths, f"{one.factor:.2f}")
    return found
