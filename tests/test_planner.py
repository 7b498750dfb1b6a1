"""`plan`: from a model and text to a spec that the backend takes, and what a user is told of wrong input."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from planner_cases import CANDIDATES, rig, tiny, tokens

from sparsify.errors import InputError
from sparsify.patterns import causal
from sparsify.planner import Plan, plan
from sparsify.planner import candidates as kinds_of
from sparsify.planner.heads import OF, Costs
from sparsify.planner.objective import Embedding, Tokens, Values, objective_for
from sparsify.planner.plan import Candidate
from sparsify.planner.readings import Readings
from sparsify.planner.samples import Sample, Stream, of_bytes, plant, read_texts
from sparsify.planner.settings import Budget, Settings
from sparsify.planner.state import State
from sparsify.planner.terminal import summary

TEXT = "".join(chr(33 + (i * i + 7 * i) % 90) for i in range(2000))
SMALL = {
    "candidates": CANDIDATES,
    "samples": 2,
    "probes": 3,
    "objective": Tokens(),
    "front": (0.75, 0.5),
    "of": "pairs",
}


@pytest.fixture(scope="module")
def made():
    return plan(tiny(), [TEXT], lengths=(32, 48), budget=0.5, name="tiny", recall=0.5, **SMALL | {"samples": 2})


def test_a_plan_keeps_to_its_budget_and_is_validated(made):
    point = made.front[made.chosen]
    assert point.cost <= 0.5 + 1e-6 and not point.uniform
    assert [one.cost for one in made.front[:2]] == sorted(one.cost for one in made.front[:2])
    assert {one.name for one in made.validation} == {"dense", *(one.name for one in made.front)}
    assert {one.kind for one in made.sites} == {"self"} and {row.data for row in made.validation} == {"text", "recall"}
    assert {row.length for row in made.validation} == {72}  # a length that was not profiled
    assert made.gap <= 1e-3 and made.bound <= point.predicted * (1 + 1e-6)
    assert made.choices() == point.choices


def test_its_spec_is_taken_as_it_is_and_makes_what_was_planned(made, tmp_path):
    model, given = tiny(), tokens(64)
    made.spec().save(tmp_path / "plan.yaml")
    options = {"spec": str(tmp_path / "plan.yaml"), "strict": True, "inner": "eager"}
    with torch.no_grad():
        found = torch.compile(model, backend="sparsify", options=options)(given)
    from sparsify.planner.probe import Probe

    probe = Probe(model)
    with torch.no_grad():
        probe(given)
        patterns = [[None if one == 0 else CANDIDATES[one].pattern() for one in of] for of in made.choices()]
        with probe.under(dict(zip(probe.sites, patterns, strict=True))):
            expected = probe(given)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_it_is_shown_and_saved(made, tmp_path):
    from rich.console import Console

    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary(made))
    shown = console.export_text()
    assert "what each head of tiny gets" in shown and "> plan at 0.5" in shown
    assert " ".join(made.optimum.split()) in " ".join(shown.split())


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """The second run finds all that the first one had before it was killed, and no state is left at the end."""
    from sparsify.planner import make

    given = {"lengths": 32, "budget": 0.5, "state": tmp_path / "state", "rounds": 0, **SMALL}
    monkeypatch.setattr(make, "uniforms", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plan(tiny(), [TEXT], **given)
    kept = len(list((tmp_path / "state").iterdir()))
    assert kept > 4
    monkeypatch.undo()
    monkeypatch.setattr("sparsify.planner.influence.sketch", None)  # it would be an error to sketch again
    plan(tiny(), [TEXT], **given)
    assert not (tmp_path / "state").exists()


def test_a_plan_at_another_budget_finds_what_was_profiled(tmp_path, monkeypatch):
    """Neither the budget nor the front, machine or limits are part of what a profile depends on; probes are."""
    from sparsify.planner import influence

    made, sketch = [], influence.sketch
    monkeypatch.setattr(influence, "sketch", lambda *args: made.append(args) or sketch(*args))
    given = {"lengths": 32, "state": tmp_path / "state", "rounds": 0, **SMALL, "front": ()}
    plan(tiny(), [TEXT], budget=0.8, keep=True, **given)
    assert len(made) == 2
    other = plan(tiny(), [TEXT], budget=0.6, keep=True, per_layer=3, **given)
    assert len(made) == 2 and other.front[other.chosen].cost <= 0.6 + 1e-6
    plan(tiny(), [TEXT], budget=0.6, **given | {"probes": 2})
    assert len(made) == 4 and not (tmp_path / "state").exists()


def test_a_budget_that_nothing_meets_is_named_before_anything_is_profiled(monkeypatch):
    monkeypatch.setattr("sparsify.planner.make.profiled", None)
    for budget, hint in (
        (0.01, r"[\d.]+$"),
        ("loss +1%", ".*a bound on the loss .* shares in --front: give a larger one$"),
    ):
        said = rf"budget: no choice comes to 0.01 of the dense cost; the nearest that is met is {hint}"
        with pytest.raises(InputError, match=said):
            plan(tiny(), [TEXT], lengths=32, budget=budget, **SMALL | {"front": (0.01,)})


def test_heads_that_cost_more_together_are_told(monkeypatch):
    """What is met head by head may not be met by heads that share tiles."""
    from sparsify.planner.make import Planner

    monkeypatch.setattr(Planner, "cost", lambda self, chosen: 3.0)
    with pytest.raises(InputError, match=r"heads that come to 0.6 one by one cost 3 of dense together; take a larger"):
        plan(tiny(), [TEXT], lengths=32, budget=0.6, rounds=0, **SMALL | {"front": ()})


@pytest.mark.slow
def test_groups_of_heads_and_layers_that_stay_dense():
    found = plan(tiny(), [TEXT], lengths=32, budget=0.7, rounds=0, **SMALL | {"joined": True, "dense_layers": "0"})
    first, second = found.choices()
    assert set(first) == {0}
    assert second[0] == second[1] and second[2] == second[3]
    assert any(second)


@pytest.mark.slow
def test_few_rules_a_layer():
    found = plan(tiny(), [TEXT], lengths=32, budget=0.5, rounds=1, per_layer=1, **SMALL)
    assert all(len(set(of)) == 1 for of in found.choices())


def test_a_bound_on_the_loss_takes_the_cheapest_that_keeps_it(made):
    worst = max(point.validated for point in made.front if not point.uniform)
    loose = plan(tiny(), [TEXT], lengths=(32, 48), budget=f"loss +{worst * 2}", name="tiny", recall=0.5, **SMALL)
    assert loose.front[loose.chosen].cost == min(point.cost for point in loose.front if not point.uniform)


def test_a_bound_that_no_share_of_the_front_keeps_is_kept_by_dense_attention():
    given = SMALL | {"front": (0.5,), "objective": Tokens(False)}
    found = plan(tiny(), [TEXT], lengths=32, budget="loss +1e-12", rounds=0, **given)
    assert not any(one for of in found.choices() for one in of) and found.front[found.chosen].cost == 1
    assert found.missed.startswith("no share of the front loses at most +1e-12 nats a token; the nearest is +")
    assert found.missed.endswith("so every head keeps everything; try larger shares in --front")
    assert Plan.from_json(found.to_json()) == found
    assert all(rule.groups[0].name == "dense" for rule in found.spec().rules)


@pytest.mark.slow
def test_to_both_sides_and_memory():
    model = tiny(causal=False)
    rows = tokens(40, 8)
    found = plan(model, rows, lengths=40, budget=0.6, objective=Values(), samples=2, probes=2, front=(), of="pairs")
    assert found.unit == "relative squared error" and not found.sites[0].causal
    memory = plan(tiny(), [TEXT], lengths=48, budget=0.7, rounds=0, **SMALL | {"of": "memory"})
    for of in memory.choices():
        assert of[0] == of[1] and of[2] == of[3]  # they share their keys


WRONG = [
    ({"data": []}, "plan: data: expected texts, tokens or Readings, found nothing"),
    ({"data": 7}, "plan: data: expected texts, tokens or Readings, found int"),
    ({"data": ["too short"]}, "tokens of text are too few for one piece of 32; give more text"),
    ({"lengths": 256}, "plan: lengths: found 256; the model reads at most 128 tokens"),
    ({"lengths": []}, "plan: lengths: expected integers of at least 2, such as 1024,2048, found []"),
    ({"validate_length": 256}, "plan: validate_length: found 256; the model reads at most 128 tokens"),
    ({"budget": 0}, "plan: budget: expected a share of the dense cost above 0 and at most 1, such as 0.5, or a bound"),
    ({"budget": "loss -1%"}, "found 'loss -1%'"),
    ({"budget": 0.01}, "plan: budget: no choice comes to 0.01 of the dense cost; the nearest that is met is 0."),
    ({"data": torch.tensor([300] * 200)}, "plan: data: found the token 300; the model's vocabulary is 0-255"),
    ({"data": torch.tensor([-1] * 200)}, "plan: data: found the token -1; the model's vocabulary is 0-255"),
    ({"data": torch.rand(200)}, "plan: data: expected tokens, which are integers, found torch.float32"),
    ({"held_out": 7}, "plan: held_out: expected texts or tokens, found int"),
    ({"data": Readings((3,), (3,), (3,))}, "plan: data: profile: expected Samples, found int"),
    ({"lengths": "32"}, "plan: lengths: expected integers of at least 2, such as 1024,2048, found '32'"),
    ({"lengths": None}, "plan: lengths: expected integers of at least 2, such as 1024,2048, found None"),
    (
        {"budget": None},
        "plan: budget: expected a share of the dense cost above 0 and at most 1, such as 0.5, or a boun",
    ),
    ({"budget": "loss +1e999"}, "found 'loss +1e999'"),
    (
        {"objective": 3},
        "plan: objective: expected an object with unit, absolute, reference, distance, loss, probes, fo",
    ),
    ({"tokenizer": str.encode}, "plan: tokenizer: expected a planner.samples.Tokenizer, found method_descriptor"),
    ({"state": 3}, "plan: state: expected the path of a folder, found int"),
    ({"candidates": ["near"]}, "plan: candidates: expected a list of Candidate, found ['near']"),
    ({"candidates": CANDIDATES[1:]}, "plan: candidates: expected one named 'dense' among them, which drops nothing"),
    ({"candidates": (*CANDIDATES, Candidate("x", 3))}, "plan: candidates: "),
    ({"kinds": "windows"}, "plan: kinds: expected a list of names such as ('windows', 'strides'), found 'windows'"),
    ({"shape": 64}, "plan: shape: expected integers of at least 1, such as (64, 64), found 64"),
    ({"front": 0.5}, "plan: front: expected shares of the dense cost, found 0.5"),
    ({"recall": "half"}, "plan: recall: expected a share from 0 to 1, found 'half'"),
    ({"seed": -1}, "plan: seed: expected an integer of at least 0, found -1"),
    ({"sample": 3}, "plan: unknown setting 'sample'; did you mean 'samples'?"),
    ({"reuse": {7: "8-9"}}, "plan: reuse: found 7, and the model's layers are 0-1"),
    ({"reuse": {0: "1-9"}}, "plan: reuse: found 1-9, and the model's layers are 0-1"),
    ({"of": "tile"}, "plan: of: found 'tile'; did you mean 'tiles'?"),
    ({"profile": "influenced"}, "plan: profile: found 'influenced'; did you mean 'influence'?"),
    ({"budget": "loss +1%", "front": ()}, "plan: front: expected shares of the dense cost, one at least for a bound"),
    ({"front": (2,)}, "plan: front: expected shares of the dense cost, found (2,)"),
    ({"samples": 0}, "plan: samples: expected an integer of at least 1, found 0"),
    ({"recall": 2}, "plan: recall: expected a share from 0 to 1, found 2"),
    ({"dense_layers": "x"}, "plan: dense_layers: "),
    ({"reuse": {3: "1"}}, "plan: reuse"),
    ({"reuse": {0: "1"}, "per_layer": 2}, "plan: reuse: goes without a limit on the rules of a layer (per_layer)"),
    ({"dense_layers": "0,7-9"}, "plan: dense_layers: found 7-9, and the model's layers are 0-"),
    ({"candidates": None, "kinds": ("window",)}, "plan: candidates: unknown kind 'window'; did you mean 'windows'?"),
    ({"candidates": None, "kinds": ("neighborhoods",)}, "plan: candidates: neighborhoods need the shape of the grid"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_input_is_named(change, message):
    model = tiny()
    model.config = type(
        "Config", (), {"max_position_embeddings": 128, "vocab_size": 256, "architectures": ["TinyForCausalLM"]}
    )()
    given = {"data": [TEXT], "lengths": 32, "budget": 0.5, "rounds": 0, **SMALL} | change
    with pytest.raises(InputError) as error:
        plan(model, given.pop("data"), **given)
    assert message in str(error.value)


def test_a_model_that_takes_no_tokens_is_named():
    class Sees(torch.nn.Module):
        main_input_name = "pixel_values"  # as transformers says it

        def forward(self, pixel_values=None, **others):
            return pixel_values

    said = "^plan: model: Sees takes no 'input_ids', it reads pixel_values; give Readings with samples of its own"
    with pytest.raises(InputError, match=said):
        plan(Sees(), [TEXT], lengths=32)
    with pytest.raises(InputError, match=r"^plan: model: expected a model that can be called, found int$"):
        plan(3, [TEXT], lengths=32)


def test_budgets():
    assert Budget.read("25%").share == Budget.read(0.25).share == 0.25
    assert Budget.read("loss +1%").limit(2.0) == pytest.approx(0.02)
    assert Budget.read("loss + 0.05").limit(2.0) == 0.05


def test_pieces_are_spread_and_planted_facts_come_twice():
    stream = Stream.of([TEXT], of_bytes())
    pieces = stream.pieces(100, 4)
    assert [len(piece) for piece in pieces] == [100] * 4 and (pieces[0] == stream.tokens[:100]).all()
    found, needles = plant(np.zeros(512, dtype=np.int64), np.arange(1, 50), np.random.default_rng(0))
    assert needles
    for size, seed in itertools.product((128, 200, 512, 4096), range(20)):
        _, planted = plant(np.zeros(size, dtype=np.int64), np.arange(1, 50), np.random.default_rng(seed))
        span = min(24, size // 32)  # of a whole fact, whose first third is its cue
        for places in ([one[0] for one in planted], [one[1] for one in planted]):
            assert (np.diff(places) >= span).all() and len(planted) > 1
        assert max(asked + left for _, asked, left in planted) <= size
    for fact, asked, size in needles:
        assert fact + size <= 512 // 4 + 24 and 512 * 3 // 4 <= asked < asked + size <= 512
        assert (found[fact - 2 : fact + size] == found[asked - 2 : asked + size]).all() and found[fact] > 0


def test_no_text_in_files(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"plan: data: no text in .*empty.txt"):
        read_texts([tmp_path / "empty.txt"])
    with pytest.raises(InputError, match="'nowhere' is no file and no folder"):
        read_texts(["nowhere"])


def test_candidates_from_a_file(tmp_path):
    path = tmp_path / "candidates.yaml"
    path.write_text("candidates:\n  near: {window: 64}\n  far: {sinks: 4, window: N/2}\n")
    assert [one.name for one in kinds_of.read(path)] == ["dense", "near", "far"]
    path.write_text("candidates:\n  near: {windows: 64}\n")
    with pytest.raises(InputError, match=r"candidates.near: .*unknown pattern 'windows'; did you mean 'window'"):
        kinds_of.read(path)
    path.write_text("rules: {}\n")
    with pytest.raises(InputError, match="candidates: expected this field with a mapping of names to patterns"):
        kinds_of.read(path)


@pytest.mark.parametrize("given", [(True, 4096, "time"), (False, 512, "pairs"), (True, 256, "pairs")])
def test_usual_candidates_are_patterns_with_names_of_their_own(given):
    found = kinds_of.default(*given, shape=(16, 16) if given[1] == 256 else None)
    assert len({one.name for one in found}) == len(found) == len({json.dumps(one.form) for one in found})
    assert all(one.pattern().rule for one in found)
    assert sum(one.name.startswith("elastic") for one in found) == (48 if given[0] else 0)


def test_what_a_result_is_measured_by():
    from types import SimpleNamespace

    sample = Sample.of_tokens(tokens(8))
    logits = SimpleNamespace(logits=torch.zeros(1, 8, 256))
    assert objective_for(logits, sample, True) == Tokens(True) and objective_for(logits, sample, False) == Tokens(False)
    assert objective_for(SimpleNamespace(last_hidden_state=torch.zeros(1, 8, 4)), sample, False) == Embedding()
    assert objective_for({"x": torch.zeros(2)}, sample, False) == Values()
    with pytest.raises(InputError, match="the model's result has no tensor to compare, found NoneType"):
        objective_for(None, sample, False)


@pytest.mark.parametrize("objective", [Tokens(), Embedding(), Values()])
def test_probes_see_the_distance(objective):
    """Half the mean square of many probes is the distance, near the dense result."""
    from types import SimpleNamespace

    sample, generator = Sample.of_tokens(tokens(6, 2)), torch.Generator().manual_seed(0)
    base = torch.randn(2, 6, 16, generator=generator)
    dense, near = (SimpleNamespace(logits=x, last_hidden_state=x) for x in (base, base + 0.02 * torch.randn(2, 6, 16)))
    if isinstance(objective, Values):
        dense, near = dense.logits, near.logits
    reference = objective.reference(dense, sample)
    values = torch.stack([now for _, now in objective.probes(near, reference, sample, 3000, generator)])
    assert torch.allclose(values.square().mean(0) / 2, objective.distance(near, reference, sample), rtol=0.15)
    assert objective.distance(dense, reference, sample).abs().max() < 1e-6


def test_readings_are_taken_as_they_are_and_validated_by_length():
    samples = tuple(Sample.of_tokens(tokens(length, seed=length)) for length in (30, 31, 32, 48))
    given = Readings(samples[:1], samples[1:2], samples[2:])
    found = plan(tiny(), given, lengths=32, budget=0.7, rounds=0, **SMALL)
    of_plan = [row for row in found.validation if row.name == found.front[found.chosen].name]
    assert [row.length for row in of_plan] == [32, 48] and of_plan[0].cost > of_plan[1].cost
    point = found.front[found.chosen]
    assert point.validated == pytest.approx(np.mean([row.increase for row in of_plan]))


def test_a_sample_is_known_by_all_that_is_in_it():
    one, given = Sample.of_tokens(tokens(8)), tokens(8)
    others = [
        replace(one, extra={"scale": 2.0}), replace(one, extra={"scale": 3.0}), replace(one, needles=((0, 4, 2),)),
        replace(one, inputs={"ids": given}), replace(one, inputs={"input_ids": given, "flag": True}),
        replace(one, inputs={"input_ids": given.int()}), replace(one, extra={"mask": [torch.ones(2)]}),
        replace(one, extra={"mask": [torch.zeros(2)]}), replace(one, tokens=given + 1), replace(one, kind="recall"),
        replace(one, inputs={"input_ids": given + 2**40}), replace(one, inputs={"input_ids": given + 2**40 + 1}),
    ]  # fmt: skip
    assert len({sample.digest() for sample in [one, *others]}) == len(others) + 1
    assert Sample.of_tokens(tokens(8)).digest() == one.digest()


def test_heads_whose_rules_differ_cost_what_they_cost():
    """One pattern by `h` costs each head what the head's own rule costs."""
    made, _ = rig()
    by_head = Candidate("by head", {"expr": "q - k < 64 + 128 * h"}).pattern()
    alone = [Candidate("w", {"window": 64 + 128 * head}).pattern() for head in range(4)]
    for of in OF:
        costs = Costs(made.heads, (512,), of)
        found, each = costs.shares([by_head, None])[0], costs.shares(alone)[0]
        # In time a tile with a mask may cost more than a whole one, so that a few keys more may cost less.
        assert found[3, 0] > found[0, 0] if of == "time" else (np.diff(found[:4, 0]) > 0).all()
        assert found[:, 1].sum() == pytest.approx(1)
        assert found[4:, 0] == pytest.approx(found[:4, 0])  # of the other site
        if of != "time":  # which heads share
            assert found[:4, 0] == pytest.approx([each[head, head] for head in range(4)])


