"""select: keys chosen from the data by a selector, and what layers and steps share of a choice.

`select` takes every step of the pipeline; `topk` and `topp` name the usual ones, `online` and `compensation`
choose no keys: they say what is made of those that the rest of a pattern keeps or drops.

    Selection       a pattern: one text, that of its Choice
    Choice          a Selector (the pipeline) with its Reuse over layers and steps; or Online, or Compensation
    Chosen          the atom that stands for a Choice in a predicate, until a graph or a call has tensors
    select, Ask     the op that chooses, and what it is asked: it gives index and count of each list
    Listed          the atom that stands for a list in a program's predicate
    ListPass        a kernel's loop over one list
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sparsify.errors import PatternError, nearest
from sparsify.expr import Chosen, Pred
from sparsify.foldable import foldable
from sparsify.patterns.head_rules import Compensation, Lifetimes, Online
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.reuse import Reuse
from sparsify.patterns.selector import PARTS, Selector
from sparsify.patterns.selector_checks import part
from sparsify.ranges import Ranges, contains, read_ranges, text_of


@dataclass(frozen=True)
class Choice:
    """All that a selection says of itself: what `Chosen` holds as text.

    selector: the pipeline that chooses keys; or the kernel's own budget (`Online`), which keeps every pair that it
    meets but for those of no weight; or a key for what is dropped (`Compensation`), which keeps every pair; or how long
    each key lives (`Lifetimes`). reuse: which layers and steps share what was chosen. dense_layers: those that keep
    everything.
    """

    selector: Selector | Online | Compensation | Lifetimes
    reuse: Reuse = Reuse()
    dense_layers: Ranges = ()

    def __post_init__(self) -> None:
        for source, _ in self.reuse.layers:
            if contains(self.dense_layers, source):
                raise PatternError(
                    f"reuse.layers: layer {source} is to choose for others, and dense_layers keeps it from choosing"
                )

    def text(self) -> str:
        """Canonical JSON: defaults are left out."""
        if not isinstance(self.selector, Selector):
            kind = type(self.selector)
            own = {f.name: getattr(self.selector, f.name) for f in fields(kind)}
            found: dict[str, Any] = {kind.__name__.lower(): own}
        else:
            found = {"select": json.loads(self.selector.text())}
        if self.reuse != Reuse():
            found["reuse"] = self.reuse.to_data()
        if self.dense_layers:
            found["dense_layers"] = text_of(self.dense_layers)
        return json.dumps(found, sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Reads `text()` back."""
        return _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Choice:
    found = json.loads(text)
    for kind in (Online, Compensation, Lifetimes):
        if (name := kind.__name__.lower()) in found:
            return Choice(kind(**found[name]))
    selector = Selector.parse(json.dumps(found["select"]))
    reuse = Reuse.from_data(found.get("reuse", {}))
    return Choice(selector, reuse, read_ranges(found["dense_layers"]) if "dense_layers" in found else ())


@dataclass(frozen=True)
class Selection(Pattern):
    """Keys that a choice keeps; `text` is that of a `Choice`."""

    text: str

    @property
    def choice(self) -> Choice:
        return Choice.parse(self.text)

    def keep(self) -> Pred:
        return Chosen(self.text)

    def arguments(self) -> dict[str, Any]:
        """Those of its constructor that make it again, defaults left out."""
        selector = self.choice.selector
        if isinstance(selector, Compensation):
            return {}
        if isinstance(selector, Lifetimes):
            return {"learned": selector.learned, "window": selector.window}
        if isinstance(selector, Online):
            return {"share": selector.share} | ({"by_length": True} if selector.by_length else {})
        found = json.loads(self.text)
        return found.pop("select") | found

    @property
    def constructor(self) -> str:
        """The name of the one of `select`, `online`, `compensation` and `lifetimes` that makes it."""
        selector = self.choice.selector
        return "select" if isinstance(selector, Selector) else type(selector).__name__.lower()

    def __str__(self) -> str:
        return f"{self.constructor}({', '.join(f'{key}={_shown(value)}' for key, value in self.arguments().items())})"


