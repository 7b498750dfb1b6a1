"""How a kernel goes through lists of keys: round by round, and with the query heads of a group in one tile.

A rule's list passes (`patterns.lists`) are loops over lists. A round is one such loop in the kernel's text: one list of
each rule at most, all of one unit. Keys of a list lie one behind another by *place*: place p of a list is key
`index[p // unit] * unit + p % unit`, and a tile is BLOCK_N places.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from sparsify.bias import Bias
from sparsify.expr import FloorDiv, Listed, Load, Pred, Var, constant
from sparsify.patterns.lists import ListPass, lists, passes
from sparsify.program import Program
from sparsify.walk import substitute, variables

Q0 = Var("q0")


@dataclass(frozen=True)
class Round:
    """One list of each rule, None for a rule that has no more lists of this unit."""

    unit: int
    steps: tuple[ListPass | None, ...]

    def read(self, number: int) -> Listed | None:
        """Rule `number`'s list as a query tile reads it, by the tile's first query."""
        step = self.steps[number]
        return None if step is None else substitute(step.listed, {"q": Q0})


@functools.lru_cache(maxsize=1024)
def rounds(program: Program) -> tuple[Round, ...]:
    """The rounds of a program, the largest units first."""
    by_rule = [passes(keep).lists for keep in program.keep]
    found = []
    for unit in sorted({step.listed.unit for steps in by_rule for step in steps}, reverse=True):
        columns = [[step for step in steps if step.listed.unit == unit] for steps in by_rule]
        found += [
            Round(unit, tuple(column[turn] if turn < len(column) else None for column in columns))
            for turn in range(max(map(len, columns)))
        ]
    return tuple(found)


def static(pred: Pred) -> Pred:
    """The part of a rule that closed forms loop over; the rule itself where it has no lists."""
    return passes(pred).static if lists(pred) else pred


@functools.lru_cache(maxsize=1024)
def predicates(program: Program) -> tuple[Pred, ...]:
    """Every predicate that a kernel evaluates on tiles: the static parts, and what is kept of lists."""
    steps = [step.keep for turn in rounds(program) for step in turn.steps if step is not None]
    return (*map(static, program.keep), *steps)


def packing(program: Program) -> bool:
    """Whether a kernel's tiles can hold fewer queries than rows, and several heads of each."""
    return program.queries is None or bool(rounds(program))


def packs(program: Program, group: int) -> bool:
    """Whether the `group` query heads of a key head can share a query tile: they keep the same keys by one rule.

    What is added to scores may still differ from head to head.
    """
    heads = program.heads
    alike = all(heads[i] == heads[i // group * group] for i in range(len(heads)))
    whole = program.queries is None and program.keys is None
    steps = [step.listed for turn in rounds(program) for step in turn.steps if step is not None]
    shared = all(_by_group(load, group) for one in steps for load in (one.index, one.count))
    return whole and alike and shared and not any("h" in variables(pred) for pred in predicates(program))


def _by_group(load: Load, group: int) -> bool:
    """Whether an element is the same for all heads of a group."""
    for part in load.index:
        size = constant(part.right) if isinstance(part, FloorDiv) and part.left == Var("h") else None
        if "h" in variables(part) and (size is None or size % group):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def packed(program: Program) -> Program:
    """The program as a kernel runs it whose tiles hold several heads: what is added to scores asks for `head`, each
    row's own, and `h` is the first head of the tile."""
    sink = None if program.sink is None else _by_row(program.sink)
    return replace(program, bias=_by_row(program.bias), sink=sink)


def _by_row(bias: Bias) -> Bias:
    own = {"h": Var("head")}
    return tuple(
        replace(
            term,
            loads=tuple(substitute(load, own) for load in term.loads),
            integer=substitute(term.integer, own),
            where=substitute(term.where, own),
        )
        for term in bias
    )
