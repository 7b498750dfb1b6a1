"""What a selection keeps and what choosing takes, from its budget: what the data will say isn't known yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsify.cost.nest import Shape
from sparsify.cost.positions import Positions
from sparsify.expr import FALSE, TRUE, Chosen, Pred, conjunction, eq, negate
from sparsify.patterns.head_choices import head_choices, sees_no_future
from sparsify.patterns.lists import with_choices
from sparsify.patterns.pattern import K, Q
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.patterns.spans import Array

SHARE = 0.25  # of what a row can see, where scores decide how much is kept (topp, relmax, threshold, cover)


@dataclass(frozen=True)
class Head:
    """What one head's predicate comes to. static: what its kernel finds by bands. listed: what it keeps of the keys in
    lists; selector: that makes these, with the text of its choice, or None. causal: whether the selector sees no key
    after a query."""

    static: Pred
    listed: Pred = FALSE
    selector: Selector | None = None
    text: str = ""
    causal: bool = True

    def looks_back(self, q_len: int) -> bool:
        """Whether the selector sees no key after a query; a single query is the last position, and so sees all."""
        return self.causal or q_len == 1


def head_of(keep: Pred) -> Head:
    """A head's predicate with its choices taken apart. Raises PatternError for what no kernel can do."""
    found = head_choices(keep)
    made: dict[Chosen, Pred] = {one: TRUE for one in (found.online, found.compensation, found.lives) if one is not None}
    if found.listed is None:
        return Head(with_choices(keep, made))
    selector = Choice.parse(found.listed.text).selector
    assert isinstance(selector, Selector)
    own = FALSE if selector.permute is None else eq(Q // selector.permute.segment, K // selector.permute.segment)
    static = with_choices(keep, made | {found.listed: own})
    listed = conjunction([with_choices(keep, made | {found.listed: TRUE}), negate(static)])
    return Head(static, listed, selector, found.listed.text, sees_no_future(keep, found.listed))


@dataclass(frozen=True)
class Rows:
    """Rows of queries that share a choice: positions of the first and last query of each, and how many units of keys
    it can see."""

    first: Array
    last: Array
    visible: Array


def rows_of(selector: Selector, at: Positions, causal: bool) -> Rows:
    """The rows of a launch's queries. causal: whether a query sees keys up to its own only."""
    first = np.arange(0, at.q_len, selector.unit.q) + at.offset
    last = np.minimum(first + selector.unit.q, at.offset + at.q_len) - 1
    units = -(-at.k_len // selector.unit.k)
    if not causal:
        visible = np.full(first.shape, units)
    elif selector.permute is not None:
        visible = last // selector.permute.segment * selector.permute.segment // selector.unit.k
    else:
        visible = np.minimum(last // selector.unit.k + 1, units)
    return Rows(first, last, visible)


def _forced(selector: Selector, rows: Rows) -> Array:
    """How many units each row keeps whatever their scores."""
    force, unit = selector.force, selector.unit.k
    sinks = force.sink if force.of == "units" else -(-force.sink // unit)
    local = 0 * rows.first
    if force.local and selector.permute is None:
        begin = rows.first // unit - force.local + 1
        if force.of == "tokens":
            begin = np.maximum(rows.first - force.local + 1, 0) // unit
        local = rows.last // unit - np.maximum(begin, 0) + 1
    return np.minimum(sinks + local, rows.visible)


def kept_units(selector: Selector, rows: Rows) -> list[tuple[int, Array]]:
    """For each list its unit of keys, and how many of them each row keeps, on average."""
    visible, budget, force = rows.visible, selector.budget, selector.force
    if selector.lines is not None:
        return _lines(selector, visible)
    assert budget is not None
    if budget.rule == "topk":
        wanted = np.full(visible.shape, float(budget.value))
    else:
        share = budget.value if budget.rule == "ratio" else SHARE
        wanted = np.clip(np.ceil(visible * share), budget.min, np.inf if budget.max is None else budget.max)
    forced = _forced(selector, rows)
    kept = np.minimum(np.maximum(wanted, forced) if force.counted else wanted + forced, visible).astype(float)
    if force.last_rows:
        kept[-force.last_rows :] = visible[-force.last_rows :]
    return [(selector.unit.k, kept)]


def _lines(selector: Selector, visible: Array) -> list[tuple[int, Array]]:
    """Diagonals touch units, as if they were drawn evenly; of columns those in other units are left."""
    lines = selector.lines
    assert lines is not None
    if lines.cover is not None:
        return [(selector.unit.k, np.clip(np.ceil(visible * SHARE), np.minimum(lines.least, visible), visible))]
    touched = (selector.unit.q + selector.unit.k - 1) / selector.unit.k
    there = np.maximum(visible, 1)
    met = np.minimum(visible, there * -np.expm1(-lines.slashes * touched / there))
    columns = np.minimum(lines.verticals, visible * selector.unit.k) * (1 - met / there)
    return [(selector.unit.k, met), (1, columns)]


@dataclass(frozen=True)
class Work:
    """What choosing takes: choices made, products of two elements, scores, units put in order, elements of views."""

    launch: float = 0.0
    product: float = 0.0
    score: float = 0.0
    order: float = 0.0
    view: float = 0.0


def work_of(selector: Selector, shape: Shape) -> Work:
    """What one choice for a whole site takes."""
    heads = shape.kv_heads if selector.heads.when == "query" else shape.heads
    rows, units = -(-shape.q_len // selector.unit.q), -(-shape.k_len // selector.unit.k)
    score, lists = selector.score, selector.lists(shape.heads, shape.kv_heads)
    across = {"mean": rows, "token": shape.q_len}.get(score.qview, min(score.last or rows, shape.q_len))
    along = shape.k_len if score.kview == "token" or selector.lines is not None else units
    depth: float = shape.head_dim
    if score.stride:
        across, along = -(-shape.q_len // score.stride), -(-shape.k_len // score.stride)
        depth *= score.stride
    elif score.kview == "minmax":
        depth *= 2
    elif score.kview == "rep_search":
        depth *= max(1.0, math.log2(max(2, selector.unit.k)))
    views = shape.k_len * shape.kv_heads * shape.head_dim
    views += shape.q_len * shape.heads * shape.head_dim if score.qview != "token" or score.stride else 0
    scores, ordered = heads * across * along, lists * rows * units * math.log2(max(2, units))
    if selector.learned is not None:
        across, views, scores, depth = rows, 0, lists * rows * units, 0
    if selector.lines is not None:
        ordered = lists * shape.k_len * math.log2(max(2, shape.k_len)) + lists * rows * units
    return Work(1.0, *(one * shape.batch for one in (scores * depth, scores, ordered, views)))
