"""What an attention costs: its tile program counted, and timed by a machine's rates, without running it.

from sparsify import cost
cost.estimate([pattern] * 8, length=8192, head_dim=64)              # on this machine
cost.estimate([pattern] * 32, kv_heads=8, length=2**17, head_dim=128, dtype="bfloat16", machine="h100")
cost.save(cost.calibrate())                                         # measures this machine, in one to two minutes

Site        patterns as a kernel's program: static rules, lists, layouts   (site, choosing)
Nest        the tiles of a target                                          (nest)
Tiles       key tiles of all query tiles, by class             (positions, tiles, classes, parts, kept)
steps       how often query tiles do what a kernel is made of              (steps)
Launch      query tiles timed by rates, and handed out to cores            (schedule, launch)
Machine     what each step takes                                           (machine, find)
Estimate    the result, for a site and its heads                           (result, time, estimate)
Sample      what is run to fit a machine's rates                           (sample, calibration, fit)
"""

import importlib
from typing import Any

from sparsify.cost.dense import crossover, dense_seconds
from sparsify.cost.estimate import estimate
from sparsify.cost.find import machine, names, save
from sparsify.cost.machine import Machine
from sparsify.cost.result import Estimate, HeadCost

__all__ = [
    "Estimate", "HeadCost", "Machine", "calibrate", "crossover", "dense_seconds", "estimate", "machine", "names",
    "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # counting runs nothing, and so needs less
        return importlib.import_module("sparsify.cost.calibration").calibrate
    raise AttributeError(f"module 'sparsify.cost' has no attribute '{name}'")
