"""The evidence as one PNG, by matplotlib: the front, the times, the map, the validation and the heads' attention."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from sparsify.errors import InputError
from sparsify.pictures.axes import ticks
from sparsify.pictures.png import DPI, FAINT, INK, PAPER
from sparsify.pictures.scene import percent as rounded
from sparsify.planner.evidence import COSTS, MEASURES, Evidence, Head, duration, percent, signed, tokens
from sparsify.planner.plan import SitePlan

PLAN, UNIFORM, LOST, LINE = "#2f6fed", "#e8590c", "#e03131", "#d5dae1"
WIDTH, MARGIN, HEAD = 12.0, 0.45, 1.4  # inches
COLUMNS, MOST_PANELS, MOST_ROWS, MOST_LEGEND, MOST_BARS, MOST_TEXTS = 8, 64, 24, 18, 40, 4


def png(evidence: Evidence) -> bytes:
    """The picture. Raises InputError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "a PNG needs matplotlib: pip install 'sparsify[show]' (the HTML page doesn't need it)"
        ) from None
    parts = [part for part in (_Front(evidence), _Map(evidence), _Table(evidence), _Panels(evidence)) if part.height]
    height = HEAD + sum(part.height for part in parts)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    sheet = _Sheet(figure, height)
    sheet.text(MARGIN, 0.3, f"Plan of {evidence.plan.model.name}", size=16, weight="bold")
    for number, line in enumerate(_lines(evidence)):
        sheet.text(MARGIN, 0.68 + 0.2 * number, line, size=9.5, color=FAINT)
    top = HEAD
    for part in parts:
        part.draw(sheet, top)
        top += part.height
    made = io.BytesIO()
    figure.savefig(made, format="png")
    return made.getvalue()


def _lines(evidence: Evidence) -> tuple[str, ...]:
    plan = evidence.plan
    facts = [f"{number} {what}" for number, what, _ in evidence.facts]
    lines = ";  ".join(facts), f"profiled at {tokens(plan.lengths)} tokens; cost is that of {plan.machine}"
    return (*lines, *plan.remarks)


class _Sheet:
    """A figure whose things are placed in inches from the top left."""

    def __init__(self, figure: Any, height: float) -> None:
        self.figure, self.height = figure, height

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **{"va": "top", "color": INK} | style)

    def axes(self, x: float, y: float, wide: float, tall: float) -> Any:
        box = x / WIDTH, 1 - (y + tall) / self.height, wide / WIDTH, tall / self.height
        axes = self.figure.add_axes(box)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        axes.tick_params(colors=FAINT, labelsize=8, length=0)
        return axes

    def square(self, x: float, y: float, colour: Any, size: float = 0.14) -> None:
        from matplotlib.patches import Rectangle

        corner = x / WIDTH, 1 - (y + size) / self.height
        shape = size / WIDTH, size / self.height
        self.figure.add_artist(Rectangle(corner, *shape, transform=self.figure.transFigure, facecolor=colour))


