"""The op `sparsify::select_again`: a choice that holds for several decode steps, in buffers of the graph.

A row of the batch chooses anew when its choice is too old, when its mean query has turned away from that of the choice,
or when it begins another sequence (`sequence.begins`). What was forced then is part of the choice, and what
is forced now is kept beside it. The op is one piece, so that a step that needs no new choice computes none.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.patterns.reuse import Reuse
from sparsify.patterns.selector import Selector
from sparsify.selection import sequence
from sparsify.selection.choose import choose
from sparsify.selection.geometry import forced_units, places
from sparsify.selection.order import listed
from sparsify.selection.sequence import begins
from sparsify.selection.site import Ask, places_of

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define(
    "select_again(Tensor q, Tensor k, Tensor[] loads, SymInt q_offset, float scale, str text, Tensor(a!) index, "
    "Tensor(b!) count, Tensor(c!) age, Tensor(d!) query, Tensor(e!) last, "
    "Tensor(f!) seen) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
UNUSED = 2**30  # an entry of a kept list that holds no unit


@dataclass(frozen=True)
class Held:
    """An `Ask` whose answer holds for a while, as one text."""

    ask: Ask
    every: int
    cosine: float | None

    def text(self) -> str:
        """The canonical string."""
        return json.dumps([self.ask.text(), self.every, self.cosine])

    @classmethod
    def of(cls, ask: Ask, reuse: Reuse) -> Held:
        return cls(ask, reuse.every, reuse.cosine)

    @classmethod
    def parse(cls, text: str) -> Held:
        """Reads `text()` back."""
        return _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Held:
    ask, every, cosine = json.loads(text)
    return Held(Ask.parse(ask), every, cosine)


def room(selector: Selector) -> int:
    """How many units a kept list has room for. Raises InputError for a selector whose lists have no fixed size."""
    if selector.lines:
        raise InputError("a choice that holds for several steps is of units, and lines are of a whole call")
    if selector.permute:
        raise InputError("a choice that holds for several steps is of keys in their own order, and permute sorts them")
    budget, force = selector.budget, selector.force
    most = None if budget is None else budget.value if budget.rule == "topk" else budget.max
    if selector.score.norm == "accumulated":
        raise InputError("a choice that holds for several steps can't be by sums to which every step adds")
    if most is None:
        raise InputError("a choice that holds for several steps needs a fixed size: a topk budget, or one with a max")
    for field, given in (("force.last_rows", force.last_rows), ("force.exempt", force.exempt is not None)):
        if given:
            raise InputError(f"a choice that holds for several steps has a fixed size, and {field} has none")
    if selector.learned is not None:
        raise InputError("a choice that holds for several steps can't be learned: its scores come with each step")
    return int(most) + force.most(selector.unit)


def buffers(
    selector: Selector, batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> dict[str, Tensor]:
    """What the op keeps between steps, by the name of its argument: index and count of the lists, for each row of the
    batch the age of its choice and the mean query of that, and what tells sequences apart."""
    lists = selector.lists(heads, kv_heads)
    return {
        "index": torch.full((batch, lists, 1, room(selector)), UNUSED, dtype=torch.int32, device=device),
        "count": torch.zeros(batch, lists, 1, dtype=torch.int32, device=device),
        "age": torch.zeros(batch, dtype=torch.int64, device=device),
        "query": torch.zeros(batch, head_dim, dtype=torch.float32, device=device),
    } | sequence.buffers(batch, kv_heads, head_dim, device)


@torch.library.impl(LIBRARY, "select_again", "CompositeExplicitAutograd")
def _select_again(q, k, loads, q_offset, scale, text, index, count, age, query, last, seen):  # type: ignore[no-untyped-def]
    held = Held.parse(text)
    selector = held.ask.selector
    position, valid = places_of(held.ask, q, k, loads, q_offset)
    at, mean = position.expand(q.shape[0], 1)[:, 0], q.float().mean((1, 2))
    fresh = begins(k, at, last, seen) | _outlived(held, mean, age, query)
    if bool(fresh.any()):
        ((found, many),) = choose(selector, q, k, scale=scale, position=position, valid=valid, causal=held.ask.causal)
        units = -(-k.shape[2] // selector.unit.k)
        kept = torch.full_like(index, UNUSED)
        kept[..., : found.shape[-1]] = torch.where(found < units, found, UNUSED)
        index.copy_(torch.where(fresh[:, None, None, None], kept, index))
        count.copy_(torch.where(fresh[:, None, None], many, count))
        query.copy_(torch.where(fresh[:, None], mean, query))
    age.copy_(torch.where(fresh, 0, age + 1))
    return _with_forced(selector, index, places(selector, position, valid, k.shape[2], held.ask.causal))


def _outlived(held: Held, mean: Tensor, age: Tensor, query: Tensor) -> Tensor:
    """(B,): the rows whose choice holds no longer."""
    fresh = torch.zeros_like(age, dtype=torch.bool)
    if held.every > 1 or held.cosine is None:
        fresh = fresh | (age + 1 >= held.every)
    if held.cosine is not None:
        fresh = fresh | (torch.cosine_similarity(mean, query, dim=-1) < held.cosine)
    return fresh


def _with_forced(selector: Selector, index: Tensor, at: Any) -> list[Tensor]:
    """The kept units and those that are forced now, as [index, count]."""
    units = at.reach.shape[-1]
    kept = torch.zeros(*index.shape[:-1], units + 1, dtype=torch.bool, device=index.device)
    kept.scatter_(-1, index.clamp(max=units).long(), True)
    forced = forced_units(selector, at).unsqueeze(1)
    return list(listed(kept[..., :units] | forced, min(units, index.shape[-1] + selector.force.most(selector.unit))))


@torch.library.register_fake("sparsify::select_again", lib=LIBRARY)
def _fake(q, k, loads, q_offset, scale, text, index, count, age, query, last, seen):  # type: ignore[no-untyped-def]
    selector = Held.parse(text).ask.selector
    units = -(-k.shape[2] // selector.unit.k)
    capacity = torch.sym_min(units, index.shape[-1] + selector.force.most(selector.unit))
    return [index.new_empty(*index.shape[:-1], capacity), torch.empty_like(count)]


select_again = torch.ops.sparsify.select_again.default
