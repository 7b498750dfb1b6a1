"""What a preset is: a published system's pattern by name, with what to know of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparsify.errors import PatternError, nearest
from sparsify.expr import Pred
from sparsify.patterns.grid import flag, whole, written
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.select import Selection
from sparsify.sizes import Size

Phase = Literal["prefill", "decode", "both", "train"]
Semantics = Literal["approx", "native"]
Sized = int | str  # an integer, or an expression in N

__all__ = [
    "About",
    "Phase",
    "Preset",
    "Semantics",
    "Sized",
    "choice",
    "flag",
    "preset",
    "semantics_of",
    "share",
    "size",
    "whole",
]


@dataclass(frozen=True)
class About:
    """What to know of a preset; its rule is the first line of its constructor's docstring.

    phase: where the system runs it. semantics: `native` for what models are trained with, so that dense attention is
    no substitute; `approx` for what stands in for dense attention. cost: what a query reads. omits: what the system
    does that this pattern does not. example: arguments for a picture, where some have no default; heads, length: of
    that picture. masks: for patterns that choose by data, `masks(pattern, q_len, k_len)` gives a bool array
    (heads, q_len, k_len) of what made-up data keep; without it the picture is the pattern's own mask.
    """

    source: str
    phase: Phase
    semantics: Semantics
    cost: str
    omits: str
    example: tuple[tuple[str, Any], ...] = ()
    heads: int = 1
    length: int = 1024


@dataclass(frozen=True)
class Preset(Pattern):
    """The pattern of a published system: its name, the arguments that aren't defaults, and the pattern itself."""

    name: str
    given: tuple[tuple[str, Any], ...]
    pattern: Pattern
    semantics: Semantics

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", self.pattern.rule)

    @property
    def about(self) -> About:
        """What to know of this preset."""
        from sparsify.patterns import PATTERNS

        return PATTERNS[self.name].about

    def keep(self) -> Pred:
        return self.pattern.keep()

    def parts(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def too_large(self, n: int) -> str:
        return self._as_mine(super().too_large(n))

    def outside_of(self, n: int) -> str:
        return self._as_mine(super().outside_of(n))

    def _as_mine(self, sentence: str) -> str:
        kind, dot, rest = sentence.partition(".")
        return f"{self.name}.{rest}" if dot else kind

    def arguments(self) -> dict[str, Any]:
        return dict(self.given)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={written(value)!r}' for key, value in self.given)})"


def preset(
    *, source: str, phase: Phase, semantics: Semantics, cost: str, omits: str = "nothing",
    example: Mapping[str, Any] | None = None, heads: int = 1, length: int = 1024,
) -> Callable[[Callable[..., Pattern]], Callable[..., Preset]]:  # fmt: skip
    """Makes a constructor of patterns a preset: what it returns knows its name and its arguments."""
    about = About(source, phase, semantics, cost, omits, tuple((example or {}).items()), heads, length)

    def decorated(build: Callable[..., Pattern]) -> Callable[..., Preset]:
        name = build.__name__
        names = tuple(inspect.signature(build).parameters)
        defaults = {key: p.default for key, p in inspect.signature(build).parameters.items()}

        @functools.wraps(build)
        def constructor(*args: Any, **kwargs: Any) -> Preset:
            try:
                pattern = build(*args, **kwargs)
            except PatternError as error:
                raise PatternError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
            found = {**dict(zip(names, args, strict=False)), **kwargs}
            given = [(key, _plain(found[key])) for key in names if key in found and found[key] != defaults[key]]
            return Preset(name, tuple(given), pattern, semantics)

        constructor.about = about  # type: ignore[attr-defined]
        return constructor

    return decorated


def _plain(value: Any) -> Any:
    return tuple(_plain(part) for part in value) if isinstance(value, list | tuple) else value


def semantics_of(pattern: Pattern) -> Semantics | None:
    """`native` if any preset or selection in a pattern is; else `approx` if there is one in it; else None."""
    if isinstance(pattern, Selection):
        return getattr(pattern.choice.selector, "semantics", "approx")
    found = {pattern.semantics} if isinstance(pattern, Preset) else {semantics_of(part) for part in pattern.parts()}
    return "native" if "native" in found else "approx" if "approx" in found else None


def size(value: Any, field: str, low: int = 1) -> str:
    """A size's text: an integer of at least `low`, or an expression in N. Raises PatternError naming the field."""
    return Size.read(value, field, low=low).text


def choice(value: Any, field: str, allowed: tuple[str, ...]) -> Any:
    """One of some words. Raises PatternError naming the field and the nearest."""
    if not isinstance(value, str) or value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else f"allowed: {', '.join(allowed)}"
        raise PatternError(f"{field}: unknown value {value!r}; {hint}")
    return value


def share(value: Any, field: str, low: float | None = None) -> float:
    """A number above 0, or from `low`, to 1. Raises PatternError naming the field."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and (value > 0 if low is None else value >= low) and value <= 1:
        return float(value)
    allowed = "above 0 and at most 1" if low is None else f"from {low:g} to 1"
    raise PatternError(f"{field}: expected a number {allowed}, found {value!r}")
