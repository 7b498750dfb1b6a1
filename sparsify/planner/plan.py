"""`Plan`: what was chosen for every head, at what predicted cost and measured loss; values, and JSON of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.files import write_whole
from sparsify.patterns import Pattern
from sparsify.patterns.select import selections
from sparsify.ranges import of_numbers, text_of
from sparsify.spec import Spec
from sparsify.spec.forms import Builder
from sparsify.spec.source import Source

VERSION = 1
DENSE = "dense"  # the name of the candidate that drops nothing


@dataclass(frozen=True)
class Model:
    """Which model a plan is for.

    name: as the user called it. fingerprint: of what decides its attentions (see `fingerprint`), by which a plan for
    another model is told.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Candidate:
    """A pattern that heads may get. form: as a spec writes it, or the name of a plain pattern."""

    name: str
    form: Any

    def pattern(self) -> Pattern:
        """The pattern itself."""
        return Builder(Source("candidate"), {}).pattern(self.form, (self.name,))


@dataclass(frozen=True)
class HeadPlan:
    """One query head.

    candidate: the index in `Plan.candidates` of what it got. costs: of each candidate, as a share of what the whole
    model's dense attention costs, the mean over the profiled lengths; None where it is no candidate of this head.
    losses: what each candidate alone was profiled to lose, in the profile's unit, all other heads being as they were at
    that time; the last profile counts. score: what the profile says of the head itself (1: it looks everywhere), if it
    says anything.
    """

    candidate: int
    costs: tuple[float | None, ...]
    losses: tuple[float | None, ...]
    score: float | None = None


@dataclass(frozen=True)
class SitePlan:
    """One attention of the model and its heads. seconds, dense_seconds: predicted for the plan's patterns and for dense
    attention at each of `Plan.lengths`, batch 1."""

    address: str
    layer: int | None
    use: int
    kind: str
    causal: bool
    kv_heads: int
    head_dim: int
    heads: tuple[HeadPlan, ...]
    seconds: tuple[float, ...] = ()
    dense_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Point:
    """One assignment of candidates to heads.

    name: what a reader calls it. uniform: whether all heads have one pattern, given by `form`. cost: the share of the
    dense cost. predicted: the loss that the solver saw; None for one that it did not choose. measured: the loss on the
    data of the search; validated: on data and at a length that no profile saw; both over what dense attention loses.
    choices: the candidate of every head, site by site; empty for a uniform one.
    """

    name: str
    cost: float
    uniform: bool = False
    predicted: float | None = None
    measured: float | None = None
    validated: float | None = None
    choices: tuple[tuple[int, ...], ...] = ()
    form: Any = None


