"""From patterns back to the forms of a spec: what `Spec.to_dict` and `Spec.save` write."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from sparsify.patterns import PATTERNS, Pattern
from sparsify.patterns.pattern import Both, Either, Except
from sparsify.patterns.presets import Preset
from sparsify.patterns.select import Selection
from sparsify.sizes import Size
from sparsify.spec.forms import parameters


def form_of(pattern: Pattern) -> Any:
    """The form that builds an equal pattern; the pattern itself where no form can (a class of the user's own)."""
    match pattern:
        case Either():
            return _union([form_of(part) for part in _spine(pattern, Either)])
        case Both():
            return {"all": [form_of(part) for part in _spine(pattern, Both)]}
        case Except(inner):
            return {"not": form_of(inner)}
    return _primitive(pattern)


def _spine(pattern: Pattern, kind: type[Both] | type[Either]) -> list[Pattern]:
    """The parts of a | b | c, which is (a | b) | c: a form's list is joined from the left, too."""
    parts = []
    while isinstance(pattern, kind):
        parts.append(pattern.right)
        pattern = pattern.left
    return [pattern, *reversed(parts)]


def _union(forms: list[Any]) -> Any:
    """One mapping where all are primitives with fields, each of another name; else `any`."""
    keys = [next(iter(form)) for form in forms if isinstance(form, Mapping) and len(form) == 1]
    if len(keys) == len(forms) == len(set(keys)) and all(key in PATTERNS for key in keys):
        return {key: value for form in forms for key, value in form.items()}
    return {"any": forms}


def _primitive(pattern: Pattern) -> Any:
    name = pattern.name if isinstance(pattern, Preset) else _constructor(pattern)
    if name not in PATTERNS:
        return pattern
    allowed, arguments = parameters(name), pattern.arguments()
    values = {key: _plain(arguments[key]) for key in allowed if key in arguments}
    if not allowed:
        return name
    if PATTERNS[name](**values) != pattern:
        return pattern
    given = {key: value for key, value in values.items() if value != allowed[key].default}
    return {name: next(iter(given.values())) if list(given) == [next(iter(allowed))] else given}


def _constructor(pattern: Pattern) -> str | None:
    if isinstance(pattern, Selection):
        return pattern.constructor
    return next((n for n, build in PATTERNS.items() if build.__module__ == type(pattern).__module__), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Size):
        return int(value.text) if value.text.lstrip("-").isdigit() else value.text
    return list(value) if isinstance(value, tuple) else value


def yaml_text(value: Mapping[str, Any], comment: str = "") -> str:
    """A spec's dictionary as YAML under the lines of a comment."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = None, False, 100
    text = io.StringIO()
    yaml.dump(value, text)
    return "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + text.getvalue()
