"""`plan`: profile, solve, look again, validate, choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsify import __version__, cost
from sparsify.errors import InputError
from sparsify.patterns.reuse import Reuse
from sparsify.patterns.select import selections
from sparsify.planner import candidates as kinds_of
from sparsify.planner.arguments import check_inputs, check_model, check_tokens
from sparsify.planner.bound import keeps, missed, with_dense
from sparsify.planner.heads import Costs
from sparsify.planner.objective import Objective
from sparsify.planner.plan import DENSE, Candidate, Model, Plan, Point, Validation, fingerprint
from sparsify.planner.profiles import Profile, profiled
from sparsify.planner.progress import Progress, silent
from sparsify.planner.readings import Readings, readings
from sparsify.planner.refine import Measure, chosen_at, refined
from sparsify.planner.rig import Rig, set_up
from sparsify.planner.samples import Tokenizer
from sparsify.planner.settings import Settings
from sparsify.planner.solve import Problem, Solution, within_cost
from sparsify.planner.state import State, digest
from sparsify.planner.uniform import uniforms
from sparsify.planner.write import head_plans, site_plans
from sparsify.ranges import Ranges, contains, of_numbers, text_of

BISECTIONS = 3  # of the front, where the cheapest plan within a bound on the loss is wanted


def plan(
    model: Any,
    data: Any,
    *,
    lengths: Sequence[int] | int,
    budget: Any = 0.5,
    name: str = "",
    tokenizer: Tokenizer | None = None,
    held_out: Any = None,
    objective: Objective | None = None,
    state: Path | str | None = None,
    keep: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Plan:
    """Which pattern each head of a model gets under a budget, by predicted cost and measured quality.

    model: whatever the backend catches, in evaluation mode; of Hugging Face's kind where `data` is text or tokens,
    since these are given as `input_ids`. data: texts, tokens or `Readings`; held_out: more, to validate with (else the
    end of the data). lengths: in tokens, that are profiled. budget: a share of the dense cost, or "loss +1%".
    tokenizer: how texts are read (bytes, by default). objective: what results are measured by (see `objective`). state:
    a folder where what was found is kept until the plan is there, so that a killed run goes on; keep: whether it stays,
    so that a plan of the same model and data at another budget finds it. The other settings are those of `Settings`.
    `plan(...).spec()` is for the backend.

    Raises InputError for no data, tokens or a length beyond the model's, a share of the cost that no candidates meet
    (with the nearest that is met), and a model none of whose attentions can be rewritten. A bound on the loss that no
    share of the front keeps is kept by a larger share or by dense attention, and `Plan.missed` says so.
    """
    begun, wanted = time.perf_counter(), Settings.read(lengths=lengths, budget=budget, **settings)
    check_model(model, objective, tokenizer, state, name)
    name = name or type(model).__name__
    found = _checked_readings(model, data, held_out, wanted, tokenizer)
    rig = _checked_rig(model, found, wanted, objective, name)
    about = Model(name, model_fingerprint(rig, getattr(model, "config", None)))
    kept = State(None if state is None else Path(state), _run_digest(model, rig, about))
    made = Planner(rig, found, wanted, kept, progress).make(about)
    if not keep:
        kept.clear()
    return replace(made, seconds=time.perf_counter() - begun)


def _checked_readings(model: Any, data: Any, held_out: Any, wanted: Settings, tokenizer: Tokenizer | None) -> Readings:
    """What is read, and that the model can read it. Raises InputError."""
    if data is None or (hasattr(data, "__len__") and not len(data)):
        raise InputError("plan: data: expected texts, tokens or Readings, found nothing")
    config = getattr(model, "config", None)
    found = readings(data, held_out, wanted, tokenizer, _is_decoder(config), longest_of(config))
    check_inputs(model, found)
    check_tokens(model, found)
    return found


def _checked_rig(model: Any, found: Readings, wanted: Settings, objective: Objective | None, name: str) -> Rig:
    """The model with its candidates, and that it has the layers that the settings speak of. Raises InputError."""
    rig = set_up(model, found.profile[0], wanted.candidates or partial(_usual, wanted), objective, name)
    _check_layers(rig, "dense_layers", wanted.dense_layers)
    for source, takers in wanted.reuse:
        _check_layers(rig, "reuse", ((source, source), *takers))
    return rig


def _run_digest(model: Any, rig: Rig, about: Model) -> str:
    """What all that is kept of a run depends on: program, model, weights, candidates and how results are measured."""
    measured = type(rig.objective).__qualname__, rig.objective.unit, getattr(rig.objective, "__dict__", None)
    return digest((__version__, about.fingerprint, _weights(model), [one.form for one in rig.candidates], measured))


def _usual(wanted: Settings, causal: bool) -> tuple[Candidate, ...]:
    found = kinds_of.default(causal, max(wanted.lengths), wanted.of, wanted.kinds, wanted.shape)
    found = kinds_of.told_apart(found, wanted.lengths)
    return kinds_of.sharing(found, Reuse(wanted.reuse)) if wanted.reuse else found


def _check_layers(rig: Rig, name: str, wanted: Ranges) -> None:
    """Raises InputError for a range without a layer of the model, or that goes beyond the last one."""
    layers = sorted({site.info.layer for site in rig.heads.sites if site.info.layer is not None})
    for first, last in wanted:
        if not any(first <= layer <= last for layer in layers) or last > layers[-1]:
            asked, found = text_of(((first, last),)), text_of(of_numbers(layers)) or "not numbered"
            raise InputError(f"plan: {name}: found {asked}, and the model's layers are {found}")


def longest_of(config: Any) -> int | None:
    """How many tokens a model can read, if its config says so."""
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def model_fingerprint(rig: Rig, config: Any) -> str:
    """See `plan.fingerprint`."""
    names = "address", "use", "heads", "kv_heads"
    sites = [{name: getattr(site.info, name) for name in names} | {"dim": site.head_dim} for site in rig.heads.sites]
    return fingerprint(sites, config.to_dict() if hasattr(config, "to_dict") else None)


def _is_decoder(config: Any) -> bool:
    names = " ".join(getattr(config, "architectures", None) or [])
    return "CausalLM" in names or "LMHead" in names or bool(getattr(config, "is_decoder", False))


def _weights(model: Any) -> list[tuple[str, float]]:
    """What other weights don't have: of each parameter its dtype and a number, so that a change of any layer shows."""
    return [(str(one.dtype), float(one.detach().float().abs().mean())) for one in getattr(model, "parameters", list)()]


