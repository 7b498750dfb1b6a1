"""Everything a user is told when something is refused: one door for errors and refusals."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class SparsifyError(Exception):
    """Base of every error that sparsify raises on purpose."""


class PatternError(SparsifyError, ValueError):
    """A pattern was built from values it can't have."""


class SpecError(SparsifyError, ValueError):
    """A spec can't be read or doesn't fit the model; names file, line and column where there are any."""


class InputError(SparsifyError, ValueError):
    """Tensors or options given to sparsify don't fit together."""


class BuildError(SparsifyError, RuntimeError):
    """A generated kernel could not be compiled or loaded."""


class RefusedError(SparsifyError, RuntimeError):
    """A site was refused and `strict` asked for that to be an error."""


class VerifyError(SparsifyError, RuntimeError):
    """A recovered mask or an output is not the model's own, and `verify` asked to look."""


@dataclass(frozen=True)
class CodeLine:
    """A line of somebody's code."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it was. Falsy, so `if not result` reads well and the reason is never lost.

    node: where in the graph; line: the line of the model's code that made it, if it is known.
    """

    reason: str
    node: str = ""
    hint: str = ""
    line: CodeLine | None = None

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        where = (f" at {self.node}" if self.node else "") + (f", {self.line}" if self.line else "")
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.reason}{where}{hint}"


def nearest(found: str, allowed: Iterable[str]) -> str:
    """The hint `did you mean 'x'?` for a mistyped name, or the list of what is allowed when nothing is close."""
    names = sorted(allowed)
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"allowed: {', '.join(names)}"
