"""The evidence of a plan: one HTML page that needs nothing but itself, or one PNG.

    write_evidence(plan, "plan.html", pictures)

It shows the front with the uniform patterns that it was compared with, what each head got and why, the heads'
attention against their masks, the predicted time of each site and the validation. What is shown is worked out here, as
values; `evidence.html` and `evidence_png` draw it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.files import write_whole
from sparsify.pictures.axes import Ends, powers
from sparsify.pictures.scene import COLOURS
from sparsify.planner.pictures import Pictures
from sparsify.planner.plan import DENSE, Candidate, HeadPlan, Plan, Point, Validation

ENDINGS = (".html", ".png")
HUES = tuple(colour for colour in COLOURS[1:] if colour != "#d6336c")  # red is for attention that is dropped
NEAR = 1.02  # a uniform pattern this much dearer than the plan is still compared with it
MEASURES = {  # of a point's loss, the most telling first
    "validated": "on data and at a length that no profile saw",
    "measured": "on the data of the search",
    "predicted": "as the solver predicts it",
}


def write_evidence(plan: Plan, path: str | Path, pictures: Pictures | None = None) -> Path:
    """Draws a plan's evidence, and returns the path. Its ending, .html or .png (which needs matplotlib), chooses.

    The file is there whole or not at all, and so are the folders above it. Raises InputError for another ending, for a
    file that can't be written, and for pictures of another plan.
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
        raise InputError(f"plan: evidence: expected a name that ends in .html or .png, found '{target.name}'")
    evidence = Evidence(plan, pictures)
    if target.suffix == ".png":
        from sparsify.planner.evidence_png import png as made
    else:
        from sparsify.planner.evidence_page import page as made
    write_whole(target, made(evidence), "plan: evidence")
    return target


@dataclass(frozen=True)
class Entry:
    """A candidate that heads got. weight: the share of dense attention's cost that it takes, on average, by which it
    is drawn lighter or darker; colour: of its kind of pattern."""

    number: int
    candidate: Candidate
    kind: str
    colour: str
    weight: float
    heads: int

    @property
    def strength(self) -> float:
        """How much of its colour it shows, against paper."""
        return 1.0 if self.candidate.name == DENSE else 0.28 + 0.72 * min(1.0, self.weight) ** 0.6


@dataclass(frozen=True)
class Head:
    """One head. share: of its own dense cost; loss: what the profile said of its pattern alone; rank: among the
    retrieval heads, from 1, or 0; recall: the share of its attention that is kept, where pictures say so."""

    site: int
    number: int
    plan: HeadPlan
    entry: Entry
    share: float | None
    rank: int
    recall: float | None

    @property
    def loss(self) -> float | None:
        return self.plan.losses[self.plan.candidate] if self.plan.losses else None


@dataclass(frozen=True)
class Mark:
    """One point of the front. loss: by the evidence's measure; chosen: whether it is the plan."""

    point: Point
    loss: float
    chosen: bool


