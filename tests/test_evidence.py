"""The evidence of a plan: what the page and the PNG show of it, and a page in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from plan_cases import CANDIDATES, SHARES, made_up_pictures, made_up_plan
from rich.console import Console

from sparsify.errors import InputError
from sparsify.pictures.axes import along, powers, ticks
from sparsify.planner.evidence import Evidence, duration, kind_of, percent, tokens, write_evidence
from sparsify.planner.evidence_page import page
from sparsify.planner.plan import Candidate
from sparsify.planner.terminal import summary

PLAN = made_up_plan()
PICTURES = made_up_pictures(PLAN)
BARE = replace(PLAN, front=(), chosen=None, validation=(), retrieval=(), bound=None, gap=None, seconds=0.0, sites=tuple(
    replace(site, seconds=(), dense_seconds=()) for site in PLAN.sites
))  # fmt: skip
OTHER = made_up_pictures(made_up_plan(2))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Elements(HTMLParser):
    """The elements of a page: tag, attributes, and the text directly in it; every one must be closed."""

    VOID = {"meta", "input", "br"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        if tag not in self.VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def of(self, tag: str, name: str = "") -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements of a tag (and a class)."""
        return [
            (attributes, "".join(text).strip())
            for found, attributes, text in self.found
            if found == tag and (not name or name in (attributes.get("class") or "").split())
        ]


@pytest.fixture(scope="module")
def html() -> str:
    return page(Evidence(PLAN, PICTURES)).decode()


@pytest.fixture(scope="module")
def elements(html) -> Elements:
    return Elements(html)


def test_the_page_has_every_section_and_needs_nothing_else(html, elements):
    assert [a["id"] for a, _ in elements.of("section")] == ["front", "map", "pictures", "time", "validation", "how"]
    assert elements.of("h1")[0][1] == "Plan of made/up-model <8B>"
    assert "http" not in html and not re.search(r'(src|href)="', html)
    assert [text for _, text in elements.of("strong")][:4] == ["25 %", "+0.017", "7.76x", "2.94x"]


def test_the_front_has_a_mark_for_each_point_at_its_place(elements):
    evidence = Evidence(PLAN)
    circles = [a for a, _ in elements.of("circle")]
    titles = [text for _, text in elements.of("title")][1:]
    assert len(circles) == len(PLAN.front) and "sinks 4, window 256: +0.132 bits per byte at 24 %" in titles
    assert sum("chosen" in (a["class"] or "") for a in circles) == 1
    assert sum("uniform" in (a["class"] or "") for a in circles) == 4
    at = {text.partition(":")[0]: (float(a["cx"]), float(a["cy"])) for a, text in zip(circles, titles, strict=True)}
    by_cost = sorted(evidence.marks, key=lambda mark: mark.point.cost)
    assert [at[mark.point.name][0] for mark in by_cost] == sorted(x for x, _ in at.values())
    by_loss = sorted((mark for mark in by_cost if mark.loss > evidence.y[0]), key=lambda mark: -mark.loss)
    assert [at[mark.point.name][1] for mark in by_loss] == sorted(at[mark.point.name][1] for mark in by_loss)
    assert at["budget 0.5"][1] == max(y for _, y in at.values())  # it loses nothing, and lies on the axis
    assert any(text == "≤ 0.01" for _, text in elements.of("text"))


def test_the_map_has_a_cell_for_each_head_with_what_it_got(elements):
    heads = [head for site in PLAN.sites for head in site.heads]
    cells = elements.of("button", "cell")
    assert [a["data-n"] for a, _ in cells] == [str(n) for n in range(32)]
    for (attributes, text), head, number in zip(cells, heads, range(32), strict=True):
        name, where = PLAN.candidates[head.candidate].name, divmod(number, 8)
        assert attributes["aria-label"] == f"model.layers.{where[0]}.self_attn, head {where[1]}: {name}"
        rank = PLAN.retrieval.index(where) + 1 if where in PLAN.retrieval else ""
        assert text == str(rank) and ("ranked" in attributes["class"]) == bool(rank)
    assert len(elements.of("td", "gap")) == 4 * 3  # eight heads share four key heads
    used = {head.candidate for head in heads}
    assert {a["class"] for a, _ in elements.of("li")[4:]} == {f"c{number}" for number in used}


