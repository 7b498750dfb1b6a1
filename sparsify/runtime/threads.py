"""Threads for kernels: torch's own OpenMP pool, so that two pools never compete for the cores."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path


def parallel_function() -> int:
    """The address of `GOMP_parallel` in the OpenMP library that torch loaded, or 0: then kernels run on one thread.

    After a fork it is 0, too: a forked child can't use its parent's pool.
    """
    return _found() if os.getpid() == _HOME else 0


_HOME = os.getpid()


@functools.lru_cache(maxsize=1)
def _found() -> int:
    import torch

    torch.get_num_threads()
    for path in _openmp_libraries():
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def _openmp_libraries() -> list[str]:
    """OpenMP libraries mapped into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return [path for path in paths if any(name in Path(path).name for name in ("libgomp", "libiomp", "libomp"))]
