"""expr: any rule, written as an expression over h, q, k and N."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.expr import Pred, variables
from sparsify.patterns.pattern import Pattern
from sparsify.text import parse_pred


@dataclass(frozen=True)
class Expression(Pattern):
    """A predicate given as text."""

    text: str

    def keep(self) -> Pred:
        return parse_pred(self.text, sources=())

    def __str__(self) -> str:
        return f"expr({self.text!r})"


def expr(text: str) -> Pattern:
    """A rule such as `expr("k <= q and (q - k) % 7 < 2")`: comparisons, and / or / not, + - * // %, min, max, abs.

    The text is read through a whitelist and never run. Raises PatternError naming whatever is not allowed.
    """
    for name in sorted(variables(parse_pred(text, sources=())) & {"b", "Nq"}):
        raise PatternError(f"expression '{text}': a pattern can't depend on {name} (only on h, q, k and N)")
    return Expression(text)
