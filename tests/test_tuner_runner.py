"""What times candidates on a GPU, as far as there needs to be none: graphs are captured once, and events time them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sparsify.bench import gpu
from sparsify.runtime import tuned
from sparsify.tuner import runner

KEY = ("machine", "software", "triton", "kernel")


def launches(on_gpu):
    launch = SimpleNamespace(q=SimpleNamespace(is_cuda=on_gpu), program=SimpleNamespace(target="triton"))
    return [launch, launch]


@pytest.fixture
def ran(monkeypatch):
    """The values that each run was forced to, of a target that does nothing."""
    found = []
    target = SimpleNamespace(run=lambda launch: found.append(dict(tuned.lookup(KEY))))
    monkeypatch.setattr(runner, "target", lambda name: target)
    monkeypatch.setattr(runner, "_wait", lambda launch: None)
    return found


def test_on_a_gpu_each_side_is_captured_once_and_its_replays_are_timed(ran, monkeypatch):
    captured = []

    class Replayed:
        def __init__(self, run):
            run()
            self.values = dict(tuned.lookup(KEY))
            captured.append(self.values)

        def seconds(self):
            return 0.25 if self.values else 1.0

    monkeypatch.setattr(gpu, "Replayed", Replayed)
    here = runner.Runner()
    here.launches = launches(True)
    race = here.race({"num_warps": 8}, {}, 7, 60.0)
    assert race.challenger == (0.5,) * 7 and race.incumbent == (2.0,) * 7
    assert captured == [{"num_warps": 8}] * 2 + [{}] * 2
    assert ran == [{"num_warps": 8}] * 2 + [{}] * 2 + captured  # built, and captured; no round runs Python again


def test_on_a_processor_every_round_runs_under_its_sides_values(ran):
    here = runner.Runner()
    here.launches = launches(False)
    race = here.race({"blocks": 8}, {}, 6, 60.0)
    rounds = len(race.challenger)
    again = (len(ran) - 6) // (4 * rounds)  # two launches of two sides are built, and the default's timed once
    assert len(ran) == 6 + 4 * rounds * again and again >= 1
    assert ran[6 : 6 + 4 * again] == [{"blocks": 8}] * 2 * again + [{}] * 2 * again


def test_what_can_not_be_captured_runs_as_it_is(monkeypatch):
    @contextmanager
    def refused(graph):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    calls = []
    with pytest.warns(UserWarning, match="a call can't be captured, so its times have Python's in them: operation not"):
        made = gpu.Replayed(lambda: calls.append(1))
    made()
    assert len(calls) == 3  # twice before it is captured


def test_a_short_call_is_timed_several_times_in_a_row(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3 + 0.004  # what events take themselves

    class Graph:
        def replay(self):
            clock.now += 50e-6

    @contextmanager
    def capturing(graph):
        yield

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = gpu.Replayed(lambda: None).seconds()
    assert 50e-6 <= found < 50.5e-6  # 54e-6 where each is timed alone
