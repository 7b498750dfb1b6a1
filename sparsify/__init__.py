"""sparsify: a torch.compile backend that rewrites attention into generated sparse kernels.

    torch.compile(model, backend="sparsify", options={"spec": "spec.yaml"})

Importing this module pulls in neither torch nor triton; names load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "attention": "sparsify.functional",
    "kept": "sparsify.functional",
    "explain": "sparsify.explanation",
    "rewrite": "sparsify.rewriting",
    "Report": "sparsify.report",
    "Spec": "sparsify.spec",
    "load_spec": "sparsify.spec",
    "SpecError": "sparsify.errors",
    "SparsifyError": "sparsify.errors",
    "PatternError": "sparsify.errors",
    "InputError": "sparsify.errors",
    "RefusedError": "sparsify.errors",
    "VerifyError": "sparsify.errors",
    "Refusal": "sparsify.errors",
}

__all__ = ["__version__", "patterns", *_HOMES]

if TYPE_CHECKING:
    from sparsify import patterns


def __getattr__(name: str) -> Any:
    if name == "patterns":
        return importlib.import_module("sparsify.patterns")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sparsify' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
