"""Targets as the tuner asks them: under which key the store has a kernel, and what there is to try for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from sparsify.errors import InputError, nearest

if TYPE_CHECKING:
    from sparsify.codegen.target import Launch
    from sparsify.runtime.tunings import Key, Tuned

Values = Mapping[str, int]


class Tunable(Protocol):
    """What a target's module `tuned` says."""

    def key(self, launch: Launch) -> Key:
        """Under which the store has a launch's kernel on this machine."""

    def ahead_key(self, launch: Launch) -> Key:
        """The same, for what was built ahead of time for a chip like this machine's."""

    def default(self, launch: Launch) -> dict[str, int]:
        """Every field as it is by default."""

    def groups(self, launch: Launch) -> Sequence[Sequence[Values]]:
        """What to try, group by group, the most promising first; each changes the best of those before it."""

    def check(self, values: Values) -> None:
        """Raises InputError for a field that isn't there, or a value that it can't have."""

    def holds(self, entry: Tuned) -> bool:
        """Whether an entry of a store is for this machine and software."""


_HOMES = {"cpp": "sparsify.codegen.cpp.tuned", "triton": "sparsify.codegen.triton.tuned"}


def tunable(name: str) -> Tunable:
    """The module of a target. Raises InputError for one that can't be tuned."""
    if name not in _HOMES:
        raise InputError(f"tune: target '{name}' has nothing to tune; {nearest(name, _HOMES)}")
    return importlib.import_module(_HOMES[name])  # type: ignore[return-value]
