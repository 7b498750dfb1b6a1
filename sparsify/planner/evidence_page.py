"""The evidence as one HTML page that needs nothing but itself: its pictures are small embedded images."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.pictures.axes import along, ticks
from sparsify.pictures.page import alpha_png
from sparsify.planner import evidence as words
from sparsify.planner.evidence import Evidence

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 800, 420, 74, 14, 20, 50  # of the front's picture, and its margins
DIGITS = 4


def page(evidence: Evidence) -> bytes:
    """The page, UTF-8."""
    pools = _Images(), _Images(), _Images()
    panels = [_panels(evidence, site, pools) for site in range(len(evidence.plan.sites))]
    attention, kept, dropped = (pool.urls for pool in pools)
    text = _template().render(
        e=evidence, plan=evidence.plan, panels=panels, attention=attention, kept=kept, dropped=dropped,
        x=_x(evidence), y=_y(evidence),
        x_ticks=ticks(*evidence.x), y_ticks=ticks(*evidence.y, base=10.0), facts=_script(_facts(evidence)),
        measures=words.MEASURES, percent=words.percent, signed=words.signed, duration=words.duration,
        tokens=words.tokens, form_text=words.form_text, bars=_bars(evidence), widest=_widest(evidence),
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM},
    )  # fmt: skip
    return text.encode()


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(
        loader=folder, undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    return made.get_template("evidence.html")


class _Images:
    """Embedded images, each once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.known: dict[tuple[tuple[int, ...], bytes], int] = {}

    def number(self, grid: np.ndarray) -> int:
        """The number of a uint8 grid's image."""
        key = grid.shape, grid.tobytes()
        if key not in self.known:
            self.known[key] = len(self.urls)
            self.urls.append(alpha_png(grid.astype(np.float32) / 255))
        return self.known[key]


def _panels(evidence: Evidence, site: int, pools: tuple[_Images, ...]) -> list[tuple[int, ...]]:
    """The images of each head: of its attention, of what is kept, of what is dropped; none without pictures."""
    if evidence.pictures is None:
        return []
    picture = evidence.pictures.sites[site]
    grids = zip(picture.attention, picture.kept, picture.dropped, strict=True)
    return [tuple(pool.number(grid) for pool, grid in zip(pools, head, strict=True)) for head in grids]


def _x(evidence: Evidence) -> Any:
    return lambda cost: round(LEFT + along(cost, evidence.x) * (WIDTH - LEFT - RIGHT), 1)


def _y(evidence: Evidence) -> Any:
    def y(loss: float) -> float:
        shown = max(loss, evidence.y[0])
        return round(HEIGHT - BOTTOM - along(shown, evidence.y) * (HEIGHT - TOP - BOTTOM), 1)

    return y


def _bars(evidence: Evidence) -> list[list[tuple[float, float]]]:
    """For each length and site the seconds of the plan and of dense attention."""
    if not evidence.plan.timed:
        return []
    sites = evidence.plan.sites
    return [[(s.seconds[i], s.dense_seconds[i]) for s in sites] for i in range(len(evidence.plan.lengths))]


def _widest(evidence: Evidence) -> list[float]:
    """For each length the longest of its bars, in seconds."""
    return [max(max(pair) for pair in bars) or 1.0 for bars in _bars(evidence)]


def _facts(evidence: Evidence) -> dict[str, Any]:
    """What the page's script reads: of each head its alternatives, as [share of its dense cost, loss] by candidate."""
    plan = evidence.plan
    heads = []
    for site in evidence.heads:
        for head in site:
            shares = [_short(evidence.share(head.plan, i)) for i in range(len(head.plan.costs))]
            losses = [_short(loss) for loss in head.plan.losses]
            heads.append({"site": head.site, "head": head.number, "candidate": head.plan.candidate, "shares": shares,
                          "losses": losses, "score": _short(head.plan.score), "rank": head.rank,
                          "recall": _short(head.recall)})  # fmt: skip
    return {
        "candidates": [[one.name, words.form_text(one.form)] for one in plan.candidates],
        "sites": [site.address + (f", use {site.use}" if site.use else "") for site in plan.sites],
        "heads": heads,
        "unit": plan.unit,
    }


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _script(value: Any) -> Any:
    """JSON that may stand in a script: no text of it can end the element."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return Markup(text)
