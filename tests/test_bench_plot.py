"""The plot of `sparsify bench`: one mark a case, the ideal line, a PNG and a page that needs nothing but itself."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from sparsify.bench.plot import Mark, Plot, draw, html, paths, ticks
from sparsify.errors import InputError

MARKS = (
    Mark("window512 N=4096 D=64 float32 H=8/8", "float32", 0.125, 7.0),
    Mark("causal N=4096 D=64 float32 H=8/8", "float32", 1.0, 0.75),
    Mark("topk N=4096 D=64 bfloat16 H=8/8", "bfloat16", 0.03, 40.0),
)
PLOT = Plot(MARKS, "a <machine>, 2 threads")


def test_axes_hold_every_mark_and_the_ideal_of_the_sparsest() -> None:
    assert PLOT.x == (2**-6, 1.0) and PLOT.y == (0.5, 64.0)
    assert PLOT.dtypes == ("float32", "bfloat16")
    assert ticks(0.5, 4.0) == [0.5, 1.0, 2.0, 4.0] and ticks(2**-10, 1.0) == [4.0**power for power in range(-5, 1)]
    alone = Plot(MARKS[1:2], "")
    assert alone.x == (0.5, 1.0) and alone.y == (0.5, 1.0)


def test_the_page_has_a_mark_for_each_case_and_needs_nothing_else() -> None:
    page = html(PLOT)
    picture = ET.fromstring(re.search(r"<svg.*</svg>", page, re.DOTALL)[0])
    circles = picture.findall("circle")
    assert [circle.find("title").text for circle in circles] == [
        "window512 N=4096 D=64 float32 H=8/8: 7x at 12.5 %",
        "causal N=4096 D=64 float32 H=8/8: 0.75x at 100 %",
        "topk N=4096 D=64 bfloat16 H=8/8: 40x at 3 %",
    ]
    width, height = map(float, picture.get("viewBox").split()[2:])
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)
    assert len({circle.get("fill") for circle in circles}) == 2
    ideal = next(line for line in picture.findall("line") if line.get("class") == "ideal")
    one = next(line for line in picture.findall("line") if line.get("class") == "one")
    assert (ideal.get("x2"), ideal.get("y2")) == (
        circles[1].get("cx"),
        one.get("y1"),
    )  # where density and speed-up are 1
    assert "http" not in page and "a &lt;machine&gt;" in page


def test_files_are_drawn(tmp_path) -> None:
    for path in paths(tmp_path / "new", "epyc"):
        draw(PLOT, path)
    assert (tmp_path / "new" / "epyc.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "epyc.html").read_text().startswith("<!doctype html>")
    assert paths(Path("a/b.png"), "epyc") == [Path("a/b.png")]


def test_what_can_not_be_drawn(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^bench: --plot: no case has a speed to draw$"):
        Plot.of([], "")
    message = "bench: --plot: expected a name that ends in .png or .html, or a folder, found 'a.pdf'"
    with pytest.raises(InputError) as raised:
        paths(Path("a.pdf"), "epyc")
    assert str(raised.value) == message
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"bench: --plot: the folder '.*/file/x' can't be made: Not a directory"):
        draw(PLOT, tmp_path / "file" / "x" / "a.html")
    for ending in ("html", "png"):
        (tmp_path / f"b.{ending}").mkdir()
        with pytest.raises(InputError, match=rf"bench: --plot: '.*/b.{ending}' can't be written: Is a directory"):
            draw(PLOT, tmp_path / f"b.{ending}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.html", "b.png", "file"]
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r"a PNG needs matplotlib: pip install 'sparsify\[show\]'"):
        draw(PLOT, tmp_path / "a.png")
