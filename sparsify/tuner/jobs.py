"""What is tuned: kernels, each with the launches that need it, kept as files that other processes read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sparsify import op
from sparsify.codegen import target
from sparsify.codegen.target import Launch, dtype_name
from sparsify.program import Program
from sparsify.runtime import ready
from sparsify.runtime.tunings import Key
from sparsify.tuner.targets import tunable

MOST = 4  # launches of one kernel that are measured: those of different shapes


@dataclass(frozen=True)
class Job:
    """A kernel to tune.

    key: the store's. name: for people. launches: the calls that it is measured on.
    """

    key: Key
    name: str
    launches: tuple[Launch, ...]

    def write(self, folder: Path, number: int) -> Path:
        """A file of the launches."""
        path = folder / f"{number}.pt"
        torch.save([_data(launch) for launch in self.launches], path)
        return path


def read(path: Path) -> list[Launch]:
    """The launches of a job's file."""
    found = torch.load(path, weights_only=True)
    return [Launch(**{**data, "program": Program.parse(data["program"])}) for data in found]


def _data(launch: Launch) -> dict[str, Any]:
    found = {field.name: getattr(launch, field.name) for field in fields(Launch)}
    return found | {"program": launch.program.text(), "lse": None}


def key_of(launch: Launch) -> Key:
    """Under which the store has a launch's kernel on this machine. Raises InputError for a target without one."""
    return tunable(launch.program.target).key(launch)


def jobs_of(
    launches: Sequence[Launch], names: Callable[[Launch], str], key_of: Callable[[Launch], Key] = key_of
) -> list[Job]:
    """Launches by the kernels that they need, in order; a kernel's launches of one shape are measured once."""
    found: dict[Key, tuple[str, dict[tuple[Any, ...], Launch]]] = {}
    for launch in launches:
        key = key_of(launch)
        shape = (launch.q.shape, launch.k.shape, launch.program.heads)
        found.setdefault(key, (names(launch), {}))[1].setdefault(shape, launch)
    return [Job(key, name, tuple(some.values())[:MOST]) for key, (name, some) in found.items()]


def sizes(launch: Launch) -> str:
    """`fp32 D64 N4096 H8/2`."""
    from sparsify.bench.tables import SHORT

    (_, heads, q_len, head_dim), kv_heads, k_len = launch.q.shape, launch.k.shape[1], launch.k.shape[2]
    length = f"N{k_len}" if q_len == k_len else f"{q_len} of N{k_len}"
    return f"{SHORT[dtype_name(launch.q.dtype)]} D{head_dim} {length} H{heads}/{kv_heads}"


@contextmanager
def recorded(run: bool = True) -> Iterator[list[Launch]]:
    """The launches of all attention meanwhile; without `run` none is computed, and outputs are zeros."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, launch: Launch) -> torch.Tensor:
            launches.append(launch)
            return target(self.name).run(launch) if run else launch.clear(launch.empty_output())

        def remember(self, launch: Launch, key: object) -> None:
            """Nothing: the next one is to be recorded, too."""

    ready.forget()
    with mock.patch.object(op, "target", Recorder):
        yield launches
