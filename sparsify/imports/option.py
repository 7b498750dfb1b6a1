"""What a file leaves open and its reader may be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import InputError, nearest


@dataclass(frozen=True)
class Option:
    """A number: whole (`int`) or not, of at least `low` and at most `high`; None where it isn't given."""

    kind: type
    default: int | float | None
    help: str
    low: float = 0
    high: float = math.inf

    def checked(self, value: Any, name: str) -> Any:
        """The value, if it is allowed. Raises InputError naming the option."""
        if value is None:
            return self.default
        good = isinstance(value, int if self.kind is int else int | float) and not isinstance(value, bool)
        if not good or not self.low <= value <= self.high:
            what = "an integer" if self.kind is int else "a number"
            bounds = f"of at least {self.low}" if math.isinf(self.high) else f"from {self.low} to {self.high}"
            raise InputError(f"import: {name}: expected {what} {bounds}, found {value!r}")
        return value


def checked_options(given: Mapping[str, Any], allowed: Mapping[str, Option], name: str) -> dict[str, Any]:
    """Every option of a format, as given or by default. Raises InputError for one that the format hasn't."""
    for option, value in given.items():
        if option not in allowed and value is not None:
            hint = nearest(option, allowed) if allowed else "it has none"
            raise InputError(f"import: '{option}' is no option of {name}; {hint}")
    return {option: one.checked(given.get(option), option) for option, one in allowed.items()}
