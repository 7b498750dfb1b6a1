"""Runners for the tests of the tuner: made-up kernels whose times, errors and ends are known."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from sparsify.errors import BuildError
from sparsify.tuner.judge import Race

# What a field's value does to the time of one second; "tile" 8 is the best, and the default is 4.
FACTORS = {"tile": {4: 1.0, 8: 0.8, 16: 0.9, 32: 1.2}, "stages": {1: 1.0, 2: 0.95, 3: 1.0}}
DEFAULT = {"tile": 4, "stages": 1}
GROUPS = [[{"tile": 16}, {"tile": 8}, {"tile": 32}], [{"stages": 2}, {"stages": 3}]]
NOISE = (1.0, 1.002, 0.998, 1.001, 0.999)
ASKED = "asked"  # a file in the job's folder: a line for each race


class Runner:
    """Times by `FACTORS`. Values of `tile` from 100 on go wrong: 100 crashes, 101 hangs, 102 has wrong numbers, 103
    doesn't build, 104 is lost while it is timed."""

    def open(self, path: Path) -> None:
        self.path = path

    def seconds(self, values: dict) -> float:
        found = 1.0
        for name, value in values.items():
            found *= FACTORS[name].get(value, 0.5)
        return found

    def build(self, values: dict) -> None:
        tile = values.get("tile")
        if tile == 100:
            os.kill(os.getpid(), signal.SIGSEGV)
        if tile == 101:
            time.sleep(60)
        if tile == 103:
            raise BuildError("kernel x: the compiler failed")

    def check(self, values: dict) -> tuple[float, float]:
        return (1.0 if values.get("tile") == 102 else 1e-7), 1e-6

    def race(self, values: dict, against: dict, rounds: int, seconds: float) -> Race:
        if values.get("tile") == 104:
            os._exit(3)
        with (self.path.parent / ASKED).open("a") as file:
            file.write(f"{values} {against}\n")
        first, second = self.seconds(values), self.seconds(against)
        return Race(tuple(first * noise for noise in NOISE), (second,) * len(NOISE))


class Here:
    """A child that is this process."""

    def __init__(self, make: type = Runner) -> None:
        self.runner = make()

    def open(self, path: Path) -> None:
        self.runner.open(path)

    def ask(self, what: str, *given: object, seconds: float) -> object:
        return getattr(self.runner, what)(*given)

    def end(self) -> None:
        pass
