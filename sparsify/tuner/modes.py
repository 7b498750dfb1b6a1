"""What `sparsify tune` can be asked to do, and which options go with what."""

from __future__ import annotations

from collections.abc import Collection

from sparsify.bench.modes import option
from sparsify.errors import InputError

TIMED = ("device", "resume", "json")  # options of what is timed
TUNING = ("target", "arch", "budget", "length", "dtype", *TIMED)
MODES: dict[str, tuple[str, ...]] = {
    "grid": ("pattern", "head_dim", "heads", "kv_heads", *TUNING),
    "model": ("spec", "set", *TUNING),
    "calibrate": (),
    "export": (),
    "import": (),
}


def mode_of(given: Collection[str]) -> str:
    """What the options on a command line ask for, by their names.

    Raises InputError for nothing, for two things at once, and for an option that doesn't go with what is asked for.
    """
    modes = [name for name in MODES if name in given]
    if not modes:
        raise InputError(f"tune: nothing is asked for; give one of {', '.join(map(option, MODES))}")
    if len(modes) > 1:
        raise InputError(f"tune: {option(modes[0])} and {option(modes[1])} exclude each other")
    mode = modes[0]
    for name in given:
        if name != mode and name not in MODES[mode]:
            others = ", ".join(map(option, MODES[mode])) or "no other option"
            raise InputError(f"tune: {option(name)} does not go with {option(mode)}; what does: {others}")
    for name in TIMED if "arch" in given else ():
        if name in given:
            raise InputError(f"tune: {option(name)} does not go with --arch, which builds kernels and times none")
    return mode
