"""The model that torch.compile was given, and the function being compiled, found from inside the backend.

A graph knows modules by where Dynamo found them: after a graph break that is `L['self'].self_attn` for every layer, and
all layers share one compiled function. The model itself is on the Python stack, and knows its modules by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import GetItemSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Source


@dataclass(frozen=True)
class Root:
    """The compiled model (None: a function was compiled) and whose code is being compiled.

    names: the path of each module by its key in `nn_module_stack`, its id as text.
    owner: where the module whose code it is lies, among the local variables; path: that module's path.
    """

    model: torch.nn.Module | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    owner: Source | None = None
    path: str = ""

    @classmethod
    def find(cls) -> Root:
        """The root of the graph that the backend was called for."""
        model = _outermost_compiled()
        if model is None:
            return cls()
        names = {str(id(module)): path for path, module in model.named_modules()}
        for source, value in _locals():
            if isinstance(value, torch.nn.Module) and str(id(value)) in names:
                return cls(model, names, source, names[str(id(value))])
        return cls(model, names)

    def modules(self) -> dict[str, type]:
        """The class of each module of the model by its path, in the model's order."""
        return {} if self.model is None else {path: type(module) for path, module in self.model.named_modules()}

    @property
    def partial(self) -> bool:
        """Whether the code being compiled is that of a part of the model, which other parts may share."""
        return self.model is not None and (self.owner is None or self.path != "")

    def guard(self) -> bool:
        """Makes Dynamo compile anew for another part of the model. False if nothing tells one part from another."""
        if self.owner is None:
            return False
        install_guard(self.owner.make_guard(GuardBuilder.ID_MATCH))
        return True


def _outermost_compiled() -> torch.nn.Module | None:
    """The outermost module on the stack that torch.compile (or `model.compile()`) wrapped."""
    found = None
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            found = module._orig_mod
        elif isinstance(module, torch.nn.Module) and module._compiled_call_impl is not None:
            found = module
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _locals() -> list[tuple[Source, Any]]:
    """The local variables of the function that is being compiled, `self` first, which a decorator has in its `args`."""
    try:
        found = InstructionTranslator.current_tx().output.root_tx.f_locals
    except (AttributeError, AssertionError):
        return []
    variables = [(LocalSource(name, is_input=True), value) for name, value in found.items()]
    variables += [(GetItemSource(source, 0), value[0]) for source, value in variables if _is_args(source, value)]
    return sorted(variables, key=lambda item: item[0] != LocalSource("self", is_input=True))


def _is_args(source: LocalSource, value: Any) -> bool:
    return source.local_name == "args" and isinstance(value, tuple) and len(value) > 0
