"""One attention as its kernels see it: what each head keeps over slots, and which heads share query tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsify.codegen.slots import slot_count
from sparsify.cost.choosing import Head, head_of, kept_units, rows_of
from sparsify.cost.kept import kept_pairs
from sparsify.cost.machine import Machine
from sparsify.cost.nest import Nest, Shape, cpp_nest, triton_nest
from sparsify.cost.positions import Positions
from sparsify.errors import InputError, PatternError
from sparsify.expr import Listed, Load, Pred, Var, as_expr, disjunction
from sparsify.patterns import Pattern
from sparsify.patterns.grid import grids
from sparsify.patterns.head_choices import complaint
from sparsify.patterns.layouts.by_head import layouts_at
from sparsify.patterns.layouts.lay_out import LaidOut, lay_out
from sparsify.patterns.pattern import Q
from sparsify.patterns.selector import Selector
from sparsify.program import Layout, Program
from sparsify.walk import variables


@dataclass(frozen=True)
class Site:
    """heads: of each query head. at: where queries and keys stand, over slots; tokens: as `keeps` has them, over tokens
    where these are known. keeps: what each head keeps of them, None where a selection decides. placed: whether there
    is a layout of the queries. orders: of tokens by which kernels read rows."""

    shape: Shape
    heads: tuple[Head, ...]
    at: Positions
    tokens: Positions
    keeps: tuple[Pred | None, ...]
    placed: bool = False
    orders: int = 0
    tuned: tuple[tuple[str, int], ...] = ()

    @property
    def list_rows(self) -> int:
        """How many queries share a list in all heads, 0 without lists."""
        return functools.reduce(math.gcd, (one.selector.unit.q for one in self.heads if one.selector is not None), 0)

    def nest(self, machine: Machine) -> Nest:
        """The loop nest that a machine's target makes of it."""
        slots = self.at.q_slots if self.placed else 0
        if machine.target == "triton":
            program, capacities = self.program()
            return triton_nest(self.shape, program, machine.arch, machine.cores, capacities, self.tuned)
        return cpp_nest(self.shape, machine.arch, machine.cores, self.list_rows, slots, self.tuned)

    def program(self) -> tuple[Program, list[int]]:
        """What a GPU runs, as far as its nest goes: where there is a layout, that one is of the queries only. And how
        many units each of its lists has room for."""
        layout = Layout(as_expr(self.at.q_slots), Q) if self.placed else None
        keeps: list[Pred] = []
        rooms: list[int] = []
        places: dict[str, int] = {}
        for one in self.heads:
            if one.selector is None:
                keeps.append(one.static)
                continue
            if one.text not in places:
                rows = rows_of(one.selector, self.at, one.looks_back(self.at.q_len))
                places[one.text] = 2 * len(rooms)
                rooms += [math.ceil(kept.max(initial=0)) for _, kept in kept_units(one.selector, rows)]
            keeps.append(one.static | (lists_from(one.selector, places[one.text], self.shape) & one.listed))
        return Program.of(keeps, loads=2 * len(rooms), queries=layout, target="triton"), rooms

    def pairs(self, head: int) -> float:
        """How many pairs of tokens a head's static rule keeps: counted over tokens, as slots hold some more."""
        keep = self.keeps[head]
        return kept_pairs(*rule_of(self.heads[head].static if keep is None else keep, head), self.tokens)

    def rules(self, heads: range) -> tuple[tuple[Pred, int], ...]:
        """The distinct static rules of some heads, each with a head that has it."""
        return tuple(dict.fromkeys(rule_of(self.heads[h].static, h) for h in heads))


def lists_from(selector: Selector, first: int, shape: Shape) -> Pred:
    """The lists of a selector, as a predicate over loads `_first` and so on."""
    lists = selector.lists(shape.heads, shape.kv_heads)
    which = as_expr(0) if lists == 1 else Var("h") if lists == shape.heads else Var("h") // (shape.heads // lists)
    place = (Var("b"), which, (Q - Var("N") + Var("Nq")) // selector.unit.q)
    names = enumerate(selector.units())
    return disjunction(
        Listed(Load(f"_{first + 2 * i}", (*place, as_expr(0))), Load(f"_{first + 2 * i + 1}", place), unit)
        for i, unit in names
    )


def rule_of(keep: Pred, head: int) -> tuple[Pred, int]:
    """A predicate and the head that it is of, 0 where that makes no difference."""
    return keep, head if _names_head(keep) else 0


@functools.lru_cache(maxsize=4096)
def _names_head(keep: Pred) -> bool:
    return "h" in variables(keep)


@functools.lru_cache(maxsize=4096)
def _head(pattern: Pattern) -> Head:
    return head_of(pattern.keep())


def site_of(patterns: tuple[Pattern, ...], shape: Shape) -> Site:
    """The site of these patterns. Raises InputError for what no kernel can do."""
    try:
        heads = tuple(map(_head, patterns))
    except PatternError as error:
        raise InputError(f"cost: patterns: {error}") from None
    for one in heads:
        if one.selector is None:
            continue
        if reason := complaint(one.selector, shape.q_len == 1, one.looks_back(shape.q_len)):
            raise InputError(f"cost: patterns: {reason}")
    whole = shape.q_len == shape.k_len
    tokens = Positions(shape.q_len, shape.k_len, shape.k_len - shape.q_len, shape.q_len, shape.k_len)
    keeps = tuple(one.static if one.selector is None else None for one in heads)
    listed = any(one.selector is not None for one in heads)
    placed = _laid_out(patterns, [one.static for one in heads], shape) if whole and not listed else None
    if placed is None or placed.chosen is None:
        sorts = any(one.selector is not None and one.selector.permute is not None for one in heads)
        return Site(shape, heads, tokens, tokens, keeps, orders=int(sorts))
    env = {"N": shape.k_len, "Nq": shape.q_len}
    laid_out = site_over_slots(shape, placed.keeps, tokens, (placed.queries, placed.keys), env)
    return replace(laid_out, keeps=keeps, tokens=tokens)


def _laid_out(patterns: tuple[Pattern, ...], keeps: list[Pred], shape: Shape) -> LaidOut:
    """What `sparsify.attention` makes of patterns whose queries are all tokens."""
    found = [grid for one in patterns for grid in grids(one)]
    by_head = layouts_at(tuple(keeps), shape.kv_heads, shape.k_len)
    return lay_out(keeps, found, shape.k_len if found else 0, by_head=by_head)


def site_over_slots(
    shape: Shape, keeps: tuple[Pred, ...], tokens: Positions, layouts: tuple[Layout | None, Layout | None],
    env: Mapping[str, Any],
) -> Site:  # fmt: skip
    """The site of predicates over the slots of layouts, of the queries and of the keys; None leaves tokens as they are.

    env: what numbers of slots are of: N, Nq and size variables.
    """
    slots = {"q_slots": slot_count(layouts[0], shape.q_len, env), "k_slots": slot_count(layouts[1], shape.k_len, env)}
    at, orders = replace(tokens, **slots), sum(layout is not None for layout in layouts)
    return Site(shape, tuple(map(Head, keeps)), at, at, keeps, layouts[0] is not None, orders)
