"""What a selector's fields may be. Each error is one sentence that names the field, what was found, what is allowed."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar

from sparsify.errors import PatternError, nearest

if TYPE_CHECKING:
    from sparsify.patterns.selector import Selector

T = TypeVar("T")


def integer(value: object, field: str, low: int) -> None:
    """Refuses what is no integer >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise PatternError(f"{field}: expected an integer >= {low}, found {value!r}")


def number(
    value: object, field: str, low: float | None = None, high: float | None = None, above: bool = False
) -> float:
    """The value as a float, in [low, high], or (low, high] with `above`."""
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and least <= value <= most and not (above and value == low):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    allowed = "a number" if low is None else f"a number {'above' if above else '>='} {low:g}"
    allowed += "" if high is None else f" and at most {high:g}"
    raise PatternError(f"{field}: expected {allowed}, found {value!r}")


def one_of(value: object, field: str, words: tuple[str, ...], with_number: tuple[str, ...] = ()) -> None:
    """Refuses what is none of the words, nor a `word(n)` with n >= 1 for a word of `with_number`."""
    if isinstance(value, str):
        if value in words:
            return
        match = re.fullmatch(r"(\w+)\(([1-9]\d{0,8})\)", value)
        if match and any(match[1] == word.partition("(")[0] for word in with_number):
            return
    raise PatternError(f"{field}: '{value}' is not known ({nearest(str(value), words + with_number)})")


def argument(word: str) -> int:
    """The n of `word(n)`, 0 for a plain word."""
    return int(word[word.index("(") + 1 : -1]) if "(" in word else 0