def test_settings_name_the_budgets_mildest_first():
    assert Settings.read(lengths=8, budget=0.3, front=(0.25, 0.5)).budgets() == (0.5, 0.3, 0.25)


def test_elastic_spans_that_are_the_same_at_all_lengths_count_once():
    found = kinds_of.told_apart(kinds_of.default(True, 2048, "time", ("elastic",)), (512, 1024))

    def masks(one):
        return tuple(hash((one.pattern() & causal()).mask(1, n, n).numpy().tobytes()) for n in (512, 1024))

    whole = kinds_of.default(True, 2048, "time", ("elastic",))
    assert 5 < len(found) < len(whole) == 49
    assert set(map(masks, whole)) == set(map(masks, found)) and len(set(map(masks, found))) == len(found)


@pytest.mark.slow
def test_layers_take_the_choices_of_others():
    """The spec is taken with its reuse: a layer that takes a choice is refused where none is made."""
    given = SMALL | {"candidates": None, "kinds": ("selectors",), "front": ()}
    found = plan(tiny(), [TEXT], lengths=64, budget=0.75, rounds=0, reuse={0: "1"}, **given)
    assert any(found.choices()[1])
    options = {"spec": found.spec(), "strict": True, "inner": "eager"}
    with torch.no_grad():
        torch.compile(tiny(), backend="sparsify", options=options)(tokens(64))


def test_a_folder_of_state_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^plan: state: the folder '.*file/state' can't be made: Not a directory"):
        State(tmp_path / "file" / "state").of("head 0", lambda: {"loss": np.arange(3)})


def test_what_a_run_kept_goes_and_nothing_else(tmp_path):
    state, made = State(tmp_path, "run"), []

    def make():
        made.append(1)
        return {"loss": np.arange(3)}

    state.of("head 0", make)
    kept = next(tmp_path.iterdir())
    kept.write_bytes(kept.read_bytes()[:20])
    assert (state.of("head 0", make)["loss"] == np.arange(3)).all() and len(made) == 2
    (tmp_path / f".{kept.name}.123").touch()  # of a run that was killed while it wrote
    (tmp_path / "mine.txt").touch()
    (tmp_path / "mine.npz").touch()
    state.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.npz", "mine.txt"]
    for path in tmp_path.iterdir():
        path.unlink()
    state.clear()
    assert not tmp_path.exists()