def test_pictures_are_there_once_with_what_is_kept(html, elements):
    panels = elements.of("button", "pic")
    assert len(panels) == 32
    for number, (attributes, _) in enumerate(panels):
        recall = PICTURES.sites[number // 8].recall[number % 8]
        assert attributes["aria-label"].endswith(f"head {number % 8}: {percent(float(recall))} of its attention kept")
    masks = {name for a, _ in panels for name in a["class"].split() if re.fullmatch(r"k\d+", name)}
    distinct = {mask.tobytes() for site in PICTURES.sites for mask in site.kept}
    assert len(masks) == len(distinct) == len(re.findall(r"^\.k\d+ ", html, re.MULTILINE)) < 32


def test_times_and_validation_are_those_of_the_plan(elements):
    rows = [a["title"] for a, _ in elements.of("div", "time")]
    expected = [
        f"{duration(site.seconds[i])} instead of {duration(site.dense_seconds[i])}"
        for i in (0, 1)
        for site in PLAN.sites
    ]
    assert rows == expected and len(PLAN.validation) == 14
    assert [("hidden" in a) for a, _ in elements.of("div", "at")] == [True, False]
    cells = [text for _, text in elements.of("td")]
    for row in PLAN.validation:
        assert f"{row.loss:.4g}" in cells and f"{row.increase:+.3g}" in cells


def test_a_bound_that_no_share_of_the_front_kept_is_told():
    said = replace(PLAN, missed="no share of the front loses at most +0.01 bits per byte")
    assert Elements(page(Evidence(said)).decode()).of("p", "remark")[0][1] == said.missed
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(said))
    assert said.missed in console.export_text()


def test_the_solvers_bound_is_told_of_the_point_that_it_is_of():
    name = PLAN.front[PLAN.chosen].name
    own = replace(PLAN, solved=name, gap=0.0)
    assert own.optimum == f"by the profiled losses no choice at this cost has less than 0.01; {name} is that best"
    other = replace(PLAN, solved="plan at 0.75", gap=0.02)
    assert other.optimum.endswith(f"plan at 0.75 is within 2 % of that, and validated worse than {name}")
    assert other.optimum in page(Evidence(other)).decode()
    rows = [row for row in PLAN.validation if row.name == name]
    assert PLAN.cost_validated(name) == rows[0].cost and PLAN.cost_validated("none") is None


def test_a_plan_that_is_slower_than_dense_says_so():
    assert PLAN.slower == "" and Elements(page(Evidence(PLAN)).decode()).of("p", "remark") == []
    sites = [replace(site, seconds=(site.seconds[0], 2 * site.dense_seconds[1])) for site in PLAN.sites]
    slow = replace(PLAN, of="pairs", sites=tuple(sites))
    assert slow.slower == (
        "predicted to be slower than dense attention: 2 times its time at 2048 tokens; "
        "the budget was one of pairs, so plan by time (--of time) where speed is wanted"
    )
    assert Elements(page(Evidence(slow)).decode()).of("p", "remark")[0][1] == slow.slower
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(slow))
    shown = console.export_text()
    assert slow.slower in shown and "predicted time: 180 ms of 90 at 2048 tokens" in shown


def test_the_script_is_given_each_head_and_its_alternatives(html):
    facts = json.loads(re.search(r"^const facts = (.*);$", html, re.MULTILINE)[1])
    assert facts["candidates"][1] == ["window16", "{sinks: 4, window: 16}"] and len(facts["heads"]) == 32
    for found, head in zip(facts["heads"], (head for site in PLAN.sites for head in site.heads), strict=True):
        assert found["candidate"] == head.candidate
        np.testing.assert_allclose(found["shares"], SHARES, rtol=1e-3)
        np.testing.assert_allclose(found["losses"], head.losses, rtol=1e-3)


def test_no_name_can_leave_its_place():
    evil = "</script><script>alert(1)</script>"
    candidates = (*PLAN.candidates[:1], Candidate(evil, {"window": 16}), *PLAN.candidates[2:])
    plan = replace(PLAN, candidates=candidates, model=replace(PLAN.model, name=evil), machine=evil, unit=evil)
    text = page(Evidence(plan, PICTURES)).decode()
    assert len(Elements(text).of("script")) == 1 and "<script>alert" not in text


def test_what_a_plan_does_not_know_is_not_shown():
    found = Elements(page(Evidence(BARE)).decode())
    assert [a["id"] for a, _ in found.of("section")] == ["map", "how"]
    assert found.of("ul", "facts") == [] and found.of("button", "pic") == [] and len(found.of("button", "cell")) == 32


def test_points_are_compared_by_the_most_telling_loss_that_there_is():
    assert Evidence(PLAN).measure == "validated"
    front = tuple(replace(point, validated=None) for point in PLAN.front)
    assert Evidence(replace(PLAN, front=front)).measure == "measured"
    front = tuple(replace(point, validated=None if point.uniform else point.validated) for point in PLAN.front)
    assert Evidence(replace(PLAN, front=front)).measure == "measured"
    front = tuple(replace(point, validated=None, measured=None) for point in PLAN.front if not point.uniform)
    assert Evidence(replace(PLAN, front=front)).measure == "predicted"


