"""What this machine's processor is called."""

from __future__ import annotations

import functools
import platform

from sparsify.runtime import toolchain


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """The name with family and model: virtual machines often give a name that many processors share."""
    found = _cpuinfo()
    numbers = [f"{name.split()[-1]} {found[name]}" for name in ("cpu family", "model") if name in found]
    return f"{cpu_name()} ({', '.join(numbers)})" if numbers else cpu_name()


@functools.lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    try:
        first = toolchain.CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