@dataclass
class Planner:
    """One plan being made."""

    rig: Rig
    readings: Readings
    settings: Settings
    state: State
    progress: Progress

    def __post_init__(self) -> None:
        self.costs = Costs(self.rig.heads, self.settings.lengths, self.settings.of, self.settings.machine)
        self.shares = self.costs.shares(self.rig.patterns)
        self.units = self.rig.heads.groups(self.settings.shared_rules)
        self.measure = Measure(self.rig, self.readings.search, self.state)

    def make(self, about: Model) -> Plan:
        rig, settings = self.rig, self.settings
        self._check_budget()
        profile = profiled(rig, self.readings.profile, settings, self.state, self.progress)
        points, profile, solution, solved = self._front(profile)
        front = [
            *points,
            *uniforms(rig, self.costs, self.measure.uniform, [point.cost for point in points], self.progress),
        ]
        front, rows = self._validate(front)
        tried, limit = front, None if settings.budget.share is not None else self._limit(rows)
        lost = limit is not None and not keeps(tried, limit)
        if lost:
            front = with_dense(front, rig)
        for _ in range(0 if limit is None else BISECTIONS):
            front, rows = self._between(front, rows, profile, limit)
        chosen = self._choose(front, limit)
        heads = head_plans(front[chosen].choices, self.shares.mean(0), profile, rig.heads)
        return Plan(
            model=about,
            machine=cost.machine(settings.machine).name,
            lengths=settings.lengths,
            of=settings.of,
            budget=settings.budget.text,
            profile=settings.profile,
            unit=rig.objective.unit,
            candidates=rig.candidates,
            sites=site_plans(rig, self.costs, heads),
            front=tuple(front),
            chosen=chosen,
            validation=tuple(rows),
            bound=solution.bound,
            gap=solution.gap,
            solved=solved,
            retrieval=tuple(profile.retrieval(rig.heads)),
            missed=missed(tried, limit, rig.objective.unit, front[chosen]) if lost else "",
        )

    def _check_budget(self) -> None:
        """Raises InputError for a budget that no choice meets: costs are known before anything is profiled."""
        try:
            within_cost(self.problem(np.zeros(self.shares.shape[1:])), self.settings.least_met)
        except InputError as error:
            if self.settings.budget.share is not None:
                raise
            how = "a bound on the loss is met by a plan at one of the shares in --front: give a larger one"
            raise InputError(f"{error}; {how}") from None

    def problem(self, losses: np.ndarray) -> Problem:
        """The knapsack of some losses (heads, candidates)."""
        count = int(self.units.max()) + 1
        joined = np.zeros((count, losses.shape[1]))
        np.add.at(joined, self.units, losses)
        spent = np.zeros((len(self.shares), count, losses.shape[1]))
        for number, share in enumerate(self.shares):
            np.add.at(spent[number], self.units, share)
        first = np.unique(self.units, return_index=True)[1]
        sites = self.rig.heads.site[first]
        for place, site in enumerate(self.rig.heads.sites):
            if site.info.layer is not None and contains(self.settings.dense_layers, site.info.layer):
                others = np.arange(losses.shape[1]) != self.rig.dense
                joined[np.ix_(sites == place, others)] = np.inf
        return Problem(joined, spent, sites, self.settings.per_layer, self._sources())

    def _sources(self) -> tuple[tuple[int, int, int], ...]:
        """The sites that take choices, those that make them, and of which candidates."""
        layers = {site.info.layer: place for place, site in enumerate(self.rig.heads.sites)}
        patterns = enumerate(self.rig.patterns)
        chosen = [number for number, one in patterns if one is not None and selections(one)]
        reuse = Reuse(self.settings.reuse)
        found = [(place, layers.get(reuse.source_of(layer))) for layer, place in layers.items()]
        return tuple((place, source, one) for place, source in found if source is not None for one in chosen)

    def _front(self, profile: Profile) -> tuple[list[Point], Profile, Solution, str]:
        """A point for each budget that can be met, the cheapest first; the last profile; the solution of the budget,
        and the name of its point."""
        share = self.settings.budget.share
        steps = list(refined(self, profile, self.settings.budgets()))
        points = [self._point(f"plan at {budget:.4g}", chosen, found) for budget, chosen, found, _ in steps]
        own = next((number for number, (budget, *_) in enumerate(steps) if budget == share), -1)
        return points[::-1], steps[-1][3], steps[own][2], points[own].name

    def _between(
        self, front: list[Point], rows: list[Validation], profile: Profile, limit: float
    ) -> tuple[list[Point], list[Validation]]:
        """One more point between the cheapest that keeps the bound on the loss and the next one that doesn't."""
        own = [point for point in front if not point.uniform]
        good = min((point.cost for point in own if point.validated <= limit), default=None)
        bad = max((point.cost for point in own if good is not None and point.cost < good), default=None)
        if good is None or bad is None:
            return front, rows
        budget = (good + bad) / 2
        (point,), more = self._validate([self._point(f"plan at {budget:.4g}", *chosen_at(self, profile, budget))])
        place = sum(one.cost < point.cost for one in own)
        return [*front[:place], point, *front[place:]], [*rows, *(row for row in more if row.name != DENSE)]

    def _limit(self, rows: Sequence[Validation]) -> float:
        """The most that may be lost above dense attention, where there is a bound."""
        return self.settings.budget.limit(float(np.mean([row.loss for row in rows if row.name == DENSE])))

    def cost(self, chosen: np.ndarray) -> float:
        """The share of the dense cost of the candidates of all heads together, at the length where it is greatest."""
        patterns = [self.rig.patterns[one] for one in chosen]
        return max(self.costs.share(patterns, length) for length in self.settings.lengths)

    def _point(self, name: str, chosen: np.ndarray, found: Solution) -> Point:
        choices = tuple(tuple(map(int, of)) for of in self.rig.heads.by_site(chosen))
        return Point(name, self.cost(chosen), False, found.value, self.measure(chosen), None, choices)

    def _validate(self, front: Sequence[Point]) -> tuple[list[Point], list[Validation]]:
        """Each point on what no profile saw, and the rows of the table."""
        validated, dense = [], self._losses(None)
        rows = [Validation(DENSE, *about, 1.0, value, 0.0) for about, value in dense.items()]
        for point in front:
            self.progress.tell(f"validating {point.name}")
            found, patterns = self._losses(point), self._patterns(point)
            shares = {length: self.costs.share(patterns, length) for _, length in found}
            above = {about: value - dense[about] for about, value in found.items()}
            rows += [
                Validation(point.name, *about, shares[about[1]], value, above[about]) for about, value in found.items()
            ]
            validated.append(replace(point, validated=float(np.mean(list(above.values())))))
        return validated, rows

    def _patterns(self, point: Point) -> list[Any]:
        if point.uniform:
            return [Candidate(point.name, point.form).pattern()] * len(self.rig.heads)
        return [self.rig.patterns[one] for of in point.choices for one in of]

    def _losses(self, point: Point | None) -> dict[tuple[str, int], float]:
        """The loss of the validation's samples by kind of data and length: the mean of one that dense attention has,
        too, else the median, which a few samples far from the dense output don't move."""
        assigned = {} if point is None else self.rig.heads.assignment(self._patterns(point))
        form = None if point is None else (point.form if point.uniform else point.choices)
        found: dict[tuple[str, int], list[float]] = {}
        for sample in self.readings.validation:
            key = "loss", sample.digest(), form
            arrays = self.state.of(key, lambda sample=sample: {"losses": self.rig.losses(sample, assigned)})
            found.setdefault((sample.kind, sample.length), []).extend(arrays["losses"].tolist())
        middle: Callable[[list[float]], Any] = np.mean if self.rig.objective.absolute else np.median
        return {about: float(middle(values)) for about, values in found.items()}

    def _choose(self, front: Sequence[Point], limit: float | None) -> int:
        """The best validated point within the budget; within a bound on the loss, the cheapest."""
        own, share = [number for number, point in enumerate(front) if not point.uniform], self.settings.budget.share
        if limit is not None:
            return min((n for n in own if front[n].validated <= limit), key=lambda number: front[number].cost)
        fits = [number for number in own if front[number].cost <= share * (1 + 1e-6)]
        fits = fits or [min(own, key=lambda number: front[number].cost)]
        return min(fits, key=lambda number: front[number].validated)
