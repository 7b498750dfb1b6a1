"""The tuner's search, on made-up kernels: who wins, who costs only itself, and what a run takes from an earlier one."""

from __future__ import annotations

import itertools
import json
import signal
from multiprocessing import Pipe

import pytest
from tuner_runners import ASKED, DEFAULT, GROUPS, Here, Runner

from sparsify.tuner.children import Child, Failed, Lost, _serve
from sparsify.tuner.judge import hopeless, spread, wins
from sparsify.tuner.search import Limits, Search
from sparsify.tuner.trials import Journal

KEY = ("machine", "software", "cpp", "kernel")
LIMITS = Limits(seconds=0.1, rounds=5, build=3.0, run=3.0)


@pytest.fixture
def search(tmp_path):
    """Makes a search of a kernel; (the last trial, all of them, how many races there were)."""
    asked = tmp_path / ASKED

    def run(groups=GROUPS, first=(), children=None, deadline=1e9, clock=lambda: 0.0):
        asked.write_text("")
        children, journal = children or [Here()], Journal(tmp_path / "tuning.jsonl")
        found = Search(KEY, DEFAULT, groups, first, children, journal, deadline, limits=LIMITS, clock=clock)
        last = found.run(tmp_path / "job.pt")
        return last, found.trials, len(asked.read_text().splitlines())

    return run


def test_the_best_of_each_group_goes_into_the_next(search):
    last, trials, _ = search()
    assert last.values == {"tile": 8, "stages": 2} and last.won and last.last
    assert last.ratio == pytest.approx(0.8 * 0.95, rel=0.01) and last.low < last.ratio < last.high
    assert [trial.step for trial in trials] == [*itertools.chain(*GROUPS), {}]
    assert [trial.won for trial in trials] == [True, True, False, True, False, True]


def test_what_was_best_elsewhere_is_tried_first_and_whole(search):
    last, trials, _ = search(first=[{"tile": 8, "stages": 2}])
    assert trials[0].step == {"tile": 8, "stages": 2} and trials[0].won
    assert last.values == {"tile": 8, "stages": 2}


def test_the_default_stays_where_nothing_is_faster_beyond_the_spread(search):
    last, trials, _ = search(groups=[[{"tile": 32}], [{"stages": 3}]])
    assert last.values == {} and last.ratio == 1.0 and not last.won and last.seconds == last.default
    assert not any(trial.won for trial in trials)


def test_a_candidate_that_goes_wrong_costs_only_itself(search):
    children = [Child(Runner) for _ in range(2)]
    bad = [{"tile": tile} for tile in (100, 101, 102, 103, 104)]
    try:
        last, trials, _ = search(groups=[[*bad, {"tile": 8}]], children=children)
    finally:
        for child in children:
            child.end()
    why = {trial.step["tile"]: (trial.state, trial.why) for trial in trials if trial.state != "raced"}
    assert why == {
        100: ("lost", "crashed (SIGSEGV)"),
        101: ("lost", "took more than 3 s"),
        102: ("wrong", "the error is 1.0e+00, the bound 1.0e-06"),
        103: ("failed", "kernel x: the compiler failed"),
        104: ("lost", "ended with code 3"),
    }
    assert last.values == {"tile": 8}


def test_a_second_run_measures_nothing_again(search):
    first, trials, _ = search()
    again, same, races = search()
    assert (again, same, races) == (first, trials, 0)


def test_a_run_that_was_cut_short_goes_on(search):
    ticks = itertools.count()
    first, trials, _ = search(clock=lambda: next(ticks), deadline=1.5)
    assert [trial.step for trial in trials] == [{"tile": 16}, {"tile": 8}, {}] and first.values == {"tile": 8}
    last, every, races = search()
    assert [trial.step for trial in every[3:]] == [{"tile": 32}, {"stages": 2}, {"stages": 3}, {}]
    assert last.values == {"tile": 8, "stages": 2} and races == 1 + 2 + 1 + 1


def test_a_journal_line_that_was_cut_short_is_no_trial(search, tmp_path):
    search(groups=[[{"tile": 16}]])
    path = tmp_path / "tuning.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[0][:50])
    _, trials, races = search(groups=[[{"tile": 16}, {"tile": 8}]])
    assert [trial.step for trial in trials] == [{"tile": 16}, {}, {"tile": 8}, {}] and races == 2 + 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")] == [
        {"tile": 16}, {}, {"tile": 8}, {},
    ]  # fmt: skip


def test_forgetting_one_kernel_leaves_the_others(search, tmp_path):
    search(groups=[[{"tile": 16}]])
    journal = Journal(tmp_path / "tuning.jsonl")
    journal.forget([("another",)])
    assert journal.of(KEY)
    journal.forget([KEY])
    assert not journal.of(KEY)


def test_a_race_is_won_beyond_the_spread():
    assert spread([1.0, 3.0, 2.0, 5.0, 4.0]) == (1.0, 3.0, 5.0)
    assert spread(list(range(1, 16))) == (4, 8, 12) and spread(list(range(1, 101))) == (41, 50.5, 60)
    assert wins([0.9, 0.95, 0.97, 0.98, 0.99])
    assert not wins([0.9, 0.95, 0.97, 0.98, 1.01])  # five rounds are too few to be sure
    assert wins([0.9, 0.95, 0.97, 0.98, 1.01] * 3)
    assert not wins([0.995] * 9)  # not worth it
    assert hopeless([1.01, 1.02, 0.995, 1.03, 1.01]) and not hopeless([0.98, 1.01, 1.02, 1.03, 1.01])


def test_a_child_says_why_it_is_lost_and_starts_again(tmp_path):
    child = Child(Runner)
    child.open(tmp_path / "job.pt")
    try:
        with pytest.raises(Failed, match=r"^kernel x: the compiler failed$"):
            child.ask("build", {"tile": 103}, seconds=60)
        process = child.process
        with pytest.raises(Lost, match=r"^crashed \(SIGSEGV\)$"):
            child.ask("build", {"tile": 100}, seconds=60)
        assert child.ask("check", {}, seconds=60) == (1e-7, 1e-6) and child.process is not process
    finally:
        child.end()


def test_a_child_waits_as_long_as_nobody_asks(tmp_path):
    ours, theirs = Pipe()
    before = signal.getsignal(signal.SIGINT)
    ours.send(("open", (tmp_path,), 30.0))
    ours.send(("race", ({"tile": "none"}, {}, 1, 1.0), 30.0))
    ours.close()
    try:
        _serve(theirs, Runner)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.alarm(0) == 0


def test_an_exception_of_any_kind_is_a_candidates_own(tmp_path):
    child = Child(Runner)
    child.open(tmp_path / "job.pt")
    try:
        with pytest.raises(Failed, match=r"^KeyError: 'warps'$"):
            child.ask("race", {"warps": 4}, {}, 1, 1.0, seconds=60)
    finally:
        child.end()
