"""Timing on a GPU: by events on the device, of calls that are captured once and replayed.

So a time is that of the kernels; what Python takes to launch them is `sparsify bench --overhead`'s to tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph's replay; the call itself, and a warning, where it can't be captured."""
    for _ in range(2):  # what is compiled or allocated once
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"a call can't be captured, so its times have Python's in them: {error}", stacklevel=2)
        return run
    return graph.replay


def seconds(run: Callable[[], Any]) -> float:
    """What one call takes on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