def selections(pattern: Pattern) -> tuple[Selection, ...]:
    """The selections in a pattern, however it is composed."""
    own = (pattern,) if isinstance(pattern, Selection) else ()
    return own + tuple(found for part in pattern.parts() for found in selections(part))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(part)}" for key, part in value.items()) + "}"
    return str(value)


def select(
    budget: dict[str, Any] | None = None,
    unit: dict[str, int] | None = None,
    score: dict[str, Any] | None = None,
    heads: dict[str, str] | None = None,
    force: dict[str, Any] | None = None,
    lines: dict[str, Any] | None = None,
    permute: dict[str, Any] | None = None,
    learned: str | None = None,
    phase: str = "both",
    semantics: str = "approx",
    reuse: dict[str, Any] | None = None,
    dense_layers: int | str | list[int | str] | None = None,
) -> Pattern:
    """The keys that a selector chooses from the data; the fields are the steps of its pipeline (`Selector`).

    budget: {rule, value, per, min, max}, rule one of topk, ratio, topp, relmax, threshold; or lines: {verticals,
    slashes, first, last} or {cover, first, last, least, switch}. unit: {q, k}: so many queries share a choice among
    blocks of so many keys. score: {qview, kview, combine, norm, domain, causal, pool, smooth, decay,
    history}. heads: {scope, op,
    when}. force: {sink, local, of, last_rows, exempt, counted}. permute: {segment, qview}: keys are sorted inside
    segments first. learned: the name of a module that scores units. reuse: {layers, source, every, cosine}.
    dense_layers: layers that keep everything. Raises PatternError.
    """
    given: dict[str, Any] = {"budget": budget, "unit": unit, "score": score, "heads": heads, "force": force}
    given |= {"lines": lines, "permute": permute}
    present = {name: value for name, value in given.items() if value is not None}
    return Selection(
        _select_text(
            _frozen(present), learned, phase, semantics, _frozen({} if reuse is None else reuse), _layers(dense_layers)
        )
    )


SCORES: dict[str, dict[str, str]] = {
    "mean": {"qview": "mean", "kview": "mean"},
    "minmax_bound": {"qview": "token", "kview": "minmax", "combine": "upper_bound"},
    "token": {},
    "softmax": {"norm": "softmax"},
    "mean_softmax": {"qview": "mean", "kview": "mean", "norm": "softmax"},
}


# The fields of the shorthands that are called otherwise in `select`.
SHORT = {
    "unit.k": "unit",
    "unit.q": "queries",
    "heads.scope": "scope",
    "force.sink": "sinks",
    "force.local": "local",
}


def topk(
    keep: int,
    unit: int = 64,
    score: str = "mean",
    scope: str = "kv_group",
    queries: int = 64,
    sinks: int = 0,
    local: int = 1,
    phase: str = "both",
) -> Pattern:
    """The best `keep` units of `unit` keys, for each `queries` queries of a `scope`: head, kv_group or layer.

    score: by the `mean` of a unit's keys, by the bound of its least and greatest ones (`minmax_bound`, Quest),
    by its keys themselves (`token`), by their share of the attention (`softmax`), or by that of the means
    (`mean_softmax`). The first `sinks` units and the `local` last ones, the query's own included, are kept beside them.
    Raises PatternError.
    """
    return _usual("topk", {"rule": "topk", "value": keep}, unit, score, scope, queries, sinks, local, phase)


def topp(
    share: float,
    unit: int = 64,
    scope: str = "head",
    queries: int = 64,
    sinks: int = 1,
    local: int = 1,
    phase: str = "prefill",
) -> Pattern:
    """The fewest units of `unit` keys that hold this share of the attention, by the mean queries and keys of blocks.

    The first `sinks` units and the `local` last ones are kept beside them. Raises PatternError.
    """
    score, budget = "mean_softmax", {"rule": "topp", "value": share}
    return _usual("topp", budget, unit, score, scope, queries, sinks, local, phase)