@dataclass(frozen=True)
class Evidence:
    """Everything that is shown of a plan. Raises InputError for pictures that are not this plan's."""

    plan: Plan
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        shapes = [len(site.heads) for site in self.plan.sites]
        if self.pictures is not None and [len(site.recall) for site in self.pictures.sites] != shapes:
            raise InputError("plan: evidence: the pictures are not those of this plan's heads")

    # -- heads -------------------------------------------------------------------------------------------------------

    @cached_property
    def dense(self) -> int | None:
        """The number of the candidate that drops nothing."""
        return next((i for i, one in enumerate(self.plan.candidates) if one.name == DENSE), None)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The candidates in use, the one that takes most first."""
        heads = [head for site in self.plan.sites for head in site.heads]
        used = Counter(head.candidate for head in heads)
        kinds = dict.fromkeys(kind_of(one) for one in self.plan.candidates if one.name != DENSE)
        colours = dict(zip(kinds, HUES * len(kinds), strict=False)) | {DENSE: COLOURS[0]}
        found = []
        for number, count in used.items():
            shares = [share for head in heads if head.candidate == number if (share := self.share(head)) is not None]
            weight = sum(shares) / len(shares) if shares else 1.0
            one = self.plan.candidates[number]
            found.append(Entry(number, one, kind_of(one), colours[kind_of(one)], weight, count))
        return tuple(sorted(found, key=lambda entry: (-entry.weight, entry.number)))

    def share(self, head: HeadPlan, candidate: int | None = None) -> float | None:
        """What a candidate (its own) costs a head, as a share of its dense cost."""
        cost = head.costs[head.candidate if candidate is None else candidate] if head.costs else None
        whole = head.costs[self.dense] if head.costs and self.dense is not None else None
        return None if cost is None or not whole else cost / whole

    @cached_property
    def heads(self) -> tuple[tuple[Head, ...], ...]:
        """The heads, site by site."""
        by_number = {entry.number: entry for entry in self.entries}
        ranks = {where: rank for rank, where in enumerate(self.plan.retrieval, 1)}
        return tuple(
            tuple(
                Head(s, h, head, by_number[head.candidate], self.share(head), ranks.get((s, h), 0), self.recall(s, h))
                for h, head in enumerate(site.heads)
            )
            for s, site in enumerate(self.plan.sites)
        )

    def recall(self, site: int, head: int) -> float | None:
        """The share of a head's attention that the plan keeps."""
        return None if self.pictures is None else float(self.pictures.sites[site].recall[head])

    # -- front -------------------------------------------------------------------------------------------------------

    @cached_property
    def measure(self) -> str:
        """By which loss points are compared: the first that planned points have, and uniform ones if there are any."""
        front = self.plan.front
        for name in MEASURES:
            planned = [one for one in front if not one.uniform and getattr(one, name) is not None]
            uniform = [one for one in front if one.uniform]
            if planned and (not uniform or any(getattr(one, name) is not None for one in uniform)):
                return name
        return "predicted"

    @cached_property
    def marks(self) -> tuple[Mark, ...]:
        """The points that have a loss and a cost, the cheapest first."""
        chosen = None if self.plan.chosen is None else self.plan.front[self.plan.chosen]
        found = [
            Mark(point, loss, point is chosen)
            for point in self.plan.front
            if (loss := getattr(point, self.measure)) is not None and math.isfinite(loss) and point.cost > 0
        ]
        return tuple(sorted(found, key=lambda mark: mark.point.cost))

    @property
    def chosen(self) -> Mark | None:
        """The plan's own point."""
        return next((mark for mark in self.marks if mark.chosen), None)

    @cached_property
    def rival(self) -> Mark | None:
        """The best uniform pattern at no more than the plan's cost."""
        if self.chosen is None:
            return None
        most = self.chosen.point.cost * NEAR
        cheap = [mark for mark in self.marks if mark.point.uniform and mark.point.cost <= most]
        return min(cheap, key=lambda mark: mark.loss, default=None)

    @property
    def envelope(self) -> list[Mark]:
        """The uniform points that no other is cheaper than and as good as."""
        best, found = float("inf"), []
        for mark in self.marks:
            if mark.point.uniform and mark.loss < best:
                best = mark.loss
                found.append(mark)
        return found

    @cached_property
    def x(self) -> Ends:
        """The costs shown, from a power of two to all."""
        return powers([mark.point.cost for mark in self.marks] + [1.0])

    @cached_property
    def y(self) -> Ends:
        """The losses shown, from a power of ten to another; what is not above the least is drawn there."""
        losses = [mark.loss for mark in self.marks if mark.loss > 0]
        if not losses:
            return 1e-3, 1.0
        return powers([max(min(losses), max(losses) * 1e-5), max(losses)], 10.0)

    # -- validation --------------------------------------------------------------------------------------------------

    @property
    def texts(self) -> tuple[tuple[str, int], ...]:
        """What was read for the validation: (data, tokens)."""
        return tuple(dict.fromkeys((row.data, row.length) for row in self.plan.validation))

    @property
    def validated(self) -> list[tuple[str, float, list[Validation | None]]]:
        """A row for each point: its name, its greatest cost there, and what it loses on each of `texts`."""
        found = {(row.name, row.data, row.length): row for row in self.plan.validation}
        costs = {row.name: row.cost for row in sorted(self.plan.validation, key=lambda row: row.cost)}
        costs = {row.name: costs[row.name] for row in self.plan.validation}  # in the order of the points
        return [(name, cost, [found.get((name, *text)) for text in self.texts]) for name, cost in costs.items()]

    # -- words -------------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> str:
        """`0.5 of dense time`, or a bound as the user gave it."""
        plan = self.plan
        return plan.budget if plan.budget.lstrip().startswith("loss") else f"{plan.budget} of dense {plan.of}"

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        """What matters most, as (number, what it is, a remark)."""
        plan, mark, rival = self.plan, self.chosen, self.rival
        found = []
        if mark is not None:
            found.append((percent(mark.point.cost), f"of dense {COSTS.get(plan.of, plan.of)}", f"budget {plan.budget}"))
            found.append((signed(mark.loss), plan.unit, MEASURES[self.measure]))
            if rival is not None and mark.loss > 0:
                found.append((f"{rival.loss / mark.loss:.3g}x", "as much lost by the best uniform pattern",
                              f"{rival.point.name}: {signed(rival.loss)} at {percent(rival.point.cost)}"))  # fmt: skip
        if plan.timed:
            ours, dense = plan.total(len(plan.lengths) - 1)
            if ours > 0:
                remark = f"{duration(dense)} to {duration(ours)} at {plan.lengths[-1]:,} tokens"
                found.append((f"{dense / ours:.3g}x", "as fast, attention alone, predicted", remark))
        return found


COSTS = {"time": "time", "tiles": "tiles", "pairs": "pairs", "memory": "memory for keys and values"}


def kind_of(candidate: Candidate) -> str:
    """Which kind of pattern it is: the word that its name begins with, `window` of `window64`."""
    found = re.match(r"[A-Za-z_]+", candidate.name)
    return found[0] if found else candidate.name


def percent(share: float | None) -> str:
    """`12.5 %`, `0.31 %`; nothing for None."""
    return "" if share is None else f"{100 * share:.3g} %"


def signed(loss: float | None) -> str:
    """`+0.0123`, `0`; nothing for None."""
    return "" if loss is None else f"{loss:+.3g}" if loss else "0"


def duration(seconds: float) -> str:
    """`1.2 ms`, `340 µs`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def tokens(lengths: Sequence[int]) -> str:
    """`2,048, 4,096 and 8,192`."""
    texts = [f"{length:,}" for length in lengths]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def form_text(form: Any) -> str:
    """A form as a spec writes it, in one line."""
    if isinstance(form, dict):
        return "{" + ", ".join(f"{key}: {form_text(value)}" for key, value in form.items()) + "}"
    if isinstance(form, bool):
        return str(form).lower()
    return f"[{', '.join(map(form_text, form))}]" if isinstance(form, list | tuple) else str(form)
