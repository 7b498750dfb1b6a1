"""Timing on a GPU: by events on the device, of calls that are captured once and replayed.

So a time is that of the kernels; what Python takes to launch them is `sparsify bench --overhead`'s to tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

LEAST = 20e-3  # seconds between two events, about: a chip takes some milliseconds to its clock
MOST = 4096  # replays between them


class Replayed:
    """A call as a CUDA graph's replay; the call itself, and a warning, where it can't be captured.

    Short calls are timed several in a row: they leave their data in the caches to one another, and run at the clock
    that they get by themselves, not at that to which a longer peer's power has brought the chip.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        for _ in range(2):  # what is compiled or allocated once
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            self.run = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.run = run
            warnings.warn(f"a call can't be captured, so its times have Python's in them: {error}", stacklevel=2)
        self.times = 0  # between two events, once that is known

    def __call__(self) -> None:
        """Once."""
        self.run()

    def seconds(self) -> float:
        """What one call takes on the device."""
        if not self.times:
            self.times = max(1, min(MOST, int(LEAST / min(self._seconds(1) for _ in range(3)))))
        return self._seconds(self.times)

    def _seconds(self, times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(times):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times