def check_hook(name: object, field: str) -> None:
    """Refuses what can't name a module."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise PatternError(f"{field}: expected a hook's name of letters, digits, '_', '.' and '-', found {name!r}")


def part(kind: type[T], name: str, given: Any) -> T:
    """A dataclass from the fields that a text gives for it."""
    if not isinstance(given, dict):
        raise PatternError(f"{name}: expected fields in braces, found {given!r}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for found in given:
        if found not in known:
            raise PatternError(f"{name}.{found}: no such field ({nearest(found, known)})")
    for field in known.values():
        if field.default is MISSING and field.name not in given:
            raise PatternError(f"{name}.{field.name}: must be given")
    return kind(**given)


def check_fields(selector: Selector) -> None:
    """Refuses parts that have no meaning together."""
    for check in (
        _check_kinds,
        _check_choice,
        _check_learned,
        _check_views,
        _check_force,
        _check_measure,
        _check_lines,
        _check_permute,
    ):
        check(selector)


def _check_kinds(s: Selector) -> None:
    for name in ("unit", "score", "heads", "force", "budget", "lines", "permute"):
        kind, value = name.capitalize(), getattr(s, name)
        if type(value).__name__ != kind and not (name in ("budget", "lines", "permute") and value is None):
            raise PatternError(f"{name}: expected a {kind}, found {value!r}")


def _check_choice(s: Selector) -> None:
    if s.budget is None and s.lines is None:
        raise PatternError("budget: nothing says how much to keep, so give a budget or lines")
    if s.lines is not None and (s.budget is not None) != (s.lines.switch is not None):
        raise PatternError("budget: lines say how much to keep; only heads that lines.switch takes out have a budget")


def _check_learned(s: Selector) -> None:
    if s.learned is None:
        return
    check_hook(s.learned, "learned")
    if s.score != type(s.score)(domain=s.score.domain, causal=s.score.causal, smooth="none"):
        raise PatternError(f"score: the hook '{s.learned}' gives unit scores, so of score only domain and causal apply")
    if s.heads.when != "unit":
        raise PatternError(f"heads.when: a hook's scores are a unit's, so it must be 'unit', found '{s.heads.when}'")
    if s.lines:
        raise PatternError(f"lines: the hook '{s.learned}' scores units, and lines have none")


def _check_views(s: Selector) -> None:
    stride = s.score.stride
    for name, size in (("q", s.unit.q), ("k", s.unit.k)):
        if stride and size % stride:
            raise PatternError(f"unit.{name}: expected a multiple of the stride {stride}, found {size}")
    if s.score.kview == "rep_search" and s.unit.k & (s.unit.k - 1):
        raise PatternError(f"unit.k: rep_search halves a unit down to one key, so a power of two, found {s.unit.k}")
    if s.score.kview == "rep_search" and s.heads.when in ("pre", "token"):
        raise PatternError(
            f"heads.when: with rep_search each head finds keys of its own, so 'query' or 'unit', found '{s.heads.when}'"
        )
    if s.phase == "decode" and s.score.norm == "accumulated" and s.score.history is None:
        raise PatternError("score.history: at decode accumulated sums are kept for the most keys there can be; give it")
    if s.score.domain == "middle" and not s.force.any:
        raise PatternError("score.domain: 'middle' is what lies between forced units, and nothing is forced")
    if s.score.domain == "middle" and s.score.last:
        raise PatternError(f"score.domain: 'middle' differs from row to row, and {s.score.qview} is the same for all")


def _check_force(s: Selector) -> None:
    force, budget = s.force, s.budget
    if force.exempt is not None and s.heads.scope != "head":
        raise PatternError(f"force.exempt: a head's own, so heads.scope must be 'head', found '{s.heads.scope}'")
    if not force.counted or budget is None:
        return
    if budget.rule not in ("topk", "ratio", "topp"):
        raise PatternError(f"force.counted: {budget.rule} has no number or sum that forced units could use up")
    if budget.rule == "topp" and s.score.domain == "middle":
        raise PatternError("force.counted: forced units outside the domain 'middle' have no share of topp to count")
    if force.exempt is not None:
        raise PatternError("force.counted: exempt units have no number known beforehand, so they can't count")
    if budget.rule == "topk" and s.most_forced() > budget.value:
        most = s.most_forced()
        raise PatternError(f"budget.value: {budget.value} units can't hold the {most} that are forced and counted")


def _check_measure(s: Selector) -> None:
    rule = s.budget.rule if s.budget else ""
    if s.heads.op == "best_rank" and rule not in ("topk", "ratio"):
        raise PatternError(
            f"heads.op: best_rank gives an order, which serves topk and ratio, found '{rule or 'lines'}'"
        )
    if rule in ("topp", "relmax") and s.score.norm == "none" and not s.learned:
        raise PatternError(f"score.norm: {rule} needs scores >= 0, so softmax, exp_rowmax or accumulated, found 'none'")


def _check_lines(s: Selector) -> None:
    if not s.lines:
        return
    if not s.score.last:
        raise PatternError(f"score.qview: lines are scored by the last queries, so last(n), found '{s.score.qview}'")
    for name, found, wanted in (
        ("score.kview", s.score.kview, "token"),
        ("score.norm", s.score.norm, "softmax"),
        ("score.domain", s.score.domain, "all"),
        ("score.causal", s.score.causal, "touch"),
        ("score.pool", s.score.pool, "sum"),
        ("score.smooth", s.score.smooth, "none"),
    ):
        if found != wanted:
            raise PatternError(f"{name}: lines need '{wanted}', found '{found}'")
    if s.lines.cover is not None and s.unit.q != s.unit.k:
        raise PatternError(f"unit.q: diagonals of whole units need unit.k = {s.unit.k}, found {s.unit.q}")
    if s.lines.cover is not None and s.heads.scope != "head":
        raise PatternError(f"heads.scope: lines.cover is a head's own, so it must be 'head', found '{s.heads.scope}'")
    if s.budget is not None and s.budget.rule != "topp":
        raise PatternError(f"budget.rule: heads that lines.switch takes out have topp, found '{s.budget.rule}'")
    if s.force != type(s.force)():
        raise PatternError("force: lines have forced ones of their own (lines.first and lines.last)")


def _check_permute(s: Selector) -> None:
    if not s.permute:
        return
    if s.permute.segment % s.unit.k:
        raise PatternError(f"permute.segment: expected a multiple of unit.k = {s.unit.k}, found {s.permute.segment}")
    if s.lines:
        raise PatternError(
            "permute: lines are columns and diagonals of keys in their own order, so leave one of them out"
        )
    if s.learned is not None:
        raise PatternError(f"permute: the hook '{s.learned}' scores units of keys in their own order, so leave it out")
    if s.heads.scope == "layer":
        raise PatternError(
            "heads.scope: each key head has its own order of keys, so 'head' or 'kv_group', found 'layer'"
        )
    if s.score.norm == "accumulated":
        raise PatternError("score.norm: accumulated sums are of keys in their own order, and permute sorts them")
    if s.force.local:
        raise PatternError(
            f"force.local: with permute a query's own segment is kept anyway, so leave it out, found {s.force.local}"
        )
    if s.force.sink and s.force.of != "tokens":
        raise PatternError("force.of: units of sorted keys have no first one, so sinks are counted in 'tokens'")
