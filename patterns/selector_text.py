"""A selector's canonical text: JSON with sorted keys and defaults left out."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

from sparsify.errors import PatternError


def write(value: object) -> str:
    """The text of a frozen dataclass whose fields are plain values and such dataclasses."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))


def read(text: str) -> dict[str, Any]:
    """The fields that a text gives. Raises PatternError if it is no JSON object."""
    try:
        given = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise PatternError(f"selector: '{str(text)[:60]}' is not JSON") from None
    if not isinstance(given, dict):
        raise PatternError(f"selector: expected a JSON object, found {text[:60]}")
    return given


def _plain(value: object) -> object:
    if not is_dataclass(value):
        return value
    set_fields = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    return {name: _plain(inner) for name, inner in set_fields.items()}