def _usual(name: str, budget: dict[str, Any], *rest: Any) -> Pattern:
    """The selection of a shorthand, whose errors name its own fields."""
    return Selection(_usual_text(name, tuple(budget.items()), *rest))


@foldable
def _usual_text(
    name: str, budget: Any, unit: int, score: str, scope: str, queries: int, sinks: int, local: int, phase: str
) -> str:
    if not isinstance(score, str) or score not in SCORES:
        raise PatternError(f"{name}.score: unknown score {score!r}; {nearest(str(score), SCORES)}")
    heads = {"scope": scope} | ({} if scope == "head" else {"op": "sum" if score.endswith("softmax") else "max"})
    parts = {
        "budget": dict(budget),
        "unit": {"q": queries, "k": unit},
        "score": SCORES[score],
        "heads": heads,
        "force": {"sink": sinks, "local": local},
    }
    try:
        made = {field: part(PARTS[field], field, value) for field, value in parts.items()}
        return Choice(Selector(**made, phase=phase)).text()
    except PatternError as error:
        field, colon, rest = str(error).partition(":")
        own = {"budget.value": "keep" if name == "topk" else "share"}.get(field, SHORT.get(field, field))
        raise PatternError(f"{name}.{own}{colon}{rest}") from None


def online(share: float, by_length: bool = False) -> Pattern:
    """Everything but the parts of key tiles that weigh less than `share` of the largest weight so far (BLASST).

    With `by_length` the share is divided by the number of keys. The kernel decides while it runs; nothing is chosen
    before. Combine it by `&`: `causal() & online(0.001)`. Raises PatternError.
    """
    return Selection(_online_text(share, by_length))


def compensation() -> Pattern:
    """A key more for each head, in place of all that it drops: their mean, with the mean of their values, as often as
    they are many (RazorAttention).

    What the model's own mask drops is no part of it. For decoding, and static patterns: combine it by `&` with all of
    one, `(sinks(4) | window(1024)) & causal() & compensation()`.
    """
    return Selection(COMPENSATION)


COMPENSATION = Choice(Compensation()).text()


def lifetimes(learned: str, window: int) -> Pattern:
    """The keys that still live at a query, by the types that a module gives them (`Lifetimes`). For presets."""
    return Selection(_lifetimes_text(learned, window))


def _frozen(value: Any) -> Any:
    """Mappings and lists as tuples, which torch.compile takes for constants."""
    if isinstance(value, Mapping):
        return ("map", *((str(key), _frozen(part)) for key, part in value.items()))
    return ("list", *map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, *parts = value
    return {key: _thawed(part) for key, part in parts} if kind == "map" else [_thawed(part) for part in parts]


def _layers(value: int | str | list[int | str] | None) -> Any:
    return None if value is None else tuple(value) if isinstance(value, list) else value


@foldable
def _select_text(parts: Any, learned: str | None, phase: str, semantics: str, reuse: Any, dense_layers: Any) -> str:
    made = {name: part(PARTS[name], name, value) for name, value in _thawed(parts).items()}
    selector = Selector(**made, learned=learned, phase=phase, semantics=semantics)
    try:
        dense = () if dense_layers is None else read_ranges(dense_layers)
    except ValueError as error:
        raise PatternError(f"dense_layers: {error}") from None
    return Choice(selector, Reuse.from_data(_thawed(reuse)), dense).text()


@foldable
def _online_text(share: float, by_length: bool) -> str:
    return Choice(Online(share, by_length)).text()


@foldable
def _lifetimes_text(learned: str, window: int) -> str:
    return Choice(Lifetimes(learned, window)).text()
