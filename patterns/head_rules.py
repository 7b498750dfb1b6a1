"""What a head's pattern may say beside the keys that it keeps: an `online` budget, `compensation`, `lifetimes` of keys.

Frozen values without tensors, as selectors are, and like them held by a `Choice` (`select.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.patterns.selector_checks import check_hook, integer, number


@dataclass(frozen=True)
class Online:
    """No list but a budget of the kernel's own (BLASST): a tile of keys whose greatest score is below the running
    maximum + log(share) is skipped. With by_length the share is divided by N first, and 1 at most."""

    share: float
    by_length: bool = False

    def __post_init__(self) -> None:
        most = None if self.by_length else 1.0
        object.__setattr__(self, "share", number(self.share, "online.share", 0.0, most, above=True))
        if not isinstance(self.by_length, bool):
            raise PatternError(f"online.by_length: expected true or false, found {self.by_length!r}")


@dataclass(frozen=True)
class Compensation:
    """No choice: all that a head drops joins what it keeps as one key (RazorAttention): the mean of the dropped keys,
    with the mean of their values, as often as they are many."""


@dataclass(frozen=True)
class Lifetimes:
    """No list but a last position for each key of a key head (NAtS), from the type that the module `learned` gives it:
    a global key is kept by all later queries, a local one up to the next global one, others for `window` positions."""

    learned: str
    window: int
    phase = "both"
    semantics = "native"

    def __post_init__(self) -> None:
        check_hook(self.learned, "lifetimes.learned")
        integer(self.window, "lifetimes.window", 0)
