"""Generated kernels as files: Triton's JIT reads a kernel's source back through `inspect`, so it must lie on disk."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

from sparsify import env
from sparsify.errors import BuildError

_LOCK = threading.Lock()


def import_source(name: str, source: str) -> ModuleType:
    """The module of that name and text, written to the kernel cache and imported once a process.

    Raises BuildError when the cache can't be written.
    """
    full_name = f"sparsify_kernels.{name}"
    with _LOCK:
        if full_name not in sys.modules:
            path = write_once(env.cache_dir() / "triton" / f"{name}.py", source)
            spec = importlib.util.spec_from_file_location(full_name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[full_name] = module
        return sys.modules[full_name]


def write_once(path: Path, text: str) -> Path:
    """The file with that text. Written beside and renamed, so other processes see all of it or nothing; a file whose
    text differs (cut short, edited) is replaced."""
    try:
        if path.exists() and path.read_text() == text:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(beside, path)
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(
            f"can't write the kernel {path}: {error} (set SPARSIFY_CACHE_DIR to a writable folder)"
        ) from error
    return path
