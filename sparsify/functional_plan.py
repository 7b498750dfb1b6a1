"""What `sparsify.attention` makes of patterns before it sees numbers: a program, and what selections are asked with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from sparsify import codegen, env
from sparsify.bias import Term, parse_load
from sparsify.errors import InputError, PatternError
from sparsify.expr import TRUE, Chosen, Pred, Test, Var
from sparsify.patterns.head_choices import (
    HeadChoices,
    check_order,
    complaint,
    dropped,
    head_choices,
    sees_no_future,
    skip_of,
)
from sparsify.patterns.layouts.by_head import NEVER, best_by_head
from sparsify.patterns.layouts.lay_out import lay_out
from sparsify.patterns.lists import with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.program import Program
from sparsify.selection.compensate import Dropped
from sparsify.selection.site import Ask, lists_of, outputs, segments_of, usable_keys
from sparsify.text import parse_expr, parse_pred

T = TypeVar("T")


class Where(NamedTuple):
    """Where a mask is read. loads: how many there are before the lists. kind: "keep", "add", or None without a mask.

    index: that of the load `_0`, as text. row: a query's number from the first query on, as text.
    """

    loads: int
    kind: str | None
    index: str | None
    row: str


@torch.compiler.assume_constant_result
def plan(
    rules: tuple[str, ...],
    where: tuple,
    grids: tuple,
    heads: int,
    kv_heads: int,
    one_query: bool,
    device: str,
    by_head: bool = False,
) -> tuple[str, tuple[str, ...], str]:
    """The canonical program of the rules of all heads and of a mask, the text of each selection to be made, and that of
    what is dropped and joins as one key, "" for nothing.

    `where` has the fields of a `Where`. grids: those in the heads' patterns, each as (class, fields), and of how many
    tokens, where all of them are queries and keys; else ((), 0). by_head: whether they may lie `by_head`, which takes
    `least_tokens`. Raises InputError for a selection that can't be made
    here.
    """
    return _plan(rules, Where(*where), grids, heads, kv_heads, one_query, env.target(), device, by_head)


@torch.compiler.assume_constant_result
def least_tokens(rules: tuple[str, ...], kv_heads: int) -> int:
    """From how many tokens on it pays to lay those of each key head out by its stride, if all are queries and keys."""
    return _least_tokens(rules, kv_heads)


@functools.lru_cache(maxsize=1024)
@torch.compiler.disable
def _least_tokens(rules: tuple[str, ...], kv_heads: int) -> int:
    found = _pattern_checked(lambda keeps: best_by_head(keeps, kv_heads), tuple(map(parse_pred, rules)))
    return NEVER if found is None else found.least


@functools.lru_cache(maxsize=1024)
@torch.compiler.disable  # Dynamo runs what is constant to it, and would compile what that calls
def _plan(
    rules: tuple[str, ...],
    where: Where,
    grids: tuple,
    heads: int,
    kv_heads: int,
    one_query: bool,
    target: str,
    device: str,
    by_head: bool,
) -> tuple[str, tuple[str, ...], str]:
    keeps, bias, usable = _with_mask([parse_pred(rule) for rule in rules], where, one_query)
    found = [_pattern_checked(head_choices, keep) for keep in keeps]
    if any(head.lives is not None for head in found):
        raise InputError("attention: pattern: lifetimes of keys need their module, which a compiled model is given")
    made: dict[Chosen, Pred] = {}
    asks, loads, order = [], where.loads, None
    for chosen in dict.fromkeys(head.listed for head in found if head.listed is not None):
        mine = (keep for keep, head in zip(keeps, found, strict=True) if head.listed == chosen)
        causal = one_query or all(sees_no_future(keep, chosen) for keep in mine)
        selector = _selector(chosen, one_query, causal)
        asks.append(Ask(selector, Var("q"), usable, causal).text())
        made[chosen] = lists_of(selector, loads, heads, kv_heads, parse_expr(where.row))
        loads += outputs(selector)
        order = segments_of(selector, loads - 1, heads, kv_heads, Var("q"))
        if order is not None:
            _pattern_checked(check_order, found)
            made[chosen] = order.chosen(made[chosen])
    skips = {head.online: skip_of(head.online) for head in found if head.online is not None}
    made |= dict.fromkeys(skips, TRUE) | {head.compensation: TRUE for head in found if head.compensation is not None}
    away = _dropped(keeps, found, where, one_query)
    name = codegen.choose(device) if target == "auto" else target
    of_heads = tuple(skips.get(head.online) for head in found) if skips else ()
    if order is None:
        drawn = [grid(*given) for grid, given in grids[0]]
        apart = best_by_head(tuple(map(parse_pred, rules)), kv_heads) if by_head else None
        laid_out = lay_out([with_choices(keep, made) for keep in keeps], drawn, grids[1], bias, None, apart)
    else:
        laid_out = order.laid_out((with_choices(order.keep(keep), made) for keep in keeps), bias)
    given = {"loads": loads, "target": name, "skips": of_heads}
    return Program.of(laid_out.keeps, **laid_out.fields(), **given).text(), tuple(asks), away


def _dropped(keeps: list[Pred], found: list[HeadChoices], where: Where, one_query: bool) -> str:
    """What the heads that compensate drop of what the mask keeps."""
    if all(head.compensation is None for head in found):
        return ""
    if not one_query:
        raise InputError("attention: pattern: compensation serves decode, one query, and this is prefill")
    if where.kind == "add":
        wrong = "a mask that is added has none for a mean of keys; give a mask of bool"
        raise InputError(f"attention: pattern: compensation needs scores without biases, and {wrong}")
    mask = Test(parse_load(f"_0[{where.index}]")) if where.kind == "keep" else TRUE
    pairs = zip(keeps, found, strict=True)
    return Dropped.of([dropped(mask, keep, head.compensation) for keep, head in pairs]).text()


def _with_mask(keeps: list[Pred], where: Where, one_query: bool) -> tuple[list[Pred], tuple[Term, ...], Pred]:
    """What heads keep, what is added to scores, and which keys a selection may use."""
    if where.kind is None:
        return keeps, (), TRUE
    mask = parse_load(f"_0[{where.index}]")
    usable = usable_keys(Test(mask), one_query)
    if where.kind == "add":
        return keeps, (Term(loads=(mask,)),), usable
    return [keep & Test(mask) for keep in keeps], (), usable


def _pattern_checked(check: Callable[[Any], T], given: Any) -> T:
    """What a check of patterns gives, its PatternError as an InputError of this function."""
    try:
        return check(given)
    except PatternError as error:
        raise InputError(f"attention: pattern: {error}") from None


def _selector(chosen: Chosen, one_query: bool, causal: bool) -> Selector:
    """The selector of a choice that can be made for one call by itself."""
    choice = Choice.parse(chosen.text)
    assert isinstance(choice.selector, Selector)
    if choice.reuse.layers or choice.reuse.by_steps:
        raise InputError("attention: pattern: a choice is shared between the layers and steps of a compiled model only")
    if one_query and choice.selector.score.norm == "accumulated":
        raise InputError("attention: pattern: sums over earlier steps are kept by a compiled model only")
    if choice.selector.learned is not None:
        raise InputError("attention: pattern: a learned selection needs its module, which a compiled model is given")
    if reason := complaint(choice.selector, one_query, causal):
        raise InputError(f"attention: pattern: {reason}")
    return choice.selector
