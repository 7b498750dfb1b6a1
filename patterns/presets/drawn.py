"""What a pattern that chooses by data keeps of made-up data, to draw it."""

from __future__ import annotations

from typing import Any

from sparsify.patterns.pattern import Pattern


def made_up(pattern: Pattern, q_len: int, k_len: int) -> Any:
    """A bool array (1, q_len, k_len): what one head keeps of random queries and keys that drift along the sequence."""
    from sparsify.selection.example import kept_of_made_up

    return kept_of_made_up(pattern, q_len, k_len)
