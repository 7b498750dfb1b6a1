"""An entry of the zoo: how a model is made, what it is called with, and what in it is no attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Call = dict[str, Any]  # keyword arguments of one forward
MakeCall = Callable[[nn.Module], Call]


@dataclass(frozen=True)
class Entry:
    """One model.

    build: the model for an implementation of attention. calls: by name ("plain", "padded", "decode"), what makes the
    arguments of one forward; it may run the model to fill a cache. implementations: those that the model has.
    others: globs of modules whose softmax is no attention, with how many of them one forward runs (-1: all).
    package: what has to be importable. held_out: not on the survey page, so no part of the main table.
    """

    name: str
    family: str
    build: Callable[[str], nn.Module]
    calls: Mapping[str, MakeCall]
    implementations: tuple[str, ...] = ("eager", "sdpa")
    others: Mapping[str, int] = field(default_factory=dict)
    package: str = "transformers"
    held_out: bool = False

    def is_other(self, path: str) -> bool:
        """Whether every softmax of this module is something else than attention."""
        return any(number < 0 and fnmatchcase(path, glob) for glob, number in self.others.items())


@dataclass(frozen=True)
class Variant:
    """One way of running an entry: what the walk captures at a time."""

    entry: Entry
    implementation: str
    call: str
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.entry.name} {self.implementation} {self.call}{' dynamic' if self.dynamic else ''}"


def variants(entry: Entry) -> list[Variant]:
    """Every variant of an entry: each implementation with each call, with static and with dynamic shapes."""
    return [
        Variant(entry, implementation, call, dynamic)
        for implementation in entry.implementations
        for call in entry.calls
        for dynamic in (False, True)
        if not (implementation == "flex_attention" and call.startswith("decode"))  # the prefill alone takes a minute
    ]
