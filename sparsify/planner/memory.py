"""Memory that was freed is kept for the next tensor, in a process that does nothing but plan."""

from __future__ import annotations

import ctypes

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def keep_freed() -> None:
    """From here on glibc gives nothing back to the system.

    A profile makes and drops tensors of some megabytes all the time, and each of them else comes as new pages, which
    the system first has to clear: that took half of the time. Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