class _Front:
    """The front beside the predicted time of each site."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.height = 4.3 if evidence.marks or evidence.plan.timed else 0.0

    def draw(self, sheet: _Sheet, top: float) -> None:
        timed, marks = self.evidence.plan.timed, self.evidence.marks
        if marks:
            self.front(sheet, top, 6.1 if timed else 10.4)
        if timed:
            self.times(sheet, top, 8.6 if marks else 1.6)

    def front(self, sheet: _Sheet, top: float, wide: float) -> None:
        e = self.evidence
        sheet.text(MARGIN, top, "The front", size=11.5, weight="bold")
        note = f"more {e.plan.unit} than dense, {MEASURES[e.measure]}"
        sheet.text(MARGIN, top + 0.24, note, size=8, color=FAINT)
        axes = sheet.axes(MARGIN + 0.6, top + 0.55, wide, 3.05)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(e.x[0] * 0.97, e.x[1] * 1.04)
        axes.set_ylim(e.y[0] * 0.8, e.y[1] * 1.15)
        for planned, colour, label in ((True, PLAN, "planned by head"), (False, UNIFORM, "one pattern for all heads")):
            mine = [mark for mark in e.marks if mark.point.uniform != planned]
            line = mine if planned else e.envelope
            axes.plot(*self.points(line), "-" if planned else "--", color=colour, linewidth=1.6 if planned else 1.0)
            axes.scatter(*self.points(mine), s=34, color=colour, edgecolors="white", linewidths=0.7, zorder=3,
                         label=label)  # fmt: skip
        if e.chosen is not None:
            at = self.points([e.chosen])
            axes.scatter(*at, s=110, facecolors=PLAN, edgecolors=INK, linewidths=1.8, zorder=4)
            axes.annotate("this plan", (at[0][0], at[1][0]), (9, 6), textcoords="offset points", ha="left",
                          size=8.5, weight="bold", color=INK)  # fmt: skip
        axes.set_xticks(ticks(*e.x), [percent(at) for at in ticks(*e.x)])
        axes.set_yticks(ticks(*e.y, base=10.0), [f"{at:g}" for at in ticks(*e.y, base=10.0)])
        axes.minorticks_off()
        axes.grid(color=LINE, linewidth=0.5, alpha=0.7)
        what = f"share of dense {COSTS.get(e.plan.of, e.plan.of)} at the profiled lengths"
        axes.set_xlabel(what, size=8.5, color=FAINT)
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)

    def points(self, marks: Any) -> tuple[list[float], list[float]]:
        return [mark.point.cost for mark in marks], [max(mark.loss, self.evidence.y[0]) for mark in marks]

    def times(self, sheet: _Sheet, top: float, left: float) -> None:
        e, last = self.evidence, len(self.evidence.plan.lengths) - 1
        sheet.text(left - 1.15, top, "Predicted time of each site", size=11.5, weight="bold")
        ours, dense = e.plan.total(last)
        note = f"{e.plan.lengths[last]:,} tokens: {duration(ours)} in colour, dense {duration(dense)} behind"
        sheet.text(left - 1.15, top + 0.24, note, size=8, color=FAINT)
        sites = e.plan.sites[:MOST_BARS]
        axes = sheet.axes(left, top + 0.55, WIDTH - MARGIN - left, 3.05)
        rows = range(len(sites))
        axes.barh(rows, [1e3 * site.dense_seconds[last] for site in sites], height=0.8, color="#d9dde3")
        axes.barh(rows, [1e3 * site.seconds[last] for site in sites], height=0.45, color=PLAN)
        axes.invert_yaxis()
        step = max(1, len(sites) // 12)
        axes.set_yticks(rows[::step], [_short(site) for site in sites[::step]], size=7.5)
        axes.set_xlabel("milliseconds", size=8.5, color=FAINT)


def _short(site: SitePlan) -> str:
    if site.layer is not None:
        return f"layer {site.layer}"
    return site.address if len(site.address) <= 17 else f"...{site.address[-14:]}"


class _Map:
    """Layers by heads, and the legend."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.side = min(0.32, max(0.11, 4.2 / max(1, len(evidence.heads))))
        self.lines = min(len(evidence.entries), MOST_LEGEND)
        self.height = 0.95 + max(self.side * len(evidence.heads) + 0.2, 0.27 * self.lines + 0.35)

    def draw(self, sheet: _Sheet, top: float) -> None:
        e = self.evidence
        sheet.text(MARGIN, top, "What each head got", size=11.5, weight="bold")
        note = "rows are layers, columns heads; the stronger the colour, the more of its dense cost"
        note += "; numbers are retrieval heads, the most important first" if e.plan.retrieval else ""
        sheet.text(MARGIN, top + 0.24, note, size=8, color=FAINT)
        wide = max(map(len, e.heads))
        grid = np.ones((len(e.heads), wide, 3))
        for row in e.heads:
            for head in row:
                grid[head.site, head.number] = _tint(head)
        across = min(6.6, wide * max(self.side, 0.2))
        axes = sheet.axes(MARGIN + 0.35, top + 0.6, across, self.side * len(e.heads))
        axes.imshow(grid, aspect="auto", interpolation="nearest")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xticks(np.arange(wide + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(e.heads) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=1.2 if wide <= 16 else 0.6)
        axes.tick_params(which="minor", length=0)
        steps = max(1, wide // 8), max(1, len(e.heads) // 8)
        axes.set_xticks(range(0, wide, steps[0]))
        axes.set_yticks(range(0, len(e.heads), steps[1]))
        self.ranks(axes, across / wide)
        self.legend(sheet, top + 0.6, MARGIN + 0.35 + across + 0.45)

    def ranks(self, axes: Any, side: float) -> None:
        for row in self.evidence.heads:
            for head in row:
                if 0 < head.rank < (100 if side > 0.18 else 0):
                    axes.text(head.number, head.site, head.rank, ha="center", va="center", size=6.5, color="white",
                              weight="bold")  # fmt: skip

    def legend(self, sheet: _Sheet, top: float, left: float) -> None:
        for number, entry in enumerate(self.evidence.entries[:MOST_LEGEND]):
            y = top + 0.27 * number
            sheet.square(left, y, _mixed(entry.colour, entry.strength))
            sheet.text(left + 0.24, y - 0.01, entry.candidate.name, size=8.5, family="monospace")
            heads = f"{entry.heads} head{'s' if entry.heads != 1 else ''}, {percent(entry.weight)} of dense"
            sheet.text(min(WIDTH - MARGIN, left + 4.4), y - 0.01, heads, size=8.5, color=FAINT, ha="right")
        more = len(self.evidence.entries) - MOST_LEGEND
        if more > 0:
            sheet.text(left, top + 0.27 * MOST_LEGEND, f"{more} more in the HTML page", size=8, color=FAINT)


class _Table:
    """The validation."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.rows = evidence.validated[:MOST_ROWS]
        self.height = 0.75 + 0.24 * (1 + len(self.rows)) if self.rows else 0.0

    def draw(self, sheet: _Sheet, top: float) -> None:
        plan, texts = self.evidence.plan, self.evidence.texts[:MOST_TEXTS]
        sheet.text(MARGIN, top, "Validation", size=11.5, weight="bold")
        note = f"the loss in {plan.unit}, and how much more it is than dense attention's"
        sheet.text(MARGIN + 1.05, top + 0.03, note, size=8, color=FAINT)
        mine = None if plan.chosen is None else plan.front[plan.chosen].name
        titles = [f"{data}, {length:,} tokens" for data, length in texts]
        lines = [("point", "cost", *[text for title in titles for text in (title, "")])]
        for name, cost, row in self.rows:
            losses = [(f"{one.loss:.4g}", signed(one.increase)) if one else ("", "") for one in row[:MOST_TEXTS]]
            lines.append((name, percent(cost), *[text for pair in losses for text in pair]))
        step = min(1.2, 7.3 / max(1, 2 * len(texts)))
        places = [0.0, 3.4, *[3.8 + step * (number + 1) for number in range(2 * len(texts))]]
        for number, line in enumerate(lines):
            weight = "bold" if line[0] == mine else "normal"
            for column, (x, text) in enumerate(zip(places, line, strict=True)):
                style = {"ha": "right" if column else "left", "color": INK if number else FAINT, "weight": weight}
                sheet.text(MARGIN + x, top + 0.34 + 0.24 * number, text, size=8.5, **style)


class _Panels:
    """The attention of heads: of all of them, or of retrieval heads first and then of those that lose most of it."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.heads: list[Head] = []
        if evidence.pictures is not None:
            found = [head for row in evidence.heads for head in row]
            if len(found) > MOST_PANELS:
                found = sorted(found, key=lambda head: (head.rank == 0, head.rank, head.recall))[:MOST_PANELS]
            self.heads = found
        self.side = (WIDTH - 2 * MARGIN) / COLUMNS - 0.16
        lines = -(-len(self.heads) // COLUMNS)
        self.height = 0.75 + lines * (self.side + 0.5) if self.heads else 0.0

    def draw(self, sheet: _Sheet, top: float) -> None:
        sheet.text(MARGIN, top, "Attention against its masks", size=11.5, weight="bold")
        total = sum(map(len, self.evidence.heads))
        which = "" if len(self.heads) == total else f"; {len(self.heads)} of {total:,} heads, retrieval heads first"
        note = f"tinted is kept, ink is attention that is kept, red is attention that is dropped{which}"
        sheet.text(MARGIN, top + 0.24, note, size=8, color=FAINT)
        for number, head in enumerate(self.heads):
            x = MARGIN + number % COLUMNS * (self.side + 0.16)
            y = top + 0.55 + number // COLUMNS * (self.side + 0.5)
            axes = sheet.axes(x, y, self.side, self.side)
            axes.imshow(self.image(head), aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[["top", "right"]].set_visible(True)
            axes.spines[:].set_color(LINE)
            site = self.evidence.plan.sites[head.site]
            where = f"{head.site if site.layer is None else site.layer}.{head.number}"
            sheet.text(x, y + self.side + 0.04, where, size=7.5, weight="bold")
            sheet.text(x, y + self.side + 0.18, head.entry.candidate.name[:24], size=7, color=FAINT)
            kept = rounded(head.recall or 0.0)
            sheet.text(x + self.side, y + self.side + 0.04, kept, size=7.5, color=FAINT, ha="right")

    def image(self, head: Head) -> np.ndarray:
        """RGB (rows, columns, 3)."""
        assert self.evidence.pictures is not None
        picture = self.evidence.pictures.sites[head.site]
        attention = picture.attention[head.number][..., None] / 255.0
        kept = picture.kept[head.number][..., None] / 255.0
        dropped = picture.dropped[head.number][..., None] / 255.0
        ground = 1 - 0.34 * kept * (1 - _tint(head))
        colour = _rgb(INK) + (_rgb(LOST) - _rgb(INK)) * dropped
        return ground + (colour - ground) * attention


def _tint(head: Head) -> np.ndarray:
    return _mixed(head.entry.colour, head.entry.strength)


def _mixed(colour: str, strength: float) -> np.ndarray:
    """The colour over paper."""
    return 1 - strength * (1 - _rgb(colour))


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
