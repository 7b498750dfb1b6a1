"""Drawn selectors and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st
from selection_reference import reference

from sparsify.errors import PatternError
from sparsify.patterns.selector import Budget, Force, Heads, Lines, Score, Selector, Unit
from sparsify.selection import choose

CLEAR = 1e-5  # a decision that hangs on less than this is left to rounding


@dataclass
class Inputs:
    """Tensors for `choose`, as it takes them."""

    q: torch.Tensor
    k: torch.Tensor
    position: torch.Tensor
    valid: torch.Tensor | None
    causal: bool
    scale: float = 0.35
    scores: torch.Tensor | None = None

    def choose(self, selector: Selector) -> list[tuple[torch.Tensor, torch.Tensor]]:
        more = {"position": self.position, "valid": self.valid, "causal": self.causal, "scores": self.scores}
        return choose(selector, self.q, self.k, scale=self.scale, **more)

    def sets(self, selector: Selector) -> list:
        """kept[b][list][row], a tuple of sets, after a check that lists are as they must be."""
        return as_sets(self.choose(selector), selector, self.k.shape[2])

    def reference(self, selector: Selector) -> tuple[list, float]:
        batch, _, keys, _ = self.k.shape
        valid = torch.ones(1, keys, dtype=torch.bool) if self.valid is None else self.valid
        return reference(
            selector,
            self.q.numpy(),
            self.k.numpy(),
            scale=self.scale,
            position=self.position.expand(batch, -1).numpy(),
            valid=valid.expand(batch, -1).numpy(),
            causal=self.causal,
            scores=None if self.scores is None else self.scores.numpy(),
        )


def as_sets(lists: list[tuple[torch.Tensor, torch.Tensor]], selector: Selector, keys: int) -> list:
    """Lists as kept[b][list][row]: ascending, unique, filled up with the number of units, count within capacity."""
    found = []
    for (index, count), unit in zip(lists, selector.units(), strict=True):
        units = -(-keys // unit)
        assert index.dtype == count.dtype == torch.int32
        assert index.shape[:-1] == count.shape
        table = index.flatten(0, -2).tolist()
        for entries, used in zip(table, count.flatten().tolist(), strict=True):
            assert 0 <= used <= len(entries)
            assert all(a < b for a, b in pairwise(entries[:used])), entries
            assert all(0 <= u < units for u in entries[:used]) and all(u == units for u in entries[used:]), entries
        sets = [set(entries[:used]) for entries, used in zip(table, count.flatten().tolist(), strict=True)]
        found.append(np.array(sets, dtype=object).reshape(count.shape))
    batch, heads, rows = found[0].shape
    return [[[tuple(x[b, h, r] for x in found) for r in range(rows)] for h in range(heads)] for b in range(batch)]


def words(*names: str) -> st.SearchStrategy[str]:
    return st.sampled_from(names)


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    scope = draw(words("head", "kv_group", "layer"))
    if scope == "head":
        return Heads("head")
    op = draw(words("sum", "max", "mean", "best_rank"))
    if op == "best_rank":
        return Heads(scope, op)
    when = draw(words("query", "pre", "token", "unit"))
    return Heads("kv_group" if when == "query" else scope, "sum" if when == "query" and op == "max" else op, when)


@st.composite
def scores(draw: st.DrawFn) -> Score:
    kview = draw(words("token", "mean", "minmax", "attn_pool", "rep_search", "strided(2)", "strided(4)"))
    qview = "token" if "strided" in kview else draw(words("token", "mean", "last(1)", "last(3)", "last(40)"))
    norm = draw(words("none", "softmax", "exp_rowmax", "accumulated"))
    return Score(
        qview,
        kview,
        "upper_bound" if kview == "minmax" else "dot",
        norm,
        draw(words("all", "middle")),
        draw(words("touch", "past")),
        draw(words("sum", "max", "mean")),
        draw(words("none", "none", "max(3)", "mean(5)")),
        draw(st.sampled_from([1.0, 0.7])) if norm == "accumulated" else 1.0,
    )


def forces() -> st.SearchStrategy[Force]:
    few = st.integers(0, 3)
    exempt = st.sampled_from([None, None, 0.2, 0.5])
    return st.builds(Force, few, few, words("units", "tokens"), st.sampled_from([0, 0, 1, 2]), exempt, st.booleans())


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    rule = draw(words("topk", "topk", "ratio", "topp", "relmax", "threshold"))
    if rule == "topk":
        return Budget("topk", draw(st.integers(1, 12)))
    value = draw(st.sampled_from([0.1, 0.3, 0.5, 0.9]))
    least, most = draw(st.integers(0, 3)), draw(st.sampled_from([None, None, 3, 5]))
    per = "row" if rule == "threshold" else draw(words("row", "row", "head"))
    return Budget(rule, value, per, least, most)


@st.composite
def unit_selectors(draw: st.DrawFn) -> Selector:
    """Any selector without lines; what has no meaning together is drawn anew."""
    while True:
        unit = Unit(draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([1, 4, 8])))
        hook = draw(st.sampled_from([None] * 5 + ["hook"]))
        try:
            score = draw(scores())
            if hook:
                score = Score(domain=score.domain, causal=score.causal)
            return Selector(draw(budgets()), unit, score, draw(heads()), draw(forces()), learned=hook)
        except PatternError:
            continue


@st.composite
def line_selectors(draw: st.DrawFn) -> Selector:
    verticals, slashes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    lines = Lines(verticals, slashes, draw(st.integers(0, min(2, verticals))), draw(st.integers(0, min(2, slashes))))
    unit = Unit(draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8])))
    joint = draw(heads().filter(lambda h: h.op != "best_rank"))
    return Selector(None, unit, Score(draw(words("last(1)", "last(5)")), norm="softmax"), joint, lines=lines)


@st.composite
def inputs(draw: st.DrawFn, selector: Selector, whole: bool = False) -> Inputs:
    """Odd sizes, GQA, padding on either side, decode, chunks in the middle, queries on other positions per batch."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    keys = draw(st.integers(1, 40))
    kv_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kind = draw(words("square", "decode", "chunk", "any"))
    queries = {"square": keys, "decode": 1}.get(kind) or draw(st.integers(1, 20))
    start = {"square": 0, "decode": keys - 1, "chunk": max(0, keys // 2 - queries // 2)}.get(kind)
    if start is None:
        start = draw(st.integers(-3, keys - 1))
    if selector.lines:  # a diagonal begins at the query's own key
        queries = min(queries, keys - max(start, 0))
    position = start + torch.arange(queries)[None]
    valid = None
    padded = draw(st.integers(0, keys // 2)) if not whole and draw(st.booleans()) else 0
    if padded:
        valid = torch.ones(batch, keys, dtype=torch.bool)
        left = draw(st.booleans())
        valid[0, : padded if left else 0] = False
        valid[0, keys if left else keys - padded :] = False
    made = Inputs(
        torch.randn(batch, kv_heads * group, queries, 8),
        torch.randn(batch, kv_heads, keys, 8),
        position,
        valid,
        draw(st.booleans()) if not selector.lines else True,
    )
    if selector.learned:
        rows, units = -(-queries // selector.unit.q), -(-keys // selector.unit.k)
        given = draw(st.sampled_from([1, kv_heads, kv_heads * group]))
        made.scores = torch.rand(batch, given, rows, units)
    return made
