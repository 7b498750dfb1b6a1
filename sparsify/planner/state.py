"""What a profile has found so far, on disk: a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.files import write_whole

Arrays = dict[str, np.ndarray]
NAME = re.compile(r"[0-9a-f]{24}\.npz|\.[0-9a-f]{24}\.npz\.\d+")  # of what is written here, whole or when it was killed


class State:
    """Results by what they are of. folder: where they are kept; None keeps nothing.

    A run asks for the same things in the same order, whatever was killed; what is there is not computed again. A key
    holds all that a result depends on, so a folder of another run is of no harm.
    """

    def __init__(self, folder: Path | None, run: Any = None) -> None:
        self.folder, self.run = folder, run
        self.reused = 0

    def of(self, key: Any, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of a key, made now if they are not there."""
        if self.folder is None:
            return make()
        path = self.folder / f"{digest((self.run, key))}.npz"
        found = _read(path)
        if found is not None:
            self.reused += 1
            return found
        made = make()
        _write(path, made)
        return made

    def clear(self) -> None:
        """The run is over: what it kept goes, and the folder, unless it holds anything else."""
        if self.folder is None:
            return
        for path in self.folder.glob("*"):
            if NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def digest(value: Any) -> str:
    """A hash of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The file is there whole or not at all. Raises InputError."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_whole(path, content.getvalue(), "plan: state")
