"""The plot of a benchmark: speed-up over dense SDPA against density, with the ideal line, as PNG or HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.bench.measure import Result
from sparsify.errors import InputError
from sparsify.files import write_whole
from sparsify.pictures.axes import along, powers, ticks

ENDINGS = (".png", ".html")
COLOURS = {"float32": "#2563eb", "bfloat16": "#d97706", "float16": "#059669"}
INK, FAINT, LINE = "#1b1f24", "#6b7280", "#d5dae1"
TITLE = "Speed-up over dense attention"
NOTE = "dense is PyTorch's SDPA, causal where the case is; density is the share of its pairs that are kept"


@dataclass(frozen=True)
class Mark:
    """One case: the share of dense's pairs that it keeps, and how many times as fast it is."""

    case: str
    dtype: str
    density: float
    speedup: float


@dataclass(frozen=True)
class Plot:
    """The marks and the machine they were measured on; both axes are logarithmic, from a power of two to another."""

    marks: tuple[Mark, ...]
    machine: str

    @classmethod
    def of(cls, results: Sequence[Result], machine: str) -> Plot:
        """Raises InputError where no case has a speed beside dense SDPA's."""
        ratios = [(result, result.ratio("dense")) for result in results]
        marks = [Mark(r.case.name, r.case.dtype, r.share, ratio) for r, ratio in ratios if ratio is not None]
        if not marks:
            raise InputError("bench: --plot: no case has a speed to draw")
        return cls(tuple(marks), machine)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(mark.dtype for mark in self.marks))

    @property
    def x(self) -> tuple[float, float]:
        """The least and the greatest density shown."""
        return powers([mark.density for mark in self.marks] + [1.0])

    @property
    def y(self) -> tuple[float, float]:
        """The least and the greatest speed-up shown; the ideal of the sparsest case is among them."""
        return powers([mark.speedup for mark in self.marks] + [1.0, 1 / min(mark.density for mark in self.marks)])


def percent(density: float) -> str:
    """`12.5 %`, `50 %`."""
    return f"{100 * density:.3g} %"


def times(speedup: float) -> str:
    """`0.5x`, `16x`."""
    return f"{speedup:.3g}x"


def paths(path: Path, stem: str) -> list[Path]:
    """The files to draw: the one that is named, or both kinds in a folder. Raises InputError for another ending."""
    if path.suffix in ENDINGS:
        return [path]
    if path.suffix and not path.is_dir():
        raise InputError(f"bench: --plot: expected a name that ends in .png or .html, or a folder, found '{path}'")
    return [path / f"{stem}{ending}" for ending in ENDINGS]


def draw(plot: Plot, path: Path) -> None:
    """Draws a .png, which needs matplotlib, or an .html file that needs nothing but itself, whole or not at all.

    Raises InputError.
    """
    write_whole(path, _png(plot) if path.suffix == ".png" else html(plot), "bench: --plot")


def _png(plot: Plot) -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "a PNG needs matplotlib: pip install 'sparsify[show]' (the HTML page doesn't need it)"
        ) from None
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(plot.x[0], plot.x[1] * 1.05)
    axes.set_ylim(*plot.y)
    axes.plot(plot.x, [1 / x for x in plot.x], "--", color=FAINT, linewidth=1, label="ideal: 1 / density", zorder=1)
    axes.axhline(1, color=LINE, linewidth=1, zorder=0)
    for dtype in plot.dtypes:
        mine = [mark for mark in plot.marks if mark.dtype == dtype]
        axes.scatter(
            [m.density for m in mine], [m.speedup for m in mine], s=30, label=dtype, color=COLOURS[dtype], alpha=0.75,
            edgecolors="white", linewidths=0.6, zorder=2,
        )  # fmt: skip
    axes.set_xticks(ticks(*plot.x), map(percent, ticks(*plot.x)))
    axes.set_yticks(ticks(*plot.y), map(times, ticks(*plot.y)))
    axes.minorticks_off()
    axes.grid(color=LINE, linewidth=0.5, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("density", color=INK)
    axes.set_ylabel("times as fast as dense SDPA", color=INK)
    figure.suptitle(TITLE, x=0.02, ha="left", weight="bold", color=INK)
    axes.set_title(f"{plot.machine}\n{NOTE}", loc="left", size=8, color=FAINT)
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 800, 520, 62, 14, 16, 48  # of the page's picture, and its margins


def html(plot: Plot) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def x(density: float) -> float:
        return LEFT + along(density, plot.x) * (WIDTH - LEFT - RIGHT)

    def y(speedup: float) -> float:
        return HEIGHT - BOTTOM - along(speedup, plot.y) * (HEIGHT - TOP - BOTTOM)

    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, undefined=StrictUndefined, autoescape=True).get_template("plot.html")
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM}
    helpers: dict[str, Any] = {"x": x, "y": y, "ticks": ticks, "percent": percent, "times": times}
    return template.render(plot=plot, title=TITLE, note=NOTE, colours=COLOURS, **frame, **helpers)
