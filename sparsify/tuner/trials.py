"""The journal: what was tried for each kernel and how it went, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from sparsify import env
from sparsify.errors import InputError
from sparsify.runtime.tunings import Key
from sparsify.tuner.targets import Values

VERSION = 1
RIGHT = "raced"  # the state of a trial whose numbers were right
PRUNED = "pruned"  # of one that needs not be made: a build ahead of time said so


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel.

    step: what it changed of the best so far. values: all that differs from the default then. state: "raced", or why it
    was never timed: "wrong", "failed" (to build or run), "lost" (crashed or hung), "pruned" (by what it takes of a GPU
    that isn't here); `why` says more. ratio, low, high: median of its times to the incumbent's, and what that lies
    between. won: whether it is the best from then on. last: whether it is the race of the best against the default that
    ends a search; then seconds and default are medians.
    """

    key: Key
    step: Values
    values: Values
    state: str
    why: str = ""
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    won: bool = False
    last: bool = False
    seconds: float = 0.0
    default: float = 0.0


class Journal:
    """Trials as lines of JSON in a file; each line is written whole, and a line that was cut short is no trial."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def here(cls) -> Journal:
        """In the cache folder."""
        return cls(env.cache_dir() / f"tuning-v{VERSION}.jsonl")

    def of(self, key: Key) -> list[Trial]:
        """The trials of a kernel, in order."""
        return [trial for trial in self._all() if trial.key == key]

    def add(self, trial: Trial) -> None:
        """Adds a line. Raises InputError where it can't be written."""
        line = json.dumps(asdict(trial)) + "\n"
        with self._locked(), self.path.open("a+b") as file:
            if file.tell() and not self._ends_whole():
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def forget(self, keys: Iterable[Key]) -> None:
        """Drops the trials of these kernels. Raises InputError where the file can't be written."""
        gone = set(keys)
        with self._locked():
            kept = [trial for trial in self._all() if trial.key not in gone]
            beside = self.path.with_suffix(".part")
            beside.write_text("".join(json.dumps(asdict(trial)) + "\n" for trial in kept))
            os.replace(beside, self.path)

    def _all(self) -> list[Trial]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                data = json.loads(line)
                found.append(Trial(**{**data, "key": tuple(data["key"])}))
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else writes inside. Raises InputError where the file can't be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                yield
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"tune: {self.path}: can't be written: {why} (set SPARSIFY_CACHE_DIR)") from None
