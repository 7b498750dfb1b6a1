"""Where machines are kept: those that ship with sparsify, and those that were calibrated here."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from importlib.resources import files
from pathlib import Path

from sparsify import env
from sparsify.cost.machine import Machine, read
from sparsify.errors import InputError, SparsifyError, nearest
from sparsify.files import write_whole
from sparsify.runtime.machine import cpu_model

FOLDER = "machines"


def machine(name: str | Path | Machine | None = None) -> Machine:
    """A machine by its name or by the path of its JSON file.

    None is this machine: as it was calibrated here (`sparsify tune --calibrate`), else the shipped one nearest to it.
    Names are those of shipped machines and of calibrated ones. Raises InputError naming the nearest.
    """
    if isinstance(name, Machine):
        return name
    if name is None:
        own = calibrated_path()
        return read(own) if own.exists() else _nearest()
    if not isinstance(name, str | Path):
        raise InputError(f"machine: expected a name, the path of a JSON file or a Machine, found {name!r}")
    if isinstance(name, Path) or name.endswith(".json") or os.sep in name:
        return read(Path(name))
    shipped = _shipped()
    if name in shipped:
        return shipped[name]
    own = {path.stem: path for path in (env.cache_dir() / FOLDER).glob("*.json")}
    if name in own:
        return read(own[name])
    raise InputError(f"unknown machine '{name}'; {nearest(name, [*shipped, *own])}")


def names() -> tuple[str, ...]:
    """The names of the machines that ship with sparsify."""
    return tuple(_shipped())


def save(machine: Machine, path: Path | None = None) -> Path:
    """Writes a machine, by default as what was calibrated for this one; returns where. Raises InputError.

    The file is there as a whole or not at all, whoever writes at the same time.
    """
    to = path or calibrated_path()
    write_whole(to, machine.text(), "machine")
    return to


def calibrated_path() -> Path:
    """Where the calibrated machine of this processor, with so many threads, is kept."""
    return env.cache_dir() / FOLDER / f"{this_name()}.json"


def this_name() -> str:
    """A name for this machine: its processor, cores, instruction set, and a hash of these."""
    about = f"{cpu_model()} {isa()} {cores()} cores"
    short = re.sub(r"[^a-z0-9]+", "-", about.lower()).strip("-")
    return f"{short}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def isa() -> str:
    """The instruction set of the kernels here."""
    from sparsify.runtime import machine_isa

    return machine_isa().name


def cores() -> int:
    """Threads that kernels run on."""
    import torch

    return torch.get_num_threads()


@functools.lru_cache(maxsize=1)
def _shipped() -> dict[str, Machine]:
    folder = files("sparsify.cost") / FOLDER
    found = [Machine.parse(file.read_text(), file.name) for file in folder.iterdir() if file.name.endswith(".json")]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}


def _nearest() -> Machine:
    """The shipped processor with this one's instruction set, or any; with this one's number of cores."""
    try:
        here = isa()
    except SparsifyError:
        here = ""
    processors = [one for one in _shipped().values() if one.target == "cpp"]
    found = next((one for one in processors if one.arch == here), processors[0])
    return found.model_copy(update={"cores": cores()})
