"""Files that are written for a user: refused before the work where they can't be made, there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sparsify.errors import InputError


def check_writable(path: Path, field: str) -> None:
    """Raises InputError, which begins with the field, unless a file can be made at the path; leaves nothing there.

    Folders above it need not be there yet.
    """
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no file"
            raise InputError(f"{field}: expected the name of a file, found '{path}', which is {what}")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{field}: '{path}' can't be written: {why}; give a file in a folder that can be") from None


def write_whole(path: Path, content: str | bytes, field: str) -> None:
    """Writes a file, whole or not at all, and the folders above it. Raises InputError, which begins with the field."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{field}: the folder '{path.parent}' can't be made: {error.strerror or error}") from None
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{field}: '{path}' can't be written: {error.strerror or error}") from None