@dataclass(frozen=True)
class Validation:
    """One row of the validation: what was read (`data`), at which length, and by whom (`name`, as in `Plan.front`).

    cost: the share of the dense cost at this length. loss: absolute, in `Plan.unit`; increase: over dense attention's.
    """

    name: str
    data: str
    length: int
    cost: float
    loss: float
    increase: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found, and from what.

    machine: the name of the machine whose time was predicted. lengths: those of the profile, in tokens. of: what the
    budget is a share of (time, tiles, pairs or memory). budget: as the user gave it. profile: the kind of profile;
    unit: of its losses and of all others. front: one point a budget, the cheapest first, then the uniform ones they
    were compared with; chosen: the index in `front` of this plan. solved: the name of the point that the solver
    found for the budget, which the validation may not have chosen. bound: what no choice of its cost can be better than
    by the solver's model, in `unit`; gap: how far it is from that at most, as a share. retrieval: the heads
    that far information goes through, as (site, head), the most important first. missed: what to know where no share
    of the front kept the bound on the loss, else nothing. seconds: how long it took.
    """

    model: Model
    machine: str
    lengths: tuple[int, ...]
    of: str
    budget: str
    profile: str
    unit: str
    candidates: tuple[Candidate, ...]
    sites: tuple[SitePlan, ...]
    front: tuple[Point, ...] = ()
    chosen: int | None = None
    validation: tuple[Validation, ...] = ()
    bound: float | None = None
    gap: float | None = None
    retrieval: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0
    missed: str = ""
    solved: str = ""
    version: int = VERSION

    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The candidate of every head, site by site."""
        return tuple(tuple(head.candidate for head in site.heads) for site in self.sites)

    @property
    def timed(self) -> bool:
        """Whether times were predicted."""
        count = len(self.lengths)
        return bool(self.sites) and all(len(one.seconds) == len(one.dense_seconds) == count for one in self.sites)

    def total(self, length: int) -> tuple[float, float]:
        """Seconds of all sites at the `length`-th of the lengths: the plan's, and dense attention's."""
        return sum(site.seconds[length] for site in self.sites), sum(site.dense_seconds[length] for site in self.sites)

    @property
    def optimum(self) -> str:
        """How near the solver's choice is to the best by its own model, and whether it is this plan; else nothing."""
        if self.bound is None or self.gap is None or self.chosen is None:
            return ""
        chosen = self.front[self.chosen].name
        within = "is that best" if self.gap < 5e-5 else f"is within {100 * self.gap:.2g} % of that"
        told = f"by the profiled losses no choice at this cost has less than {self.bound:.4g}; {self.solved} {within}"
        return told if chosen == self.solved else f"{told}, and validated worse than {chosen}"

    def cost_validated(self, name: str) -> float | None:
        """The share of the dense cost that a point of the front has at the length of its validation."""
        return next((row.cost for row in self.validation if row.name == name), None)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader has to know of the choice: sentences, none where it is what was asked for."""
        return tuple(filter(None, (self.missed, self.slower)))

    @property
    def slower(self) -> str:
        """What to know and to do where dense attention is predicted to be faster at some length, else nothing."""
        totals = [(length, *self.total(place)) for place, length in enumerate(self.lengths)] if self.timed else []
        length, mine, dense = max(totals, key=lambda one: one[1] / one[2], default=(0, 0.0, 1.0))
        if mine <= dense * (1 + 1e-6):
            return ""
        return (
            f"predicted to be slower than dense attention: {mine / dense:.3g} times its time at {length} tokens; "
            f"the budget was one of {self.of}, so plan by time (--of time) where speed is wanted"
        )

    def spec(self, point: Point | None = None) -> Spec:
        """The spec that gives every head what the plan, or a point of its front, gives it; the backend takes it as it
        is."""
        choices = self.choices() if point is None else point.choices
        if point is not None and point.uniform:
            uniform = {"match": "*", "heads": "uniform"}
            return Spec.of({"version": 1, "patterns": {"uniform": point.form}, "sites": [uniform]})
        used = sorted({choice for site in choices for choice in site})
        names = {number: self.candidates[number].name for number in used}
        patterns = {names[number]: self.candidates[number].form for number in used if names[number] != DENSE}
        rules = [_rule(site, heads, names, self) for site, heads in zip(self.sites, choices, strict=True)]
        rules.sort(key=lambda rule: rule["match"] == "*")  # the model itself has the empty path, which only that finds
        return Spec.of({"version": 1, "patterns": patterns, "sites": rules})

    def to_json(self) -> str:
        """As text, for `from_json`."""
        return json.dumps(_adapter().dump_python(self, mode="json"), indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "plan") -> Plan:
        """Reads `to_json()` back. Raises InputError for what is no plan, or one of another version."""
        from pydantic import ValidationError

        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"{name}: not JSON: {error}") from None
        version = value.get("version") if isinstance(value, dict) else None
        if version != VERSION:
            raise InputError(f"{name}: version: found {version!r}; this sparsify reads plans of version {VERSION}")
        try:
            return _adapter().validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{name}: {where}: {first['msg'].lower()}, found {str(first['input'])[:60]!r}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a file. Raises InputError."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror or error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON: whole, or not at all. Raises InputError."""
        write_whole(Path(path), self.to_json() + "\n", "plan")

    def check(self, fingerprint: str, name: str) -> None:
        """Raises InputError unless the plan is for the model of this fingerprint."""
        if self.model.fingerprint != fingerprint:
            raise InputError(
                f"plan: model: found one for '{self.model.name}' ({self.model.fingerprint}), and '{name}' is another "
                f"model ({fingerprint}); plan anew for it"
            )


def _rule(site: SitePlan, heads: Sequence[int], names: Mapping[int, str], plan: Plan) -> dict[str, Any]:
    """The rule of one site. What is chosen from the data is chosen while many queries are read."""
    groups = {
        names[one]: of_numbers(h for h, other in enumerate(heads) if other == one) for one in dict.fromkeys(heads)
    }
    named = {text_of(where): name for name, where in groups.items()}
    rule: dict[str, Any] = {"match": site.address or "*", "heads": named}
    if len(groups) == 1:
        rule["heads"] = next(iter(groups))
    if any(one.address == site.address and one.use != site.use for one in plan.sites):
        rule["uses"] = str(site.use)
    if any(selections(plan.candidates[one].pattern()) for one in set(heads)):
        rule["phase"] = "prefill"
    return rule


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def fingerprint(sites: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None = None) -> str:
    """16 hexadecimal digits of what decides a model's attentions: its sites and, where it has one, its config."""
    noise = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}
    known = {key: value for key, value in (config or {}).items() if key not in noise}
    text = json.dumps([list(map(dict, sites)), known], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
