"""Rates that are fitted, dense attention beside a pattern, and what is said of predictions. Nothing is timed here."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from sparsify import cost
from sparsify import patterns as p
from sparsify.bench import draws
from sparsify.bench.simulate import Accuracy, Crossed, Predicted, _crossed
from sparsify.cost import calibration, dense_rates, sample, selection_rates
from sparsify.cost.dense import dense_time, is_dense_causal
from sparsify.cost.estimate import _estimate
from sparsify.cost.fit import fitted
from sparsify.cost.machine import Pace
from sparsify.cost.nest import Shape
from sparsify.cost.sample import Sample
from sparsify.errors import InputError

TRUTH = cost.machine("epyc-zen3")


def _nanoseconds(sample: Sample, machine: cost.Machine) -> float:
    return _estimate(sample.patterns, sample.shape, machine).seconds * 1e9


def test_a_fit_finds_the_machine_that_made_the_times():
    """One whose rates grow along lines with the head size."""
    given = calibration.samples()
    rates = tuple(one.model_copy(update={"empty": 300.0}) for one in cost.machine("epyc-zen4").rates)
    calls = {"launch": 4e4, "cold": 5e4, "fork": 3e3, "rates": rates}
    truth = cost.machine("epyc-zen4").model_copy(update=calls)
    first = truth.model_copy(update={"launch": 5e4, "cold": 3e4, "fork": 1e4, "rates": tuple(
        calibration._guess(one.dtype, one.head_dim) for one in rates)})  # fmt: skip
    found = fitted(first, given, [_nanoseconds(one, truth) for one in given])
    assert [found.launch, found.cold, found.fork] == pytest.approx([4e4, 5e4, 3e3], rel=0.3)
    assert all(150 < one.empty < 350 for one in found.rates)  # the truth is 300, the guess 100
    drawn = draws.draw(5, 30, ("float32", "bfloat16"))
    errors = [abs(_nanoseconds(one, found) / _nanoseconds(one, truth) - 1) for one in drawn]
    assert max(errors) < 0.12 and statistics.median(errors) < 0.02  # the guess still weighs in rates that tell little


def test_rates_of_other_head_sizes_lie_on_lines():
    """Outside of both no less and no more than in proportion; of one size alone in proportion, or as they are."""
    one = TRUTH.rates[0].model_copy(update={"full": 3.0, "masked": 0.5, "visit": 100.0, "pack": 1.0, "row": 90.0})
    two = one.model_copy(update={"head_dim": 128, "full": 5.0, "masked": 0.5, "visit": 300.0, "pack": 5.0, "row": 60.0})
    names = ("full", "masked", "visit", "pack", "row")
    for size, values in {
        32: (2.0, 0.5, 50.0, 0.5, 90.0),  # a visit would be free, packing less than that, and rows cost more
        96: (4.0, 0.5, 200.0, 3.0, 75.0),
        256: (9.0, 0.5, 600.0, 10.0, 60.0),
    }.items():
        found = TRUTH.model_copy(update={"rates": (one, two)}).rates_of("float32", size)
        assert [getattr(found, name) for name in names] == pytest.approx(values) and found.head_dim == size
    far = one.model_copy(update={"head_dim": 512, "full": 17.0})
    assert TRUTH.model_copy(update={"rates": (far, one, two)}).rates_of("float32", 200).full == pytest.approx(7.25)
    alone = TRUTH.model_copy(update={"rates": (one,)}).rates_of("float32", 32)
    assert [getattr(alone, name) for name in names] == [1.5, 0.25, 100.0, 0.5, 45.0]
    both = TRUTH.model_copy(update={"rates": (one, two)})
    assert both.rates_of("float32", 128) == two and both.dense_of("float16", 64).pair == TRUTH.dense[2].pair
    of_one_size = cost.machine("a100").rates_of("bfloat16", 256, (64, 32))  # there masked pairs are multiplied, too
    assert of_one_size.masked > of_one_size.full


def test_a_calibration_tells_its_steps_and_takes_every_rate_from_runs(monkeypatch):
    """With runs of made-up lengths: those that the shipped machine predicts."""
    told, truth = [], TRUTH.model_copy(update={"fork": 3e3})
    given = [one for one in calibration.samples() if one.shape.head_dim == 64 and one.patterns[0] == p.causal()]
    monkeypatch.setattr(calibration, "samples", lambda: given)
    monkeypatch.setattr(calibration, "HEAD_DIMS", (64,))
    times = [_nanoseconds(one, truth) * 1e-9 for one in given]
    monkeypatch.setattr(calibration, "_timed", lambda some, tell, at: times)
    monkeypatch.setattr(calibration, "_memory", lambda at: TRUTH.memory)
    monkeypatch.setattr(dense_rates, "seconds", lambda run, read, budget, at: 1e-3)
    monkeypatch.setattr(selection_rates, "seconds", lambda run, read, budget, at: (run(), 1e-3)[1])
    built = []
    monkeypatch.setattr(calibration, "build", lambda some, tell: built.extend(some))
    found = cost.calibrate(lambda what, done, every: told.append((what, done, every)))
    assert built == given and found.measured and found.memory == TRUTH.memory and found.cores == torch.get_num_threads()
    assert {(one.dtype, one.head_dim) for one in found.rates} == {("float32", 64), ("bfloat16", 64)}
    assert told[-1][0] == "fitting" and all(done <= every for _, done, every in told)
    assert cost.Machine.parse(found.text()) == found
    for one in given:
        assert _nanoseconds(one, found) == pytest.approx(_nanoseconds(one, truth), rel=0.1)  # the guess weighs in


def test_times_are_asked_for_at_a_pace(monkeypatch):
    """A call takes 5 ms, and the machine's pace beside it is what `beside` says next, in ms; the last one stays."""
    at, given = Pace(product=1e-3, memory=1e-3), []
    run = lambda: None  # noqa: E731

    def timed(one):
        return 5e-3 if one is run else 1e-3 * (given.pop(0) if len(given) > 1 else given[0])

    def asked(read, *beside):
        given[:] = beside
        return sample.seconds(run, read, 0.0, at=at)

    monkeypatch.setattr(sample, "_timed", timed)
    assert asked(0.0, 2.0) == 5e-3  # waits, but reads nothing
    assert asked(sample.EVICT_BYTES, 2.0) == pytest.approx(4e-3)  # a millisecond less at the pace asked for
    assert asked(sample.EVICT_BYTES, 0.5) == pytest.approx(5.5e-3)
    assert asked(9 * sample.EVICT_BYTES, 2.0) == 5e-3 / 4
    assert asked(None, 1.2) == pytest.approx(5e-3 / 1.2) and asked(None, 1.0) == 5e-3
    once = 2 * (1 + sample.PRODUCTS)  # products of one try, before the calls and after them
    assert asked(None, *[2.0] * once, 1.0) == 5e-3  # timed again, as others used the machine
    assert asked(None, *[1.5] * once, 2.0) == pytest.approx(5e-3 / 1.5)  # the nearer pace, though both are far


