"""The picture as a PNG, by matplotlib."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np

from sparsify.errors import InputError
from sparsify.pictures.scene import Panel, Row, Scene, percent

DPI = 160
MAX_PANELS, MAX_ROWS, MAX_LEGEND = 1024, 40, 20  # the rest is in the HTML page, which scrolls
INK, FAINT, PAPER, ALLOWED, FRAME = "#1b1f24", "#6b7280", "#ffffff", "#eef0f3", "#c9ced6"


def png(scene: Scene) -> bytes:
    """Small panels, a row of sites after the other, with the legend below. Raises InputError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "a PNG needs matplotlib: pip install 'sparsify[show]' (the HTML page doesn't need it)"
        ) from None
    rows, left_out = _fitting(scene)
    widest = max(len(row.panels) for row in rows)
    count = sum(len(row.panels) for row in rows)
    side = 3.0 if count <= 2 else 1.35 if count <= 64 else 0.9 if count <= 256 else 0.5
    columns = min(widest, 8 if side > 1 else 16 if side > 0.6 else 32)
    lines = [(row, start) for row in rows for start in range(0, len(row.panels), columns)]
    layout = _Layout(scene, side, columns, lines)
    figure = Figure(figsize=(layout.width, layout.height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    layout.head(figure)
    for line, (row, start) in enumerate(lines):
        if start == 0:
            layout.title(figure, line, row)
        for column, panel in enumerate(row.panels[start : start + columns]):
            layout.panel(figure, line, column, panel)
    layout.legend(figure, left_out)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _fitting(scene: Scene) -> tuple[list[Row], int]:
    rows, panels = [], 0
    for row in scene.rows[:MAX_ROWS]:
        panels += len(row.panels)
        if rows and panels > MAX_PANELS:
            break
        rows.append(row)
    return rows, len(scene.rows) - len(rows)


class _Layout:
    """Places things in inches from the top left."""

    def __init__(self, scene: Scene, side: float, columns: int, lines: list[tuple[Row, int]]) -> None:
        self.scene, self.side = scene, side
        self.tall = max(0.12, side * min(1.0, scene.queries / scene.length))
        self.gap, self.caption = side * 0.12, 0.2 if side > 0.6 else 0.06
        self.margin, self.top = 0.4, 1.0
        self.tops: list[float] = []
        at = self.top
        for _, start in lines:
            at += 0.42 if start == 0 else 0
            self.tops.append(at)
            at += self.tall + self.caption + self.gap
        self.below = at + 0.15
        self.width = max(2 * self.margin + columns * (side + self.gap) - self.gap, 7.0)
        self.height = self.below + 0.3 * min(len(scene.legend), MAX_LEGEND) + 0.55

    def text(self, figure: Any, x: float, y: float, text: str, **style: Any) -> Any:
        return figure.text(x / self.width, 1 - y / self.height, text, **{"va": "top", "color": INK} | style)

    def head(self, figure: Any) -> None:
        scene = self.scene
        self.text(figure, self.margin, 0.32, scene.title, size=15, weight="bold")
        queries = "" if scene.queries == scene.length else f", the last {scene.queries:,} queries"
        mask = "; percentages are of what the causal mask allows" if scene.causal else ""
        note = f"{scene.length:,} keys{queries}; queries run down, keys to the right{mask}"
        self.text(figure, self.margin, 0.68, note, size=8.5, color=FAINT)

    def title(self, figure: Any, line: int, row: Row) -> None:
        y = self.tops[line] - 0.27
        self.text(figure, self.margin, y, row.title, size=9.5, weight="bold", family="monospace")
        right, sites = self.width - self.margin, f"{row.sites} sites, " if row.sites > 1 else ""
        heads = f"{row.heads} head{'s' if row.heads != 1 else ''}"
        self.text(figure, right, y, f"{sites}{heads}, {percent(row.density)} kept", size=9, color=FAINT, ha="right")

    def panel(self, figure: Any, line: int, column: int, panel: Panel) -> None:
        x, y = self.margin + column * (self.side + self.gap), self.tops[line]
        wide, tall = round(self.side * DPI), round(self.tall * DPI)
        framed = np.broadcast_to(_rgb(FRAME), (tall + 2, wide + 2, 3)).copy()
        framed[1:-1, 1:-1] = self.image(panel, tall, wide)
        figure.figimage(framed, round(x * DPI) - 1, round((self.height - y) * DPI) - tall - 1)
        if self.side > 0.6:
            under = y + self.tall + 0.04
            word = f"head{'s' if panel.heads > 1 else ''} " if self.side > 1 else ""
            self.text(figure, x, under, word + panel.label, size=7.5, weight="bold")
            self.text(figure, x + self.side, under, percent(panel.density), size=7.5, color=FAINT, ha="right")

    def image(self, panel: Panel, rows: int, columns: int) -> np.ndarray:
        """RGB (rows, columns, 3): the entry's colour over what the model's mask allows over paper."""
        share = resized(self.scene.rasters[panel.raster].share, rows, columns)[..., None]
        allowed = resized(self.scene.allowed.share, rows, columns)[..., None]
        paper, faint, colour = (_rgb(c) for c in (PAPER, ALLOWED, self.scene.legend[panel.entry].colour))
        ground = paper + (faint - paper) * allowed
        return ground + (colour - ground) * share

    def legend(self, figure: Any, left_out: int) -> None:
        from matplotlib.patches import Rectangle

        y = self.below + 0.1
        room = int((self.width - 2 * self.margin - 2.2) / 0.075)
        for entry in self.scene.legend[:MAX_LEGEND]:
            corner = (self.margin / self.width, 1 - (y + 0.13) / self.height)
            size = (0.14 / self.width, 0.14 / self.height)
            figure.add_artist(Rectangle(corner, *size, transform=figure.transFigure, facecolor=entry.colour))
            text = f"{entry.name} = {entry.text}" if entry.name else entry.text
            text = text if len(text) <= room else text[: room - 3] + "..."
            self.text(figure, self.margin + 0.24, y - 0.01, text, size=8.5, family="monospace")
            heads = f"{entry.heads} head{'s' if entry.heads != 1 else ''}, {percent(entry.density)}"
            self.text(figure, self.width - self.margin, y - 0.01, heads, size=8.5, color=FAINT, ha="right")
            y += 0.3
        notes = [] if self.scene.exact else ["percentages are estimates from samples"]
        more = len(self.scene.legend) - MAX_LEGEND
        notes += [f"{more} more patterns are named in the HTML page only"] if more > 0 else []
        notes += [f"{left_out} more groups of sites are in the HTML page only"] if left_out else []
        self.text(figure, self.margin, y, "; ".join(notes), size=8, color=FAINT)


def resized(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The grid (any, any) at another size, each new cell the mean of the area that it covers."""
    tall = np.einsum("ir,rc->ic", _weights(grid.shape[0], rows), grid)  # einsum: BLAS threads cost more than they save
    return np.einsum("ic,jc->ij", tall, _weights(grid.shape[1], columns))


@functools.lru_cache(maxsize=16)
def _weights(old: int, new: int) -> np.ndarray:
    edges = np.arange(new + 1) * (old / new)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.minimum(high, np.arange(old) + 1) - np.maximum(low, np.arange(old))
    return np.maximum(overlap, 0).astype(np.float32) * (new / old)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=np.float32)
