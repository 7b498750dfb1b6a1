"""What data says about tiles: bounds of loads are read from summaries, the least and greatest element of each block.

The launch makes a summary on the device, in one reduction over a load: O(N) work for whatever is indexed by position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from sparsify.codegen.triton.listing import predicates, rounds, static
from sparsify.expr import FALSE, And, Bound, Expr, Pred, conjunction
from sparsify.patterns.interior import has_gaps, interiors
from sparsify.patterns.lists import ListPass
from sparsify.patterns.tiles import BLOCK, analyse
from sparsify.program import Program
from sparsify.walk import data_bounds, loads, variables

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch


class Summary(NamedTuple):
    """The least (or the greatest) element of each block of a load along one axis."""

    source: str
    axis: int
    greatest: bool

    @property
    def name(self) -> str:
        return f"{self.source}_{'greatest' if self.greatest else 'least'}_{self.axis}"

    @classmethod
    def of(cls, bound: Bound) -> Summary:
        return cls(bound.load.source, bound.axis, bound.greatest)


def split(pred: Pred) -> tuple[Pred, Pred]:
    """The conditions that can be known to hold on a whole tile, and those that are tested on every tile."""
    parts = pred.parts if isinstance(pred, And) else (pred,)
    tested = [part for part in parts if analyse(part).full == FALSE]
    return conjunction(part for part in parts if part not in tested), conjunction(tested)


@functools.lru_cache(maxsize=4096)
def scanned(pred: Pred) -> bool:
    """Whether it takes data to tell what a key tile is."""
    return any(of_keys(bound) for part in (analyse(pred).empty, analyse(split(pred)[0]).full) for bound in _in([part]))


def gaps(pred: Pred) -> bool:
    """Whether each tile inside the bands is asked what it is: it can be EMPTY, or data can make it FULL."""
    return has_gaps(pred) or scanned(pred)


@functools.lru_cache(maxsize=1024)
def reads_pairs(program: Program) -> bool:
    """Whether a tensor is read pair by pair, which takes a tile's time."""
    read = [variables(load) for pred in predicates(program) for load in loads(pred)]
    return any("k" in names and names & {"q", "head"} for names in read)


@functools.lru_cache(maxsize=1024)
def by_bits(program: Program) -> bool:
    """Whether a kernel asks many key tiles at once what they are and then goes through all that are not EMPTY in one
    loop: where runs of key tiles are short, as in boxes of queries and in strides. Masks that are read pair by pair
    are left in loops of their own."""
    found = [static(keep) for keep in program.keep]
    if reads_pairs(program):
        return False
    if program.queries is not None:
        return any(scanned(rule) or (program.keys and gaps(rule)) for rule in found)
    return program.keys is None and all(has_gaps(rule) and not scanned(rule) for rule in found)


def of_keys(bound: Bound) -> bool:
    """Whether a bound differs from key tile to key tile."""
    return bool(variables(bound) & {"k0", "k1"})


@functools.lru_cache(maxsize=1024)
def summaries(program: Program) -> tuple[Summary, ...]:
    """The summaries that a program's kernel reads, in a fixed order."""
    steps = [step for turn in rounds(program) for step in turn.steps if step is not None]
    parts = [part for pred in program.keep for part in _parts(static(pred))]
    parts += [part for step in steps for part in list_rule(step)]
    return tuple(sorted({Summary.of(bound) for bound in _in(parts)}))


def list_rule(step: ListPass) -> tuple[Pred, Pred]:
    """When a rule keeps nothing of a tile of its list, and when all that can be known of it beforehand.

    The first and the last key bound a tile. Those of a unit that is smaller than a tile can be far apart, and the
    summaries between them many: then no data is asked.
    """
    rule, closed = analyse(step.keep), analyse(split(step.keep)[0])
    if step.listed.unit % BLOCK:
        rule, closed = rule.without_data(), closed.without_data()
    return rule.empty, closed.full


def _parts(pred: Pred) -> list[Expr | Pred | None]:
    """What a kernel evaluates on tiles for a predicate."""
    rule, closed = analyse(pred), split(pred)[0]
    found: list[Expr | Pred | None] = [part for band in rule.bands for part in (band.low, band.high, band.unless)]
    if gaps(pred):
        return [*found, rule.empty, analyse(closed).full]
    return found + [part for one in interiors(closed) for part in (one.low, one.high, one.when)]


def _in(parts: Iterable[Expr | Pred | None]) -> list[Bound]:
    return [bound for part in parts if part is not None for bound in data_bounds(part)]


def summary_arguments(launch: Launch) -> dict[str, torch.Tensor]:
    """The summaries by name: contiguous, shaped as the load but for one element a block along the axis."""
    import torch

    found, pairs = summaries(launch.program), {}
    for source, axis in dict.fromkeys((one.source, one.axis) for one in found):
        load = launch.loads[int(source[1:])]
        load = load.view(torch.uint8) if load.dtype == torch.bool else load
        rest = -load.shape[axis] % BLOCK
        if rest:
            last = load.narrow(axis, load.shape[axis] - 1, 1)
            load = torch.cat([load, last.expand(*load.shape[:axis], rest, *load.shape[axis + 1 :])], axis)
        pairs[source, axis] = torch.aminmax(load.unflatten(axis, (-1, BLOCK)), dim=axis + 1)
    return {one.name: pairs[one.source, one.axis][one.greatest].contiguous() for one in found}
