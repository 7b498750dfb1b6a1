"""What `sparsify bench` can be asked to measure, and which options go with what."""

from __future__ import annotations

from collections.abc import Collection

from sparsify.errors import InputError

TIMING = ("repeats", "seconds", "json")
SHAPES = ("pattern", "length", "head_dim", "dtype", "heads", "kv_heads", "device", "plot", *TIMING)
CASES = ("case", *TIMING)

# What is measured -> the other options that go with it; without any of these, single cases are.
MODES: dict[str, tuple[str, ...]] = {
    "grid": SHAPES,
    "model": ("spec", "set", "length", "dtype", "device", *TIMING),
    "compare": (),
    "lossless": (*CASES, "dtype"),
    "neighborhood": CASES,
    "selection": (*CASES, "dtype"),
    "decode": (*CASES, "dtype", "device"),
    "mixture": ("length", "head_dim", "dtype", "kv_heads", *TIMING),
    "overhead": ("json",),
    "simulate": ("count", "seed", "dtype", "json"),
    "preparation": (),
}


def mode_of(given: Collection[str]) -> str | None:
    """What the options on a command line ask for, by their names; None for single cases.

    Raises InputError for two things at once, and for an option that doesn't go with what is asked for.
    """
    modes = [name for name in MODES if name in given]
    if len(modes) > 1:
        raise InputError(f"bench: {option(modes[0])} and {option(modes[1])} exclude each other")
    mode = modes[0] if modes else None
    allowed = MODES[mode] if mode else SHAPES
    for name in given:
        if name == mode or name in allowed:
            continue
        if mode is None:
            takers = " or ".join(option(one) for one, names in MODES.items() if name in names)
            raise InputError(f"bench: {option(name)} goes with {takers} only")
        others = f"what does: {', '.join(map(option, allowed))}" if allowed else "no other option does"
        raise InputError(f"bench: {option(name)} does not go with {option(mode)}; {others}")
    return mode


def option(name: str) -> str:
    """`--kv-heads` for kv_heads."""
    return "--" + name.rstrip("_").replace("_", "-")
