"""The op `sparsify::select`: a site's lists of keys, from its queries and keys and what its mask says of positions.

It is what a graph holds. torch.compile decomposes it into plain tensor operations, which Inductor fuses.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.expr import TRUE, And, Expr, Listed, Load, Pred, Var, as_expr, conjunction, disjunction
from sparsify.patterns.layouts.segments import Segments
from sparsify.patterns.selector import Selector
from sparsify.selection.choose import choose
from sparsify.selection.permute import key_order
from sparsify.text import parse_expr, parse_pred, to_text
from sparsify.walk import evaluate, variables

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define(
    "select(Tensor q, Tensor k, Tensor[] loads, Tensor? scores, SymInt q_offset, float scale, str text) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class Ask:
    """What a selection is asked with, as one text.

    position: that of a query among the keys, over q (absolute), N, Nq, b and loads. usable: which keys may be used,
    over b, k and the like; over q too where there is one query only. causal: whether a query sees keys up to its own
    only.
    """

    selector: Selector
    position: Expr = Var("q")
    usable: Pred = TRUE
    causal: bool = True

    def text(self) -> str:
        """The canonical string."""
        parts = json.loads(self.selector.text()), to_text(self.position), to_text(self.usable), self.causal
        return json.dumps(parts, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Ask:
        """Reads `text()` back."""
        return _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Ask:
    selector, position, usable, causal = json.loads(text)
    return Ask(Selector.parse(json.dumps(selector)), parse_expr(position), parse_pred(usable), causal)


def usable_keys(keep: Pred, one_query: bool) -> Pred:
    """What a site's mask says of keys, whoever asks: all of it where there is one query, else its parts without q."""
    parts = keep.parts if isinstance(keep, And) else (keep,)
    return keep if one_query else conjunction(part for part in parts if "q" not in variables(part))


def outputs(selector: Selector) -> int:
    """How many tensors `select` gives: index and count of each list, and the order of the keys, if it has one."""
    return 2 * len(selector.units()) + (selector.permute is not None)


def lists_of(selector: Selector, first: int, heads: int, kv_heads: int, row: Expr) -> Pred:
    """The lists of a selector as a predicate, where loads `_first`, ... are what `select` gives; `row` is a query's."""
    lists = selector.lists(heads, kv_heads)
    which = as_expr(0) if lists == 1 else Var("h") if lists == heads else Var("h") // (heads // lists)
    place = (Var("b"), which, row // selector.unit.q)
    return disjunction(
        Listed(Load(f"_{first + 2 * i}", (*place, as_expr(0))), Load(f"_{first + 2 * i + 1}", place), unit)
        for i, unit in enumerate(selector.units())
    )


def segments_of(selector: Selector, number: int, heads: int, kv_heads: int, position: Expr) -> Segments | None:
    """The selector's order of keys, where load `_number` is what `select` gives for it; None if it has none."""
    if selector.permute is None:
        return None
    which = as_expr(0) if kv_heads == 1 else Var("h") if kv_heads == heads else Var("h") // (heads // kv_heads)
    return Segments(selector.permute.segment, Load(f"_{number}", (Var("b"), which, Var("k"))), position)


@torch.library.impl(LIBRARY, "select", "CompositeImplicitAutograd")
def _select(q, k, loads, scores, q_offset, scale, text):  # type: ignore[no-untyped-def]
    ask = Ask.parse(text)
    position, valid = places_of(ask, q, k, loads, q_offset)
    given = {"scale": scale, "position": position, "valid": valid}
    order = key_order(ask.selector, q, k, **given) if ask.selector.permute else None
    lists = choose(ask.selector, q, k, **given, causal=ask.causal, scores=scores, order=order)
    return [tensor for pair in lists for tensor in pair] + ([] if order is None else [order])


def places_of(
    ask: Ask, q: torch.Tensor, k: torch.Tensor, loads: Sequence[torch.Tensor], q_offset: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The positions of the queries (B or 1, Nq), and which keys may be used (B or 1, Nk), None for all."""
    env = environment(q, k, loads, q_offset)
    q_len = q.shape[2]
    position = torch.as_tensor(evaluate(ask.position, env), device=q.device)
    position = position.expand(*(1,) * (4 - position.dim()), *position.shape).expand(-1, -1, q_len, -1)[:, 0, :, 0]
    return position, None if ask.usable == TRUE else _valid(ask.usable, env)


def environment(q: torch.Tensor, k: torch.Tensor, loads: Sequence[torch.Tensor], q_offset: int) -> dict[str, Any]:
    """What the names in a mask stand for, each broadcastable to (B, Hq, Nq, Nk)."""
    q_len, k_len = q.shape[2], k.shape[2]
    env: dict[str, Any] = {f"_{i}": load for i, load in enumerate(loads)} | {"N": k_len, "Nq": q_len}
    return env | {
        "b": torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1),
        "h": torch.arange(q.shape[1], device=q.device).view(-1, 1, 1),
        "q": torch.arange(q_len, device=q.device).view(-1, 1) + q_offset,
        "k": torch.arange(k_len, device=q.device),
    }


def _valid(usable: Pred, env: dict[str, Any]) -> torch.Tensor:
    """(B or 1, Nk): the keys that some query of some head may use."""
    found = torch.as_tensor(evaluate(usable, env), device=env["k"].device)
    found = found.expand(*(1,) * (4 - found.dim()), *found.shape)
    return found.expand(-1, -1, -1, env["k"].shape[0]).any(2).any(1)


LIBRARY.define(
    "last_key(Tensor q, Tensor k, Tensor[] loads, SymInt q_offset, str keep) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(LIBRARY, "last_key", "CompositeImplicitAutograd")
def _last_key(q, k, loads, q_offset, keep):  # type: ignore[no-untyped-def]
    """(B,) int64: the last key that a mask lets the queries of each row of the batch use; -1 where there is none."""
    env = environment(q, k, loads, q_offset)
    return torch.where(_valid(parse_pred(keep), env), env["k"], -1).amax(-1).expand(q.shape[0])


last_key = torch.ops.sparsify.last_key.default
# A flat list: index and count of the first list, then of the second (see `choose`), then the keys' order if they have
# one of their own (see `key_order`).
select = torch.ops.sparsify.select.default