def test_the_rival_is_the_best_uniform_pattern_that_costs_no_more():
    evidence = Evidence(PLAN)
    assert evidence.chosen.point.name == "budget 0.25" and evidence.rival.point.name == "sinks 4, window 256"
    names = [mark.point.name for mark in evidence.envelope]
    assert names == ["sinks 4, window 128", "sinks 4, window 256", "sinks 4, window 512"]  # 400 loses more than 256
    assert Evidence(replace(PLAN, chosen=0)).rival is None
    assert Evidence(replace(PLAN, chosen=None)).chosen is None


def test_entries_say_what_heads_spend():
    entries = Evidence(PLAN).entries
    assert sum(entry.heads for entry in entries) == 32 and entries[0].candidate.name == "dense"
    assert [entry.weight for entry in entries] == sorted((entry.weight for entry in entries), reverse=True)
    for entry in entries:
        assert entry.weight == pytest.approx(SHARES[entry.number], rel=1e-3)
    strengths = {entry.candidate.name: entry.strength for entry in entries}
    assert strengths["dense"] == 1 > strengths["window512"] > strengths["window16"] > 0.25
    assert kind_of(CANDIDATES[1]) == kind_of(CANDIDATES[5]) == "window" != kind_of(CANDIDATES[10])
    assert kind_of(Candidate("elastic+1024+0.5N", {"moa_head": {"alpha": 1024}})) == "elastic"
    assert kind_of(Candidate("7", "causal")) == "7"


def test_axes_end_at_powers():
    assert powers([0.3, 0.9]) == (0.25, 1.0) and powers([1.0]) == (0.5, 1.0)
    assert powers([0.003, 0.2], 10.0) == pytest.approx((1e-3, 1.0))
    assert ticks(0.5, 4.0) == [0.5, 1.0, 2.0, 4.0] and ticks(1e-3, 1.0, 10.0) == pytest.approx([1e-3, 1e-2, 0.1, 1])
    assert along(0.1, (1e-3, 10.0)) == pytest.approx(0.5)


def test_words():
    assert [duration(s) for s in (3.21, 0.0123, 4.56e-5, 7e-9)] == ["3.21 s", "12.3 ms", "45.6 µs", "7 ns"]
    assert tokens((512,)) == "512" and tokens((1024, 2048, 4096)) == "1,024, 2,048 and 4,096"
    assert percent(0.123456) == "12.3 %" and percent(None) == ""


@pytest.mark.parametrize("plan", [PLAN, BARE, made_up_plan(20, 24, 24)], ids=["plan", "bare", "large"])
def test_the_png_is_one_picture(plan, tmp_path):
    path = write_evidence(plan, tmp_path / "plan.png", None if plan is BARE else made_up_pictures(plan, 16))
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width == 1920 and 300 < height < 6000


def test_the_png_draws_heads_in_their_colours_and_dropped_attention_red():
    from sparsify.planner.evidence_png import _Panels

    panels = _Panels(Evidence(PLAN, PICTURES))
    assert len(panels.heads) == 32
    for head in panels.heads:
        picture, image = PICTURES.sites[head.site], panels.image(head)
        kept, attention = picture.kept[head.number] > 0, picture.attention[head.number]
        assert image.shape == (*kept.shape, 3) and image.min() >= 0 and image.max() <= 1
        assert np.all(image[~kept & (attention == 0)] == 1)  # paper
        dropped = image[~kept & (attention > 60)]
        assert np.all(dropped[:, 0] > dropped[:, 2])
    large = made_up_plan(20, 24, 24)
    found = _Panels(Evidence(large, made_up_pictures(large, 8))).heads
    ranked = [head.rank for head in found if head.rank]
    assert len(found) == 64 and ranked == list(range(1, len(ranked) + 1)) == ranked[: len(large.retrieval)]


@pytest.mark.parametrize(
    ("name", "pictures", "what"),
    [
        ("plan.pdf", None, r"plan: evidence: expected a name that ends in .html or .png, found 'plan.pdf'"),
        ("plan.html", OTHER, "plan: evidence: the pictures are not those of this plan's heads"),
    ],
)  # fmt: skip
def test_what_can_not_be_drawn_is_one_sentence_and_no_file(name, pictures, what, tmp_path):
    with pytest.raises(InputError, match=f"^{what}$"):
        write_evidence(PLAN, tmp_path / name, pictures)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_page_is_still_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match="a PNG needs matplotlib"):
        write_evidence(PLAN, tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []
    assert write_evidence(PLAN, tmp_path / "plan.html").read_text().startswith("<!doctype html>")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_runs_in_a_browser(tmp_path):
    write_evidence(PLAN, tmp_path / "plan.html", PICTURES)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    logging = ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, *logging, f"file://{tmp_path / 'plan.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr  # where errors of the script are told
    found = Elements(done.stdout)
    why = re.search(r'<div id="why".*?</div>', done.stdout, re.DOTALL)[0]
    assert "model.layers.3.self_attn, head 1" in why and "retrieval head no. 1" in why and "loss alone" in why
    assert sum(a["aria-pressed"] == "true" for a, _ in found.of("button", "cell")) == 1
