"""Patterns over a grid of tokens in one to three dimensions: coordinates, and what every such pattern checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sparsify.errors import PatternError
from sparsify.expr import Expr, Pred
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.ranges import Ranges, joined
from sparsify.sizes import LIMIT

DIMENSIONS = 3
Coordinates = tuple[Expr, ...]


class Grid(Pattern):
    """A rule over the coordinates of tokens that lie in row-major order from position `start` of the sequence.

    A subclass is a frozen dataclass with these two fields and `keep_at`. Tokens before and after the grid keep nothing.
    """

    shape: tuple[int, ...]
    start: int

    def keep_at(self, q: Coordinates, k: Coordinates) -> Pred:
        """The predicate for a query and a key at these coordinates inside the grid, whatever expressions give them."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """How many tokens the grid has."""
        return math.prod(self.shape)

    @property
    def dilations(self) -> tuple[int, ...]:
        """How far apart the tokens are, in each dimension, that see each other: 1 unless a subclass says more."""
        return (1,) * len(self.shape)

    def keep(self) -> Pred:
        q, k = Q - self.start, K - self.start
        inside = (q >= 0) & (q < self.tokens) & (k >= 0) & (k < self.tokens)
        return inside & self.keep_at(coordinates(q, self.shape), coordinates(k, self.shape))

    def too_large(self, n: int) -> str:
        if self.start + self.tokens <= n:
            return ""
        return f"{self._what}{f' from position {self.start}' if self.start else ''}, but there are {n} keys"

    def outside(self, n: int) -> Ranges:
        return joined((a, b - 1) for a, b in ((0, self.start), (self.start + self.tokens, n)) if a < b)

    def outside_of(self, n: int) -> str:
        return f"{self._what}, but there are {n} keys"

    @property
    def _what(self) -> str:
        whole = " x ".join(map(str, self.shape))
        return f"{type(self).__name__.lower()}.shape: {whole} is {self.tokens} tokens"


def grids(pattern: Pattern) -> tuple[Grid, ...]:
    """The grids in a pattern, however it is composed."""
    own = (pattern,) if isinstance(pattern, Grid) else ()
    return own + tuple([grid for part in pattern.parts() for grid in grids(part)])


def coordinates(token: Expr, shape: tuple[int, ...]) -> Coordinates:
    """The coordinates of a token of the grid by its row-major number, the slowest first."""
    below = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return tuple(token // size if axis == 0 else token // size % shape[axis] for axis, size in enumerate(below))


def written(value: Any) -> Any:
    """A value as a spec would write it: tuples as lists."""
    return list(value) if isinstance(value, tuple) else value


def called(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The call that makes a pattern, the first argument by place: `neighborhood([4, 4], window=[2, 2])`."""
    shown = {field: written(value) for field, value in given.items()}
    shown = {field: value for field, value in shown.items() if field not in defaults or value != defaults[field]}
    first = next(iter(given), None)
    return f"{name}({', '.join(repr(v) if f == first else f'{f}={v!r}' for f, v in shown.items())})"


def whole(value: Any, field: str, low: int = 1) -> int:
    """An integer of at least `low`. Raises PatternError naming the field."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LIMIT:
        raise PatternError(f"{field}: expected an integer >= {low}, found {_shown(value)}")
    return value


def flag(value: Any, field: str) -> bool:
    """True or False. Raises PatternError naming the field."""
    if not isinstance(value, bool):
        raise PatternError(f"{field}: expected true or false, found {_shown(value)}")
    return value


def read_shape(value: Any, field: str) -> tuple[int, ...]:
    """One to three positive integers; one alone is a shape in one dimension. Raises PatternError naming the field."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not 1 <= len(sizes) <= DIMENSIONS:
        raise PatternError(f"{field}: expected 1 to {DIMENSIONS} dimensions, found {_shown(value)}")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise PatternError(f"{field}: expected positive integers, found {_shown(value)}")
    if math.prod(sizes) > LIMIT:
        raise PatternError(f"{field}: expected at most 2**40 tokens, found {_shown(value)}")
    return sizes


def per_dimension(value: Any, field: str, dimensions: int, read: Callable[[Any, str], Any] = whole) -> tuple[Any, ...]:
    """One value for all dimensions, or a list of one for each. Raises PatternError naming the field."""
    if not isinstance(value, list | tuple):
        return (read(value, field),) * dimensions
    if len(value) != dimensions:
        raise PatternError(
            f"{field}: expected one value, or one for each of {dimensions} dimensions, found {_shown(value)}"
        )
    return tuple(read(part, field) for part in value)


def shared(values: tuple[Any, ...]) -> Any:
    """The value that all dimensions share, or the values as they are."""
    return values[0] if len(set(values)) == 1 else values


def _shown(value: Any) -> str:
    text = repr(written(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
