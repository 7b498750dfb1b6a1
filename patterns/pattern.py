"""What a pattern is: a rule that says which (head, query, key) triples are kept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sparsify.errors import PatternError
from sparsify.expr import Pred, Var, as_pred, conjunction, disjunction, negate
from sparsify.foldable import foldable
from sparsify.ranges import Ranges, joined, text_of
from sparsify.sizes import Size
from sparsify.text import parse_pred, to_text

if TYPE_CHECKING:
    import torch

H, Q, K, N = Var("h"), Var("q"), Var("k"), Var("N")


@dataclass(frozen=True)
class Pattern:
    """A frozen, hashable rule over absolute query and key positions. Compose rules with `&`, `|`, `~`.

    A subclass has one method, `keep()`, which states its predicate in terms of `H, Q, K, N`. Sizes are integers or
    expressions in N, the number of keys.

    rule: the predicate's canonical text, made once. torch.compile reads it, guards on it, and needs nothing else of a
    pattern. (A subclass with a `__post_init__` of its own calls this one at its end.)
    """

    def __post_init__(self) -> None:
        given = tuple([_plain(getattr(self, name)) for name in self.__match_args__])
        object.__setattr__(self, "rule", _rule_of(type(self), self.__match_args__, given))

    def keep(self) -> Pred:
        """The predicate that is true where a pair is kept."""
        name = type(self).__name__
        raise PatternError(f"{name} has no keep(): give it one that returns a predicate of H, Q, K, N, such as K <= Q")

    def parts(self) -> tuple[Pattern, ...]:
        """The patterns that this one is made of: those of `&`, `|`, `~` and of a preset; none for a primitive."""
        return ()

    def arguments(self) -> dict[str, object]:
        """The arguments of the constructor that makes this pattern, as plain as a spec would write them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def fits(self, n: int) -> str:
        """What is wrong with this pattern where there are `n` keys, in one sentence, or ""."""
        outside = text_of(self.outside(n))
        return self.too_large(n) or (outside and f'{self.outside_of(n)}; give the others to global_tokens: "{outside}"')

    def too_large(self, n: int) -> str:
        """What is wrong where a part is of more than `n` tokens, or ""."""
        return next(filter(None, (part.too_large(n) for part in self.parts())), "")

    def outside(self, n: int) -> Ranges:
        """The tokens, of `n`, that keep nothing as they are in no grid of this pattern."""
        return joined(pair for part in self.parts() for pair in part.outside(n))

    def outside_of(self, n: int) -> str:
        """What leaves tokens outside, as the beginning of a sentence."""
        return next(filter(None, (part.outside_of(n) for part in self.parts())), "")

    def __and__(self, other: Pattern) -> Pattern:
        return Both(self, _checked(other, "&"))

    def __or__(self, other: Pattern) -> Pattern:
        return Either(self, _checked(other, "|"))

    def __invert__(self) -> Pattern:
        return Except(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a pattern has no truth value: write `a & b`, `a | b`, `~a`, or p.mask(...) to see what it keeps"
        )

    def mask(self, heads: int, q_len: int, k_len: int, q_offset: int | None = None) -> torch.Tensor:
        """The rule evaluated everywhere: a bool tensor (heads, q_len, k_len), True where kept.

        `q_offset` is the absolute position of the first query, by default k_len - q_len. This is the definition that
        kernels and tile analysis are tested against.
        """
        from sparsify.patterns.dense_mask import dense_mask

        return dense_mask(self.keep(), heads, q_len, k_len, q_offset)

    def density(self, heads: int, q_len: int, k_len: int, q_offset: int | None = None) -> float:
        """The share of all heads * q_len * k_len pairs that is kept, counted by tiles (no dense mask is made)."""
        from sparsify.patterns.count import kept_pairs

        kept = kept_pairs(self.keep(), heads, q_len, k_len, q_offset)
        return kept / (heads * q_len * k_len) if heads * q_len * k_len else 0.0

    def __str__(self) -> str:
        name = _snake(type(self).__name__)
        shown = []
        for i, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(_show(value) if i == len(shown) else f"{field.name}={_show(value)}")
        return f"{name}({', '.join(shown)})"


def _show(value: object) -> str:
    text = str(value)
    return repr(text) if "N" in text or text == "head" else text


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


def _checked(other: object, op: str) -> Pattern:
    if not isinstance(other, Pattern):
        raise PatternError(f"a pattern can be combined by {op} with another pattern only, found {other!r}")
    return other


# Under torch.compile only constants reach these functions: fields as plain values, and compositions as their rules.


def _plain(value: object) -> object:
    return ("size", value.text) if isinstance(value, Size) else value


@foldable
def _rule_of(kind: type[Pattern], names: tuple[str, ...], given: tuple[object, ...]) -> str:
    twin = object.__new__(kind)
    for name, value in zip(names, given, strict=True):
        is_size = isinstance(value, tuple) and value[:1] == ("size",)
        object.__setattr__(twin, name, Size(value[1]) if is_size else value)
    return to_text(_stated(twin))


def _stated(pattern: Pattern) -> Pred:
    """What a pattern keeps. Raises PatternError where `keep()` uses or gives something else than a predicate."""
    try:
        return as_pred(pattern.keep())
    except TypeError as error:
        raise PatternError(f"{type(pattern).__name__}.keep(): {error}") from error


@foldable
def _both(left: str, right: str) -> str:
    return to_text(conjunction([parse_pred(left), parse_pred(right)]))


@foldable
def _either(left: str, right: str) -> str:
    return to_text(disjunction([parse_pred(left), parse_pred(right)]))


@foldable
def _opposite(rule: str) -> str:
    return to_text(negate(parse_pred(rule)))


@dataclass(frozen=True)
class Both(Pattern):
    """Kept by both: `left & right`."""

    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _both(self.left.rule, self.right.rule))

    def parts(self) -> tuple[Pattern, ...]:
        return self.left, self.right

    def keep(self) -> Pred:
        return conjunction([self.left.keep(), self.right.keep()])

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Either) else str(part) for part in (self.left, self.right))


@dataclass(frozen=True)
class Either(Pattern):
    """Kept by one of two: `left | right`."""

    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _either(self.left.rule, self.right.rule))

    def parts(self) -> tuple[Pattern, ...]:
        return self.left, self.right

    def outside(self, n: int) -> Ranges:
        left, right = (part.outside(n) for part in self.parts())
        return joined((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) <= min(b, d))

    def keep(self) -> Pred:
        return disjunction([self.left.keep(), self.right.keep()])

    def __str__(self) -> str:
        return f"{self.left} | {self.right}"


@dataclass(frozen=True)
class Except(Pattern):
    """Kept where the other drops: `~pattern`."""

    pattern: Pattern

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _opposite(self.pattern.rule))

    def parts(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def outside(self, n: int) -> Ranges:
        return ()

    def keep(self) -> Pred:
        return negate(self.pattern.keep())

    def __str__(self) -> str:
        return f"~({self.pattern})" if isinstance(self.pattern, Both | Either) else f"~{self.pattern}"
