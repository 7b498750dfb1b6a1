"""Memory that something takes at its highest, beyond what was there before."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """What one call takes at its highest, its result included.

    On a GPU that is the high-water mark of torch's allocator. On a CPU it is that of the process's resident memory,
    which the kernel keeps and Linux lets a process set back; elsewhere it is looked at every half a millisecond.
    """
    if device != "cpu":
        return _peak_of_allocator(run)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
    try:
        CLEAR.write_text("5")
        before = _status("VmRSS")
    except OSError:
        return _peak_by_looking(run)
    run()
    return max(0, _status("VmHWM") - before)


def _peak_of_allocator(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _peak_by_looking(run: Callable[[], Any]) -> int:
    seen = [_resident()]
    with _watching(seen):
        run()
    return max(seen) - seen[0]


@contextmanager
def _watching(seen: list[int]) -> Iterator[None]:
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.0005):
            seen.append(_resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        seen.append(_resident())


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the highest that there was, in bytes there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
