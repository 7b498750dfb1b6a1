"""From the forms of a spec to patterns.

A form is the name of a pattern; a mapping of primitives, which is their union; or `all`, `any`, `not` over forms.
The primitives, the presets and their fields are the constructors in `sparsify.patterns.PATTERNS` and their parameters,
so a new pattern is known here, in the schema and in the errors as soon as it is named there.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

from sparsify.errors import PatternError, SpecError, nearest
from sparsify.patterns import PATTERNS, PRESETS, Pattern
from sparsify.spec.blocks import BLOCKED, at_block
from sparsify.spec.source import Path, Source, shown

COMBINE: dict[str, Callable[[Any, Any], Any]] = {"all": operator.and_, "any": operator.or_}
NOT, BLOCK = "not", "block"
MAX_PARTS = 200  # of one pattern; each costs every kernel that runs it


def words() -> tuple[str, ...]:
    """The keys that a form may have."""
    return (*PATTERNS, *COMBINE, NOT, BLOCK)


def reserved() -> tuple[str, ...]:
    """The words that no pattern of a file may be named; a preset's name it may have, and bare it is then its own."""
    presets = {constructor.__name__ for constructor in PRESETS}
    return tuple(word for word in words() if word not in presets)


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The fields of a primitive: its constructor's parameters."""
    return inspect.signature(PATTERNS[name]).parameters


def is_plain(name: str) -> bool:
    """Whether a primitive or a preset needs no fields, so that its name alone is a form."""
    return all(p.default is not p.empty for p in parameters(name).values())


class Builder:
    """Builds the patterns of one spec: each named form once, references followed, cycles refused."""

    def __init__(self, source: Source, forms: Mapping[str, Any]) -> None:
        self.source, self.forms = source, forms
        self.built: dict[str, tuple[Pattern, int]] = {}
        self.open: list[str] = []

    def pattern(self, form: Any, path: Path) -> Pattern:
        """The pattern of a form that is written at `path`. Raises SpecError."""
        return self._build(form, path)[0]

    def named(self, name: str, path: Path) -> Pattern:
        """The pattern of that name, used at `path`."""
        return self._named(name, path)[0]

    def _named(self, name: str, path: Path) -> tuple[Pattern, int]:
        if name in self.built:
            return self.built[name]
        if name in self.open:
            circle = " -> ".join([*self.open[self.open.index(name) :], name])
            raise self.source.error(path, f"the pattern '{name}' refers to itself: {circle}")
        if name in self.forms:
            self.open.append(name)
            self.built[name] = self._build(self.forms[name], ("patterns", name))
            self.open.pop()
            return self.built[name]
        if name in PATTERNS and is_plain(name):
            return PATTERNS[name](), 1
        raise self.source.error(path, self._unknown(name))

    def _unknown(self, name: str) -> str:
        if name in PATTERNS:
            return f"'{name}' needs its fields ({_usage(name)}), as in {{{name}: ...}}"
        names = [*self.forms, *(plain for plain in PATTERNS if is_plain(plain))]
        return f"unknown pattern '{name}'; {nearest(name, names)}"

    def _build(self, form: Any, path: Path) -> tuple[Pattern, int]:
        if len(path) > 64:
            raise self.source.error(path[:3], "nested too deeply")
        if isinstance(form, Pattern):
            return form, 1
        if isinstance(form, str):
            return self._named(form, path)
        if not isinstance(form, Mapping) or not form or not all(isinstance(key, str) for key in form):
            raise self.source.error(
                path, f"expected a pattern (a name, or a mapping such as {{window: 1024}}), found {shown(form)}"
            )
        parts = self._parts(form, path)
        weight = sum(weight for _, weight in parts)
        if weight > MAX_PARTS:
            raise self.source.error(path, f"a pattern of {weight} parts is larger than the {MAX_PARTS} allowed")
        if NOT in form:
            return ~parts[0][0], weight
        join = next((COMBINE[key] for key in form if key in COMBINE), operator.or_)
        return functools.reduce(join, [part for part, _ in parts]), weight

    def _parts(self, form: Mapping[str, Any], path: Path) -> list[tuple[Pattern, int]]:
        for key in form:
            if key not in words():
                raise self.source.error((*path, key), self._unknown_key(key), at_key=True)
            if (key in COMBINE or key == NOT) and len(form) > 1:
                raise self.source.error((*path, key), f"'{key}' must stand alone in its mapping", at_key=True)
        (first, inner), *_ = form.items()
        if first == NOT:
            return [self._build(inner, (*path, NOT))]
        if first in COMBINE:
            if not isinstance(inner, list | tuple) or not inner:
                raise self.source.error((*path, first), f"expected a list of patterns, found {shown(inner)}")
            return [self._build(part, (*path, first, i)) for i, part in enumerate(inner)]
        block = self._block(form, path)
        return [(self._primitive(key, form[key], block, (*path, key)), 1) for key in form if key != BLOCK]

    def _unknown_key(self, key: str) -> str:
        if key in self.forms:
            return f"'{key}' is a pattern's name, not a primitive; combine names with any: [{key}, ...] or all: [...]"
        return f"unknown pattern '{key}'; {nearest(key, words())}"

    def _block(self, form: Mapping[str, Any], path: Path) -> int | None:
        if BLOCK not in form:
            return None
        block, where = form[BLOCK], (*path, BLOCK)
        if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= 2**20:
            raise self.source.error(where, f"expected an integer from 1 to {2**20}, found {shown(block)}")
        others = [key for key in form if key != BLOCK and key not in BLOCKED]
        if others or len(form) == 1:
            found = f"'{others[0]}'" if others else "nothing else"
            raise self.source.error(where, f"goes with {', '.join(BLOCKED)} only, found {found}", at_key=True)
        return block

    def _primitive(self, name: str, value: Any, block: int | None, path: Path) -> Pattern:
        fields = self._fields(name, value, path)
        try:
            pattern = PATTERNS[name](**fields)
            return pattern if block is None else at_block(pattern, block, fields)
        except PatternError as error:
            raise self._placed(str(error), name, path, isinstance(value, Mapping)) from None
        except RecursionError:
            raise self.source.error(path, "the expression is nested too deeply") from None

    def _fields(self, name: str, value: Any, path: Path) -> dict[str, Any]:
        allowed = parameters(name)
        if value is None:
            raise self.source.error(path, f"expected the fields of {name} ({_usage(name)}), found nothing")
        if not isinstance(value, Mapping):
            if not allowed:
                raise self.source.error(path, f"takes no fields, so write the name alone ({name}), not {shown(value)}")
            value = {next(iter(allowed)): value}
        for key in value:
            if key not in allowed:
                hint = nearest(key, allowed) if allowed and isinstance(key, str) else f"allowed: {_usage(name)}"
                raise self.source.error((*path, key), f"unknown field '{key}' of {name}; {hint}", at_key=True)
        missing = [key for key, p in allowed.items() if p.default is p.empty and key not in value]
        if missing:
            raise self.source.error(path, f"the field '{missing[0]}' of {name} is missing (fields: {_usage(name)})")
        return dict(value)

    def _placed(self, message: str, name: str, path: Path, by_field: bool) -> SpecError:
        """A constructor's own error, at the field that it names."""
        for field in parameters(name):
            prefix = f"{name}.{field}: "
            if message.startswith(prefix):
                return self.source.error((*path, field) if by_field else path, message.removeprefix(prefix))
        return self.source.error(path, message)


def _usage(name: str) -> str:
    """`size, ahead=0`."""
    found = parameters(name).values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in found) or "none"
