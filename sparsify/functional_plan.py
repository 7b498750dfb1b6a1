"""What `sparsify.attention` makes of patterns before it sees numbers: a program, and what selections are asked with."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from sparsify import codegen, env
from sparsify.bias import Term, parse_load
from sparsify.errors import InputError, PatternError
from sparsify.expr import TRUE, Chosen, Pred, Test, Var, conjunction
from sparsify.patterns.layouts.lay_out import lay_out
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Lifetimes, Online, Selector
from sparsify.program import Program, Skip
from sparsify.selection.site import Ask, lists_of, outputs, segments_of, usable_keys
from sparsify.text import parse_expr, parse_pred


class Where(NamedTuple):
    """Where a mask is read. loads: how many there are before the lists. kind: "keep", "add", or None without a mask.

    index: that of the load `_0`, as text. row: a query's number from the first query on; None where no load says it.
    """

    loads: int
    kind: str | None
    index: str | None
    row: str | None


@torch.compiler.assume_constant_result
def plan(
    rules: tuple[str, ...], where: tuple, grids: tuple, heads: int, kv_heads: int, one_query: bool, device: str
) -> tuple[str, tuple[str, ...]]:
    """The canonical program of the rules of all heads and of a mask, and the text of each selection to be made.

    `where` has the fields of a `Where`. grids: those in the heads' patterns, each as (class, fields), and of how many
    tokens, where all of them are queries and keys; else ((), 0). Raises InputError for a selection that can't be made
    here.
    """
    return _plan(rules, Where(*where), grids, heads, kv_heads, one_query, env.target(), device)


@functools.lru_cache(maxsize=1024)
def _plan(
    rules: tuple[str, ...],
    where: Where,
    grids: tuple,
    heads: int,
    kv_heads: int,
    one_query: bool,
    target: str,
    device: str,
) -> tuple[str, tuple[str, ...]]:
    keeps, bias, usable = _with_mask([parse_pred(rule) for rule in rules], where, one_query)
    made: dict[Chosen, Pred] = {}
    skips: dict[Chosen, Skip] = {}
    asks, loads, order = [], where.loads, None
    for chosen in dict.fromkeys(one for keep in keeps for one in _choices(keep)):
        selector = _selector(chosen, one_query)
        if isinstance(selector, Online):
            made[chosen], skips[chosen] = TRUE, Skip(selector.value, selector.per_length)
            continue
        causal = _is_causal(keeps, chosen, one_query)
        asks.append(Ask(selector, Var("q"), usable, causal).text())
        made[chosen] = lists_of(selector, loads, heads, kv_heads, parse_expr(_row(where)))
        loads += outputs(selector)
        order = segments_of(selector, loads - 1, heads, kv_heads, Var("q"))
        if order is not None:
            _check_order(keeps, causal)
            made[chosen] = order.chosen(made[chosen])
    name = codegen.choose(device) if target == "auto" else target
    of_heads = tuple(next((skips[one] for one in _choices(keep) if one in skips), None) for keep in keeps)
    if order is None:
        drawn = [grid(*given) for grid, given in grids[0]]
        laid_out = lay_out([with_choices(keep, made) for keep in keeps], drawn, grids[1], bias)
    else:
        laid_out = order.laid_out((with_choices(order.keep(keep), made) for keep in keeps), bias)
    given = {"loads": loads, "target": name, "skips": of_heads if skips else ()}
    return Program.of(laid_out.keeps, **laid_out.fields(), **given).text(), tuple(asks)


def _with_mask(keeps: list[Pred], where: Where, one_query: bool) -> tuple[list[Pred], tuple[Term, ...], Pred]:
    """What heads keep, what is added to scores, and which keys a selection may use."""
    if where.kind is None:
        return keeps, (), TRUE
    mask = parse_load(f"_0[{where.index}]")
    usable = usable_keys(Test(mask), one_query)
    if where.kind == "add":
        return keeps, (Term(loads=(mask,)),), usable
    return [keep & Test(mask) for keep in keeps], (), usable


def _row(where: Where) -> str:
    if where.row is None:
        raise InputError(
            "attention: q_offset: a selection needs the queries to be the last ones of the keys, or a mask"
        )
    return where.row


def _choices(keep: Pred) -> tuple[Chosen, ...]:
    try:
        found = choices(keep)
    except PatternError as error:
        raise InputError(f"attention: pattern: {error}") from None
    if len(found) > 1:
        raise InputError("attention: pattern: a head has two selections, which could choose a key twice; give it one")
    return found


def _selector(chosen: Chosen, one_query: bool) -> Selector | Online:
    """The selector of a choice that can be made for one call by itself."""
    choice = Choice.parse(chosen.text)
    if choice.reuse.layers or choice.reuse.by_steps:
        raise InputError("attention: pattern: a choice is shared between the layers and steps of a compiled model only")
    if isinstance(choice.selector, Online):
        return choice.selector
    here = "decode" if one_query else "prefill"
    if isinstance(choice.selector, Lifetimes):
        raise InputError("attention: pattern: lifetimes of keys need their module, which a compiled model is given")
    if choice.selector.phase not in ("both", here):
        raise InputError(f"attention: pattern: the selection serves {choice.selector.phase}, and this is {here}")
    if one_query and choice.selector.score.norm == "accumulated":
        raise InputError("attention: pattern: sums over earlier steps are kept by a compiled model only")
    if choice.selector.learned is not None:
        raise InputError("attention: pattern: a learned selection needs its module, which a compiled model is given")
    return choice.selector


def _is_causal(keeps: list[Pred], chosen: Chosen, one_query: bool) -> bool:
    """Whether the heads with this choice see no key after their query."""
    mine = [keep for keep in keeps if chosen in choices(keep)]
    return one_query or all(conjunction([keep, Var("k") <= Var("q")]) == keep for keep in mine)


def _check_order(keeps: list[Pred], causal: bool) -> None:
    """Refuses a selection that sorts the keys of some heads only, or of an attention that isn't causal."""
    if len({_choices(keep) for keep in keeps}) > 1:
        found = "the heads share one order of keys, and only some of them have the selection that sorts them"
        raise InputError(f"attention: pattern: {found}; give all heads that selection")
    if not causal:
        found = "the selection sorts keys inside segments, which a causal attention alone can tell apart"
        raise InputError(f"attention: pattern: {found}; combine it with causal()")
