"""Which kernel a tuned one is: the name under which the store has it, and the software that it holds for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING

from sparsify import __version__
from sparsify.bias import to_data
from sparsify.codegen.names import program_name, size_name
from sparsify.codegen.target import DTYPES
from sparsify.errors import InputError, nearest
from sparsify.text import to_text

if TYPE_CHECKING:
    from sparsify.program import Program

# Queries, at most, as in decoding: what is tuned apart from many, and on a GPU what is taken together with the heads of
# its group and has its keys split.
FEW = 16


@functools.lru_cache(maxsize=1024)
def kernel_key(program: Program, dtype: str, head_dim: int, value_dim: int, q_len: int) -> str:
    """`window512__fp32__d64__many__` and a hash of all rules; which head has which rule makes no other kernel."""
    data = {
        "keep": sorted(map(to_text, program.keep)),
        "softcap": program.softcap is not None,
        "bias": to_data(program.bias),
        "sink": None if program.sink is None else to_data(program.sink),
        "queries": program.queries and program.queries.to_data(),
        "keys": program.keys and program.keys.to_data(),
        "skips": any(program.skips),
    }
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:10]
    size, rows = size_name(head_dim, value_dim), "few" if q_len <= FEW else "many"
    ordered = replace(program, keep=tuple(sorted(program.keep, key=to_text)))
    return f"{program_name(ordered)}__{DTYPES[dtype]}__{size}__{rows}__{digest}"


def check_values(values: Mapping[str, int], allowed: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError for a field that isn't there, or a value that it can't have."""
    for name, value in values.items():
        if name not in allowed:
            raise InputError(f"tuned kernel: unknown field '{name}'; {nearest(str(name), allowed)}")
        if type(value) is not int or value not in allowed[name]:
            raise InputError(f"tuned kernel: {name}: found {value!r}; allowed: {', '.join(map(str, allowed[name]))}")


@functools.lru_cache(maxsize=8)
def code_version(package: str) -> str:
    """sparsify's version and a hash of the files that print a target's kernels: what is tuned holds for just these."""
    names = sorted(file.name for file in files(package).iterdir() if file.is_file())
    found = hashlib.sha256()
    for name in names:
        found.update(name.encode() + (files(package) / name).read_bytes())
    return f"sparsify {__version__} ({found.hexdigest()[:8]})"