def test_times_that_fit_no_rates_are_no_calibration(monkeypatch):
    """As when other work runs beside it: each second run takes thirty times as long."""
    given = [one for one in calibration.samples() if one.shape.head_dim == 64][::2]
    times = [_nanoseconds(one, TRUTH) * (3e-8 if i % 2 else 1e-9) for i, one in enumerate(given)]
    monkeypatch.setattr(calibration, "samples", lambda: given)
    monkeypatch.setattr(calibration, "build", lambda some, tell: None)
    monkeypatch.setattr(calibration, "_timed", lambda some, tell, at: times)
    monkeypatch.setattr(calibration, "_memory", lambda at: TRUTH.memory)
    monkeypatch.setattr(calibration, "dense_rates", lambda *_: TRUTH.dense)
    monkeypatch.setattr(calibration, "selection_rates", lambda at: TRUTH.selection)
    with pytest.raises(
        InputError, match=r"^calibrate: no rates fit the times of attention, half of which are off by \d+%"
    ):
        cost.calibrate()


def test_dense_rates_are_those_that_made_the_times(monkeypatch):
    machine = cost.machine("epyc-zen4")
    truth = machine.dense_of("float32", 64)
    monkeypatch.setattr(dense_rates, "_seconds", lambda shape, causal, at: dense_time(shape, truth, causal) * 1e-9)
    found = dense_rates._rates("float32", 64, machine.pace)
    names = ("launch", "cold", "pair", "causal", "few", "key")
    assert [getattr(found, name) for name in names] == pytest.approx([getattr(truth, name) for name in names])


