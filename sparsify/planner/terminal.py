"""What a plan shows at a terminal: a short table, and the front."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.planner.plan import Plan, Point, SitePlan

WIDTH = 30


def summary(found: Plan) -> RenderableType:
    """A short table of sites, the front, and a line on how good the choice is."""
    parts = [_sites(found), _front(found), Text(_closing(found))]
    return Group(*parts, *(Text(remark, "yellow") for remark in found.remarks))


def _sites(found: Plan) -> Table:
    table = Table(title=f"what each head of {found.model.name} gets", title_justify="left")
    for column in ("site", "heads", "predicted", "dense"):
        table.add_column(column, justify="right" if column in ("predicted", "dense") else "left", overflow="fold")
    for site in found.sites:
        mine, dense = (f"{of[-1] * 1e3:.3g} ms" if of else "" for of in (site.seconds, site.dense_seconds))
        table.add_row(site.address, _heads(found, site), mine, dense)
    return table


def _heads(found: Plan, site: SitePlan) -> str:
    counted = Counter(found.candidates[head.candidate].name for head in site.heads)
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counted.most_common())


def _front(found: Plan) -> Table:
    """The points; of those within the budget the one that validates best is the plan."""
    length = next((row.length for row in found.validation), None)
    table = Table(title=f"validated at {length} tokens: {found.unit} above dense attention", title_justify="left")
    for column in ("", "cost", f"at {length}", "loss", ""):
        table.add_column(column, justify="right" if column else "left")
    worst = max((point.validated or 0.0 for point in found.front), default=0.0)
    for number, point in enumerate(found.front):
        name = f"> {point.name}" if number == found.chosen else point.name
        there = found.cost_validated(point.name)
        shares = (f"{point.cost:.1%}", "" if there is None else f"{there:.1%}")
        table.add_row(name, *shares, f"{point.validated:.4g}", _line(point, worst))
    return table


def _line(point: Point, worst: float) -> str:
    """A bar as long as the loss."""
    size = round(WIDTH * max(0.0, point.validated or 0.0) / worst) if worst > 0 else 0
    return ("░" if point.uniform else "█") * size


def _closing(found: Plan) -> str:
    heads = ", ".join(f"{found.sites[site].address} head {head}" for site, head in found.retrieval[:8])
    lengths = ", ".join(map(str, found.lengths))
    said = [f"cost: the largest share of dense {found.of} at the profiled lengths {lengths}, on {found.machine}"]
    if found.timed:
        mine, dense = found.total(-1)
        said.append(f"predicted time: {mine * 1e3:.3g} ms of {dense * 1e3:.3g} at {found.lengths[-1]} tokens")
    if found.optimum:
        said.append(found.optimum)
    if heads:
        said.append(f"heads that information from far back goes through: {heads}")
    return "\n".join(said)
