"""What of a head's predicate is chosen from the data, and where that can be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sparsify.errors import PatternError
from sparsify.expr import FALSE, TRUE, And, Chosen, Expr, Or, Pred, conjunction, negate
from sparsify.patterns.causal import is_causal
from sparsify.patterns.head_rules import Compensation, Lifetimes, Online
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.pattern import K, Q
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.program import Skip


class HeadChoices(NamedTuple):
    """In one head's predicate: the selection that gives it a list of keys, the `online` budget of its kernel, the
    `compensation` for what it drops, and the `lifetimes` of its keys."""

    listed: Chosen | None
    online: Chosen | None
    compensation: Chosen | None
    lives: Chosen | None


def head_choices(keep: Pred) -> HeadChoices:
    """Raises PatternError for what no kernel can do: two of a kind, a negated one, and for those that are of the whole
    head in a union."""
    found = choices(keep)
    listed, online, compensation, lives = (
        [one for one in found if isinstance(Choice.parse(one.text).selector, kind)]
        for kind in (Selector, Online, Compensation, Lifetimes)
    )
    whole = keep.parts if isinstance(keep, And) else (keep,)
    if len(listed) > 1:
        raise PatternError("a head has two selections, which could choose a key twice; give it one")
    if len(online) > 1:
        raise PatternError("a head has two budgets `online`; give it one")
    if len(lives) > 1:
        raise PatternError("a head has two kinds of lifetimes of keys; give it one")
    if online and online[0] not in whole:
        raise PatternError("online leaves out of all that a head keeps, so combine it by & (all), not in a union")
    if compensation and len(found) > 1:
        raise PatternError("compensation is for what positions drop, and the head has a selection, too; give it one")
    if compensation and compensation[0] not in whole:
        raise PatternError("compensation is for all that a head drops: combine it by & with the whole of the pattern")
    return HeadChoices(*(next(iter(one), None) for one in (listed, online, compensation, lives)))


def dropped(allowed: Pred, keep: Pred, compensation: Chosen | None, position: Expr = Q) -> Pred:
    """The keys for which a head compensates, if it does: those that the model keeps (`allowed`) and `keep` drops.

    Keys after the query, whose position is given, are none of them where the head is causal. Conditions of both are
    asked once.
    """
    if compensation is None:
        return FALSE
    keep = with_choices(keep, {compensation: TRUE})
    if is_causal(keep, position):
        allowed = conjunction([allowed, position >= K])
    there, parts = ((one.parts if isinstance(one, And) else (one,)) for one in (allowed, keep))
    return conjunction([allowed, negate(conjunction(part for part in parts if part not in there))])


def skip_of(online: Chosen) -> Skip:
    """What a kernel may leave out by an `online` budget."""
    budget = Choice.parse(online.text).selector
    assert isinstance(budget, Online)
    return Skip(budget.share, budget.by_length)


def sees_no_future(keep: Pred, listed: Chosen, position: Expr = Q) -> bool:
    """Whether no key after the query, whose position is given, is kept for the sake of this selection."""
    match keep:
        case And(parts):
            others = conjunction(part for part in parts if listed not in choices(part))
            mine = (part for part in parts if listed in choices(part))
            return is_causal(others, position) or any(sees_no_future(part, listed, position) for part in mine)
        case Or(parts):
            return all(sees_no_future(part, listed, position) for part in parts if listed in choices(part))
    return False


def complaint(selector: Selector, one_query: bool, causal: bool) -> str:
    """Why an attention can't have this selection, or "". causal: whether its queries see no key after them."""
    here = "decode" if one_query else "prefill"
    if selector.phase not in ("both", here):
        return f"the selection serves {selector.phase}, and this is {here}"
    if selector.permute and not causal:
        return "the selection sorts keys inside segments, which a causal attention alone can tell apart"
    if selector.lines and not causal:
        return "the selection's lines are diagonals behind the query, so the attention must be causal"
    return ""


def check_order(found: Sequence[HeadChoices]) -> None:
    """Raises PatternError where only some heads have the selection that sorts the keys, of which there is one order."""
    if len({one.listed for one in found}) > 1:
        raise PatternError(
            "the heads share one order of keys, and only some of them have the selection that sorts them; give all "
            "heads of this attention that selection"
        )
