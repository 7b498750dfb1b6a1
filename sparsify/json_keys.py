"""Keys of JSON objects: Python's reader takes the last of equal ones without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.errors import InputError


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, as `object_pairs_hook` of `json.loads`. Raises InputError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InputError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return found
