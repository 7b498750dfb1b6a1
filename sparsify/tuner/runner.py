"""Runs candidates: builds, checks and times them. It lives in a child process, which a candidate may take with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from sparsify.bench import gpu
from sparsify.codegen import target
from sparsify.codegen.target import Launch
from sparsify.runtime import tuned
from sparsify.tuner.jobs import read
from sparsify.tuner.judge import Race, hopeless
from sparsify.tuner.targets import Values
from sparsify.tuner.truth import Truth

FEWEST = 5  # rounds
ROUND_SECONDS, MOST = 0.005, 100  # of one side, about: a short kernel runs many times, but no more often than that


class Runner:
    """Of one job at a time."""

    def open(self, path: Path) -> None:
        """Takes up a job. What is right is computed when a candidate is first checked."""
        self.launches = read(path)
        self.truths: list[Truth] = []

    def build(self, values: Values) -> None:
        """Builds what a candidate needs, and runs it. Raises BuildError and InputError."""
        for launch in self.launches:
            _run(launch, values)

    def check(self, values: Values) -> tuple[float, float]:
        """(error, bound), of the launch where the error is the largest part of its bound."""
        if not self.truths:
            with torch.inference_mode():
                self.truths = [Truth.of(launch, lambda launch: _run(launch, {})) for launch in self.launches]
        found = [(truth.error(_run(truth.launch, values)), truth.bound) for truth in self.truths]
        return max(found, key=lambda pair: pair[0] / pair[1])

    def race(self, values: Values, against: Values, rounds: int, seconds: float) -> Race:
        """Times a candidate and another one in turns, who begins in turns, too.

        Stops after `rounds`, or when the time is over, or when the candidate can't win any more; five rounds at least.
        """
        times: tuple[list[float], list[float]] = ([], [])
        for side in (values, against):
            self.build(side)
        sides = Side(self.launches, values), Side(self.launches, against)
        again = sides[1].repeats()
        begin = time.perf_counter()
        for number in range(rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                times[side].append(sum(sides[side].seconds() for _ in range(again)) / again)
            if number + 1 >= FEWEST:
                late = time.perf_counter() - begin > seconds
                if late or hopeless([a / b for a, b in zip(*times, strict=True)]):
                    break
        return Race(*map(tuple, times))

    def seconds(self, values: Values) -> float:
        """Seconds of all launches together."""
        return Side(self.launches, values).seconds()


class Side:
    """A candidate's launches, ready to be timed: on a GPU as graphs that are captured once, so that a time is that of
    the kernels and not of the Python around them."""

    def __init__(self, launches: Sequence[Launch], values: Values) -> None:
        self.values = values
        with tuned.forced(values), torch.inference_mode():
            self.calls = [_call(launch) for launch in launches]

    def repeats(self) -> int:
        """How often a round runs it: a short one many times; on a GPU `bench.gpu` repeats by itself."""
        if any(isinstance(call, gpu.Replayed) for call in self.calls):
            return 1
        return max(1, min(MOST, int(ROUND_SECONDS / self.seconds())))

    def seconds(self) -> float:
        """Of all launches together, each once; on a GPU by events on the device, the mean of short ones in a row."""
        with tuned.forced(self.values), torch.inference_mode():
            return sum(call.seconds() if isinstance(call, gpu.Replayed) else _seconds(call) for call in self.calls)


def _call(launch: Launch) -> Callable[[], object]:
    call = partial(target(launch.program.target).run, launch)
    return gpu.Replayed(call) if launch.q.is_cuda else call


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _run(launch: Launch, values: Values) -> torch.Tensor:
    with tuned.forced(values), torch.inference_mode():
        out = target(launch.program.target).run(launch)
        _wait(launch)
        return out


def _wait(launch: Launch) -> None:
    if launch.q.is_cuda:
        torch.cuda.synchronize(launch.q.device)
