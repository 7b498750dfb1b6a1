"""The options of the backend: read, checked and named in errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparsify import env
from sparsify.errors import InputError, nearest

INNERS = ("inductor", "eager")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="sparsify", options={...})` takes.

    spec: a path, a dict or a `sparsify.Spec`; without one the model's own masks run.
    strict: a site that is refused raises RefusedError instead of staying dense.
    crossover: whether a site to which the spec gives nothing stays with Inductor where dense attention is faster; by
    default what SPARSIFY_CROSSOVER says, which is yes.
    verify: whether the first call of each compiled graph compares every recovered mask with the model's own, at every
    pair, and the output of every attention that no spec changes, and raises VerifyError where they differ. That call
    runs the model as it was, too, with its masks as tensors.
    target: "auto" (C++ on CPUs, Triton on GPUs), "cpp", "triton" or "null"; by default SPARSIFY_TARGET.
    learned: the modules that score the units of selections (`learned: name` in a spec), by name: a torch module that
    takes q (B, Hq, Nq, D) and k (B, Hkv, Nk, D) and gives (B, 1 or Hkv or Hq, rows, units), or a list or a mapping of
    those by layer. For lifetimes of keys (`nats`) it gives logits of global, local and window, (B, Hkv, Nk, 3).
    inner: who compiles the rest of the graph: "inductor" or "eager".
    """

    spec: Any = None
    strict: bool = False
    crossover: bool = True
    verify: bool = False
    target: str = "auto"
    inner: str = "inductor"
    learned: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any] | None, without: Sequence[str] = ()) -> Options:
        """Checks a user's options, `without` those that have no meaning to who asks.

        Raises InputError or SpecError naming option, value and what is allowed.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise InputError(f"options: expected a dict, found {given!r}")
        names = [one.name for one in fields(cls) if one.name not in without]
        for name in given:
            if name not in names:
                raise InputError(f"unknown option {name!r}; {nearest(str(name), names)}")
        values = {"target": env.target(), "crossover": env.crossover(), **given}
        _one_of("target", values["target"], env.TARGETS)
        _one_of("inner", values.get("inner", "inductor"), INNERS)
        for name in ("strict", "crossover", "verify"):
            if not isinstance(values.get(name, False), bool):
                raise InputError(f"option '{name}': expected True or False, found {values[name]!r}")
        _check_learned(values.get("learned", {}))
        return cls(**{**values, "spec": read_spec(values.get("spec"))})

    def check_modules(self) -> None:
        """Raises InputError for a module that the spec's selections ask for and that isn't given."""
        for name in self.spec.learned() if self.spec is not None else ():
            if name not in self.learned:
                found = nearest(name, self.learned) if self.learned else "none was given"
                raise InputError(f"option 'learned': the spec asks for the module '{name}'; {found}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"option '{name}': found {value!r}; {nearest(str(value), allowed)}")


def _check_learned(learned: Any) -> None:
    """Refuses what are no modules."""
    from torch import nn

    if not isinstance(learned, Mapping):
        raise InputError(f"option 'learned': expected a mapping of names to modules, found {learned!r}")
    for name, given in learned.items():
        by_layer = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else ()
        if not isinstance(given, nn.Module) and not (by_layer and all(isinstance(one, nn.Module) for one in by_layer)):
            allowed = "a torch module, or a list or a mapping by layer of them"
            raise InputError(f"option 'learned': {name}: expected {allowed}, found {given!r}")


def read_spec(value: Any) -> Any:
    """A spec from whatever a user may give for one, or None."""
    if value is None:
        return None
    from sparsify.spec import Spec

    if not isinstance(value, str | Path | Mapping | Spec):
        raise InputError(f"option 'spec': expected a path, a dict or a sparsify.Spec, found {value!r}")
    return Spec.of(value)
