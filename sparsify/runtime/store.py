"""The cache of built kernels: a shared library, its source and a record of both, named by what made them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from sparsify import env
from sparsify.errors import BuildError
from sparsify.runtime.toolchain import COMMON_FLAGS, Compiler

SHOWN_LINES = 15


def load_library(name: str, source: str, flags: tuple[str, ...], compiler: Compiler) -> ctypes.CDLL:
    """The library built from `source`, from this process, else from the cache folder, else built now.

    Safe under concurrent processes; an entry that is truncated, changed or can't be loaded is built again. Raises
    BuildError with the command and the compiler's first lines, or naming a cache folder that can't be written.
    """
    return _load(env.cache_dir(), name, source, (*COMMON_FLAGS, *flags), compiler)


@functools.cache
def _load(folder: Path, name: str, source: str, flags: tuple[str, ...], compiler: Compiler) -> ctypes.CDLL:
    text = json.dumps([source, flags, compiler.command, compiler.version])
    stem = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    library = folder / f"{stem}.so"
    found = _open(library)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{stem}.lock"):
            found = _open(library)  # another process may have built it meanwhile
            if found is None:
                _build(library, source, flags, compiler)
                found = _open(library)
    except OSError as error:
        raise BuildError(
            f"kernel {name}: the cache folder {folder} can't be written: {error.strerror or error}"
            " (set SPARSIFY_CACHE_DIR to a folder that can)"
        ) from None
    if found is None:
        raise BuildError(f"kernel {name}: {library} was built but can't be loaded")
    return found


def _open(library: Path) -> ctypes.CDLL | None:
    """The library if its record says that it is whole and it loads, else None."""
    try:
        record = json.loads(library.with_suffix(".json").read_text())
        if record["sha256"] != hashlib.sha256(library.read_bytes()).hexdigest():
            return None
        return ctypes.CDLL(str(library))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(library: Path, source: str, flags: tuple[str, ...], compiler: Compiler) -> None:
    """Compiles into temporary files and renames them, the record last: what has a record is whole."""
    library.with_suffix(".json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        code, binary, record = (Path(scratch) / f"kernel.{ending}" for ending in ("cpp", "so", "json"))
        code.write_text(source)
        code = code.replace(library.with_suffix(".cpp"))  # kept even when it doesn't compile, for whoever asks why
        command = [*compiler.command, *flags, "-o", str(binary), str(code)]
        _compile(command, library.stem)
        digest = hashlib.sha256(binary.read_bytes()).hexdigest()
        record.write_text(json.dumps({"sha256": digest, "command": command, "compiler": compiler.version}, indent=1))
        for made in (binary, record):
            os.replace(made, library.with_suffix(made.suffix))


def _compile(command: list[str], name: str) -> None:
    shown = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"kernel {name}: the compiler can't be run: {error}\n  {shown}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout or "(it printed nothing)").strip().splitlines()
        said = "\n".join(f"  {line}" for line in lines[:SHOWN_LINES])
        raise BuildError(f"kernel {name}: the compiler failed with status {done.returncode}\n  {shown}\n{said}")
