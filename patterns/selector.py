"""Selectors: which units of keys an attention keeps, chosen from the data by a pipeline of fixed order.

    (permute) -> views -> combine -> causality and domain -> heads (query, pre) -> norm -> heads (token) -> pool and
    smooth -> heads (unit) -> forced units -> budget -> a sorted list with its count

A selector is a frozen, hashable value without tensors; `sparsify.selection.choose` runs it. Where systems differ in the
order of two steps, a field says which order is meant.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.patterns.selector_checks import (
    argument,
    check_fields,
    integer,
    number,
    one_of,
    part,
)
from sparsify.patterns.selector_text import read, write

HEAD_OPS = ("sum", "max", "mean", "best_rank")


@dataclass(frozen=True)
class Unit:
    """What is chosen, and by whom: q consecutive queries share a choice among units of k consecutive keys."""

    q: int = 1
    k: int = 1

    def __post_init__(self) -> None:
        integer(self.q, "unit.q", 1)
        integer(self.k, "unit.k", 1)


@dataclass(frozen=True)
class Score:
    """What a unit is chosen by.

    qview: the queries as they are (`token`), the mean of the queries that share a choice (`mean`), or the last n
        queries for all rows (`last(n)`).
    kview: the keys as they are (`token`), a unit's mean (`mean`), its least and greatest value in each channel
        (`minmax`, Quest), its keys weighted by a softmax of their products with the mean (`attn_pool`), one of its
        keys, found by log2(unit.k) times going on with the half whose middle key has the greater score with any query
        that shares the choice (`rep_search`, HiP), or groups of S keys against groups of S queries in reverse order,
        so that one product sums an anti-diagonal (`strided(S)`, XAttention).
    combine: `dot`, or with minmax `upper_bound`: the greatest dot product that a key within the bounds could have.
    norm: `none`, `softmax` over the keys, `exp_rowmax`: exp of the distance to the greatest score among the queries
        that share the choice (FlashPrefill), or `accumulated`: the softmax of this query and of all before it, summed
        (H2O). Those before it are the call's own; at decode, the steps since a query was not the one after the last.
    decay: with `accumulated`, what a sum is multiplied by at each further query (A2SF); 1 to forget nothing.
    history: with `accumulated` at decode, the most keys that there can be, in tokens: what the kept sums have room for.
    domain: whether forced units take part in the scores and compete (`all`), or not (`middle`, TokenSelect).
    causal: a view of keys is seen once its first token is (`touch`), or once all of its tokens are (`past`).
    pool: how the scores of a unit's tokens, or views, become the unit's.
    smooth: `max(w)` or `mean(w)` over w neighbouring units, w odd; or `none`.
    """

    qview: str = "token"
    kview: str = "token"
    combine: str = "dot"
    norm: str = "none"
    domain: str = "all"
    causal: str = "touch"
    pool: str = "sum"
    smooth: str = "none"
    decay: float = 1.0
    history: int | None = None

    def __post_init__(self) -> None:
        one_of(self.qview, "score.qview", ("token", "mean"), ("last(n)",))
        one_of(self.kview, "score.kview", ("token", "mean", "minmax", "attn_pool", "rep_search"), ("strided(S)",))
        one_of(self.combine, "score.combine", ("dot", "upper_bound"))
        one_of(self.norm, "score.norm", ("none", "softmax", "exp_rowmax", "accumulated"))
        one_of(self.domain, "score.domain", ("all", "middle"))
        one_of(self.causal, "score.causal", ("touch", "past"))
        one_of(self.pool, "score.pool", ("sum", "max", "mean"))
        one_of(self.smooth, "score.smooth", ("none",), ("max(w)", "mean(w)"))
        self._check_sums()
        self._check_views()

    def _check_sums(self) -> None:
        object.__setattr__(self, "decay", number(self.decay, "score.decay", 0.0, 1.0, above=True))
        if self.history is not None:
            integer(self.history, "score.history", 1)
        for name, default in (("decay", 1.0), ("history", None)):
            if self.norm != "accumulated" and getattr(self, name) != default:
                raise PatternError(f"score.{name}: goes with the norm accumulated, found '{self.norm}'")

    def _check_views(self) -> None:
        if (self.kview == "minmax") != (self.combine == "upper_bound"):
            raise PatternError(
                f"score.combine: minmax and upper_bound go together, found kview {self.kview} with {self.combine}"
            )
        if self.stride and self.qview != "token":
            raise PatternError(f"score.qview: {self.kview} groups the queries itself, found '{self.qview}' beside it")
        if self.smooth != "none" and argument(self.smooth) % 2 == 0:
            raise PatternError(f"score.smooth: a width must be odd, found {argument(self.smooth)}")

    @property
    def last(self) -> int:
        """How many of the last queries are looked at; 0 for all."""
        return argument(self.qview)

    @property
    def stride(self) -> int:
        """Tokens in a strided group; 0 for other views."""
        return argument(self.kview)


@dataclass(frozen=True)
class Heads:
    """Who shares a choice, and at which step the heads' scores become one.

    scope: each query `head` chooses, the heads of a `kv_group` together, or all heads of the `layer`.
    op: how scores are joined; `best_rank` merges the heads' own rankings round robin, best first (LessIsMore).
    when: the queries themselves before the product (`query`), scores before the norm (`pre`), after it (`token`), or
        a unit's scores (`unit`).
    """

    scope: str = "kv_group"
    op: str = "mean"
    when: str = "unit"

    def __post_init__(self) -> None:
        one_of(self.scope, "heads.scope", ("head", "kv_group", "layer"))
        one_of(self.op, "heads.op", HEAD_OPS)
        one_of(self.when, "heads.when", ("query", "pre", "token", "unit"))
        if self.scope == "head" and (self.op, self.when) != ("mean", "unit"):
            field, found = ("op", self.op) if self.op != "mean" else ("when", self.when)
            raise PatternError(f"heads.{field}: with scope head nothing is joined, so leave it out, found '{found}'")
        if self.op == "best_rank" and self.when != "unit":
            raise PatternError(f"heads.when: best_rank ranks units, so it must be 'unit', found '{self.when}'")
        if self.when == "query" and self.scope != "kv_group":
            raise PatternError(f"heads.scope: only queries of one kv_group can be joined, found '{self.scope}'")
        if self.when == "query" and self.op not in ("sum", "mean"):
            raise PatternError(f"heads.op: queries are joined by sum or mean, found '{self.op}'")


@dataclass(frozen=True)
class Force:
    """What is kept whatever its score.

    sink: the first units (from the first valid key). local: every query's own unit and the ones before it, so that
    local=1 is the diagonal. With of=tokens both count tokens, and units that hold one of them are kept.
    last_rows: for so many of the last rows, everything. exempt: a block of queries or keys whose mean cosine
    similarity to itself is below this keeps its whole row, or column (SpargeAttn).
    counted: whether forced units use up the budget. If not, `topk` and `ratio` choose among the others only, and the
    other rules, which measure, measure as if nothing were forced.
    """

    sink: int = 0
    local: int = 0
    of: str = "units"
    last_rows: int = 0
    exempt: float | None = None
    counted: bool = False

    def __post_init__(self) -> None:
        for name in ("sink", "local", "last_rows"):
            integer(getattr(self, name), f"force.{name}", 0)
        one_of(self.of, "force.of", ("units", "tokens"))
        if self.exempt is not None:
            object.__setattr__(self, "exempt", number(self.exempt, "force.exempt", -1.0, 1.0))
        if not isinstance(self.counted, bool):
            raise PatternError(f"force.counted: expected true or false, found {self.counted!r}")
        if not (self.sink or self.local) and self.of != "units":
            raise PatternError("force.of: nothing is forced that could be counted in tokens")
        if self.counted and not self.any:
            raise PatternError("force.counted: nothing is forced that could count (sink, local or exempt)")

    @property
    def any(self) -> bool:
        """Whether some columns are forced."""
        return bool(self.sink or self.local) or self.exempt is not None

    def most(self, unit: Unit) -> int:
        """The greatest number of units that sink and local can force in a row."""
        ahead = unit.q - 1  # a row's queries stand on so many positions more than one query does
        if self.of == "tokens":
            return sum(_touched(n, unit.k) for n in (self.sink, self.local and self.local + ahead))
        return self.sink + (self.local and self.local + _touched(ahead + 1, unit.k) - 1)


def _touched(tokens: int, unit: int) -> int:
    """The greatest number of units that so many consecutive tokens can touch."""
    return (tokens + unit - 2) // unit + 1 if tokens else 0


@dataclass(frozen=True)
class Budget:
    """How many units a row keeps.

    rule: `topk`, the best `value` units. `ratio`, this share of the units that the row can see, rounded up. `topp`, the
    fewest units that hold this share of the scores' sum. `relmax`, those with at least this share of the greatest
    score. `threshold`, those with at least this score.
    per: the share is a row's, or the `head`'s over all its rows together.
    min, max: bounds on what the rule chooses in a row.
    """

    rule: str
    value: float
    per: str = "row"
    min: int = 0
    max: int | None = None

    def __post_init__(self) -> None:
        one_of(self.rule, "budget.rule", ("topk", "ratio", "topp", "relmax", "threshold"))
        one_of(self.per, "budget.per", ("row", "head"))
        if self.rule == "topk":
            integer(self.value, "budget.value", 1)
        else:
            share = (None, None) if self.rule == "threshold" else (0.0, 1.0)
            object.__setattr__(self, "value", number(self.value, "budget.value", *share, above=True))
        integer(self.min, "budget.min", 0)
        if self.max is not None:
            integer(self.max, "budget.max", 1)
            if self.max < self.min:
                raise PatternError(f"budget.max: expected at least budget.min = {self.min}, found {self.max}")
        if self.rule == "topk" and (self.min or self.max is not None):
            raise PatternError("budget.min: topk is a number of units already, so leave min and max out")
        if self.rule in ("topk", "threshold") and self.per != "row":
            raise PatternError(
                f"budget.per: {self.rule} is a row's, found '{self.per}' (ratio, topp and relmax have it)"
            )


@dataclass(frozen=True)
class Lines:
    """Vertical-slash: whole columns and whole diagonals, the same for every query.

    By number (MInference): the best `verticals` columns and `slashes` diagonals by their sums of the scores, `first`
    columns and `last` diagonals (those nearest to the query) forced and counted. A diagonal is kept as the units that
    it touches in a row; what is left of the columns is kept token by token.

    By `cover` (FlexPrefill): columns and diagonals of whole units, as many as the single ones that hold this share of
    the scores would fill, `least` at least; `first` and `last` count units. A head for which √JSD between the true
    attention on units and the one that the mean of the queries predicts is below `switch` keeps `least` of each and
    what the budget chooses by the means of blocks.
    """

    verticals: int | None = None
    slashes: int | None = None
    first: int = 0
    last: int = 0
    cover: float | None = None
    least: int = 1
    switch: float | None = None

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            integer(getattr(self, name), f"lines.{name}", 0)
        integer(self.least, "lines.least", 1)
        if self.cover is None:
            self._check_numbers()
            return
        object.__setattr__(self, "cover", number(self.cover, "lines.cover", 0.0, 1.0, above=True))
        if self.verticals is not None or self.slashes is not None:
            raise PatternError("lines.cover: gives the number of lines, so leave verticals and slashes out")
        if self.switch is not None:
            object.__setattr__(self, "switch", number(self.switch, "lines.switch", 0.0, 1.0))

    def _check_numbers(self) -> None:
        for name, all_of_them in (("first", "verticals"), ("last", "slashes")):
            most, found = getattr(self, all_of_them), getattr(self, name)
            integer(most, f"lines.{all_of_them}", 1)
            if found > most:
                raise PatternError(f"lines.{name}: expected at most lines.{all_of_them} = {most}, found {found}")
        for name, default in (("least", 1), ("switch", None)):
            if getattr(self, name) != default:
                raise PatternError(f"lines.{name}: goes with lines.cover, and there is none")


@dataclass(frozen=True)
class Permute:
    """Keys and values in an order of their own before they are made units, one order for each key head (PBS-Attn).

    segment: so many consecutive keys are sorted among themselves, those that are looked at most first. qview: who
    looks: the last n queries (`last(n)`), by the mean of their attention over whole segments and of the heads' over the
    group. A query keeps its own segment beside what is chosen for it from the earlier ones.
    """

    segment: int
    qview: str = "last(128)"

    def __post_init__(self) -> None:
        integer(self.segment, "permute.segment", 1)
        one_of(self.qview, "permute.qview", (), ("last(n)",))

    @property
    def last(self) -> int:
        """How many queries look at the keys."""
        return argument(self.qview)


@dataclass(frozen=True)
class Selector:
    """The whole pipeline; see its parts. Give a `budget` or `lines` (with `lines.switch` both).

    permute: an order of the keys that is found first; None for their own. Units are then so many slots of that order.
    phase: the calls that it serves: `prefill`, `decode` or `both`.
    learned: the name of a hook that gives unit scores in place of the steps up to pooling; >= 0 for topp and relmax.
    semantics: `approx` of a dense model, or `native` to a model trained with it, which must never fall back to dense.
    """

    budget: Budget | None = None
    unit: Unit = Unit()
    score: Score = Score()
    heads: Heads = Heads()
    force: Force = Force()
    lines: Lines | None = None
    permute: Permute | None = None
    learned: str | None = None
    phase: str = "both"
    semantics: str = "approx"

    def __post_init__(self) -> None:
        check_fields(self)
        one_of(self.phase, "phase", ("prefill", "decode", "both"))
        one_of(self.semantics, "semantics", ("approx", "native"))

    def text(self) -> str:
        """Canonical JSON: sorted keys, defaults left out."""
        return write(self)

    @classmethod
    def parse(cls, text: str) -> Selector:
        """The selector that a text is of. Raises PatternError for what no selector can have."""
        return _parse(text)

    def units(self) -> tuple[int, ...]:
        """The key unit of each list: one, or for lines by number the diagonals' units and the columns' tokens."""
        return (self.unit.k, 1) if self.lines and self.lines.cover is None else (self.unit.k,)

    def most_forced(self) -> int:
        """The greatest number of units that sink and local can force in a row."""
        return self.force.sink if self.permute else self.force.most(self.unit)

    def lists(self, heads: int, kv_heads: int) -> int:
        """How many choices are made for so many query heads and key heads."""
        return {"head": heads, "kv_group": kv_heads, "layer": 1}[self.heads.scope]

    def __str__(self) -> str:
        return self.text()


PARTS = {
    "unit": Unit,
    "score": Score,
    "heads": Heads,
    "force": Force,
    "budget": Budget,
    "lines": Lines,
    "permute": Permute,
}


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Selector:
    given = read(text)
    parts = {name: part(PARTS[name], name, value) for name, value in given.items() if name in PARTS}
    return part(Selector, "selector", {**given, **parts})
