"""Code generation: one printer a target, from the same tile rules.

`target(name)` gives a target by name; `choose(device)` the one that "auto" means. The core imports no target: each
is loaded on first use.
"""

if __name__ != "sparsify.codegen":
    raise ImportError("import sparsify.codegen, not the bare folder codegen")

import importlib

from sparsify.codegen.target import Launch, Target
from sparsify.errors import InputError, nearest

_HOMES = {
    "cpp": ("sparsify.codegen.cpp", "CppTarget"),
    "triton": ("sparsify.codegen.triton", "TritonTarget"),
    "null": ("sparsify.codegen.null", "NullTarget"),
}


def target(name: str) -> Target:
    """The target of that name. Raises InputError naming the nearest one."""
    if name not in _HOMES:
        raise InputError(f"unknown target '{name}'; {nearest(name, ['auto', *_HOMES])}")
    module, cls = _HOMES[name]
    return getattr(importlib.import_module(module), cls)()


def choose(device_type: str) -> str:
    """The name of the target that "auto" means for tensors on this kind of device."""
    return "cpp" if device_type == "cpu" else "triton"


__all__ = ["Launch", "Target", "choose", "target"]
