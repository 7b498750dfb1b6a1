"""The evidence as a short table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.planner.evidence import COSTS, MEASURES, Evidence, duration, percent, signed
from sparsify.planner.plan import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST = 12  # rows of a table


def summary(plan: Plan) -> RenderableType:
    """The front with this plan marked, what heads got, and what matters most, for a console of rich."""
    from rich.console import Group
    from rich.text import Text

    evidence = Evidence(plan)
    facts = [Text(f"{number} {what} ({remark})") for number, what, remark in evidence.facts]
    parts = [_front(evidence)] if evidence.marks else []
    return Group(*parts, _heads(evidence), *facts, *_remarks(plan))


def _front(evidence: Evidence) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    plan = evidence.plan
    table = Table("", "point", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (f"of dense {COSTS.get(plan.of, plan.of)}", *MEASURES):
        table.add_column(title, justify="right")
    marks = evidence.marks
    shown = [mark for mark in marks if not mark.point.uniform or mark in evidence.envelope][:MOST]
    for mark in shown:
        point, style = mark.point, "bold" if mark.chosen else ""
        losses = [signed(getattr(point, name)) for name in MEASURES]
        table.add_row("*" if mark.chosen else "", Text(point.name), percent(point.cost), *losses, style=style)
    table.caption = f"* this plan; losses in {plan.unit}, over dense attention's"
    table.caption_justify = "left"
    return table


def _heads(evidence: Evidence) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("pattern", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("heads", "of its dense cost"):
        table.add_column(title, justify="right")
    for entry in evidence.entries[:MOST]:
        table.add_row(Text(entry.candidate.name), f"{entry.heads:,}", percent(entry.weight))
    rest = evidence.entries[MOST:]
    if rest:
        table.add_row(f"{len(rest)} more", f"{sum(entry.heads for entry in rest):,}", "")
    return table


def _remarks(plan: Plan) -> list[RenderableType]:
    from rich.text import Text

    found = []
    if plan.retrieval:
        heads = ", ".join(f"{plan.sites[site].layer}.{head}" for site, head in plan.retrieval[:MOST])
        more = f" and {len(plan.retrieval) - MOST} more" if len(plan.retrieval) > MOST else ""
        found.append(Text(f"Far information goes through heads {heads}{more} (layer.head)."))
    if plan.bound is not None and plan.gap is not None:
        found.append(Text(f"The solver's bound is {plan.bound:.4g}; its choice is within {percent(plan.gap)} of it."))
    if plan.seconds:
        found.append(Text(f"Planned in {duration(plan.seconds)}."))
    return found