def test_calibration_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("SPARSIFY_CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"^calibrate: .*no-such-compiler"):
        cost.calibrate()


def test_dense_attention_is_causal_where_all_heads_are():
    shape = Shape(4, 2, 512, 512, 64)
    rates = TRUTH.dense_of("float32", 64).model_copy(update={"cold": 7e3})
    pairs = 4 * 512 * 512
    assert is_dense_causal([p.causal(), p.window(9)], shape)
    assert not is_dense_causal([p.causal(), p.window(9, ahead=1)], shape)
    assert not is_dense_causal([p.causal()], dataclasses.replace(shape, q_len=100))
    assert dense_time(shape, rates, True) == rates.launch + rates.causal * pairs
    one = dataclasses.replace(shape, q_len=1)
    assert dense_time(one, rates, False) == rates.launch + rates.cold + rates.few * 4 * 512 + rates.key * 2 * 512
    sizes = {"length": 512, "kv_heads": 2, "head_dim": 64, "machine": TRUTH}
    assert cost.dense_seconds([p.window(9)] * 4, **sizes) == dense_time(shape, rates, True) * 1e-9
    assert cost.dense_seconds([p.dense()] * 4, **sizes) == dense_time(shape, rates, False) * 1e-9


@pytest.mark.parametrize("q_len", [None, 1])
def test_a_crossover_is_where_one_becomes_faster_than_the_other(q_len):
    heads, sizes = [p.window(64)] * 4, {"head_dim": 64, "machine": TRUTH, "q_len": q_len}
    found = cost.crossover(heads, **sizes)
    assert found is not None and found > 32
    for length, faster in ((found - 1, False), (found, True), (4 * found, True)):
        mine = cost.estimate(heads, length=length, **sizes).seconds
        assert (mine < cost.dense_seconds(heads, length=length, **sizes)) is faster
    slow = TRUTH.model_copy(update={"launch": 1e15})
    assert cost.crossover(heads, head_dim=64, machine=slow, q_len=q_len) is None
    fast = TRUTH.model_copy(update={"launch": 0.0, "cold": 0.0, "dense": tuple(
        one.model_copy(update={"launch": 1e12}) for one in TRUTH.dense)})  # fmt: skip
    assert cost.crossover(heads, head_dim=64, machine=fast, q_len=q_len) == 32


def test_draws_are_the_same_for_a_seed_and_fit_their_lengths():
    first, again, other = (draws.draw(seed, 40, ("float32",)) for seed in (1, 1, 2))
    assert first == again != other
    for one in first:
        shape = one.shape
        assert len(one.patterns) == shape.heads and not any(pattern.fits(shape.k_len) for pattern in one.patterns)
        assert shape.batch * shape.heads * shape.q_len * shape.k_len <= 1.1 * draws.PAIRS
    assert any(one.shape.q_len == 1 for one in first) and any(one.shape.heads > one.shape.kv_heads for one in first)
    assert draws.draw_crossings(3, 9, ("float32",)) == draws.draw_crossings(3, 9, ("float32",))


def test_accuracy_is_of_all_samples():
    sample = Sample((p.causal(),), Shape(1, 1, 64, 64, 64))
    found = [Predicted(sample, 1.0 + i, (1.0 + i) * factor) for i, factor in enumerate((1.1, 0.95, 1.0, 1.5, 1.02))]
    crossing = draws.Crossing(p.window(64), 4, 4, 64, "float32", None, 32, 1500)
    crossed = [Crossed(crossing, 100.0, 120), Crossed(crossing, 100.0, 80), Crossed(crossing, None, None)]
    about = Accuracy.of(found, crossed)
    assert (about.median, about.ninetieth, about.ranks) == (pytest.approx(0.05), pytest.approx(0.5), pytest.approx(0.9))
    assert about.factor == pytest.approx(1.25) and not about.holds
    assert "error: median 5.0% (at most 12%), 90th percentile 50.0% (30%)" in str(about)
    assert Accuracy.of(found[:3], []).holds and Accuracy.of(found[:3], []).ranks == pytest.approx(1.0)
    assert Crossed(crossing, 100.0, None).factor == math.inf


def test_a_measured_crossover_lies_between_the_lengths_around_it():
    assert _crossed([(32, 0.9), (45, 0.8)]) == 32.0
    assert _crossed([(32, 2.0), (64, 0.5), (128, 0.4)]) == pytest.approx(math.sqrt(32 * 64))
    assert _crossed([(32, 0.9), (64, 2.0), (128, 0.5)]) == pytest.approx(math.sqrt(64 * 128))
    assert _crossed([(32, 2.0), (64, 1.5)]) is None
