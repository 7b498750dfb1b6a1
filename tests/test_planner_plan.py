"""A plan's values: JSON and back, the spec it makes, and what a user is told of a wrong one."""

import dataclasses
import json

import numpy as np
import pytest

from sparsify.errors import InputError
from sparsify.planner.bound import keeps, missed
from sparsify.planner.plan import Candidate, HeadPlan, Model, Plan, Point, SitePlan, Validation, fingerprint
from sparsify.planner.state import State
from sparsify.spec import SiteInfo

CANDIDATES = (
    Candidate("dense", "dense"),
    Candidate("near", {"sinks": 4, "window": 128}),
    Candidate("best", {"any": [{"sinks": 4}, {"topk": {"keep": 4}}]}),
)


def site(number, *chosen, use=0):
    heads = tuple(HeadPlan(one, (0.5, 0.1, None), (0.0, 1e-3, None), 0.25) for one in chosen)
    return SitePlan(f"layers.{number}.attn", number, use, "self", True, 2, 32, heads, (0.1,), (0.2,))


def example(**changes):
    front = (Point("plan at 0.5", 0.5, predicted=1e-3, choices=((1, 0, 1, 1), (0, 0, 0, 2))),
             Point("window 64", 0.5, True, form={"window": 64}))  # fmt: skip
    rows = (Validation("dense", "text", 96, 1.0, 2.0, 0.0),)
    found = Plan(
        model=Model("tiny", "0123456789abcdef"), machine="here", lengths=(64,), of="tiles", budget="0.5",
        profile="influence", unit="nats a token", candidates=CANDIDATES,
        sites=(site(0, 1, 0, 1, 1), site(1, 0, 0, 0, 2)), front=front, chosen=0, validation=rows, bound=1e-3, gap=0.0,
        retrieval=((0, 1),),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_a_plan_comes_back_from_json(tmp_path):
    found = example()
    assert Plan.from_json(found.to_json()) == found
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_spec_gives_every_head_what_the_plan_gives_it():
    found = example()
    spec = found.spec()
    infos = [SiteInfo(f"layers.{n}.attn", n, "self", True, 4, 2, layers=2) for n in range(2)]
    patterns = spec.resolve(infos)
    expected = [[found.candidates[head.candidate].pattern() for head in one.heads] for one in found.sites]
    assert [list(of) for of in patterns] == expected
    assert [rule.phase for rule in spec.rules] == [None, "prefill"]  # what is chosen, is chosen for many queries


def test_an_attention_of_the_model_itself_has_the_last_rule():
    found = example()
    spec = dataclasses.replace(found, sites=(dataclasses.replace(found.sites[0], address=""), found.sites[1])).spec()
    assert [rule.match for rule in spec.rules] == ["layers.1.attn", "*"]
    patterns = spec.resolve([SiteInfo(path, n, "self", True, 4, 2) for n, path in enumerate(("", "layers.1.attn"))])
    assert [list(of) for of in patterns] == [
        [found.candidates[head.candidate].pattern() for head in one.heads] for one in found.sites
    ]


def test_uses_of_one_module_are_told_apart():
    found = example(sites=(site(0, 1, 1, 1, 1), site(0, 0, 0, 0, 0, use=1)))
    infos = [SiteInfo("layers.0.attn", 0, "self", True, 4, 2, use=use) for use in range(2)]
    assert [str(of[0]) for of in found.spec().resolve(infos)] == ["sinks(4) | window(128)", "dense()"]


def test_points_of_the_front_have_specs_of_their_own():
    found = example()
    infos = [SiteInfo(f"layers.{n}.attn", n, "self", True, 4, 2, layers=2) for n in range(2)]
    assert found.spec(found.front[0]).resolve(infos) == found.spec().resolve(infos)
    assert {str(one) for of in found.spec(found.front[1]).resolve(infos) for one in of} == {"window(64)"}


def test_a_plan_for_another_model_is_refused():
    found = example()
    found.check("0123456789abcdef", "tiny")
    with pytest.raises(InputError, match=r"plan: model: found one for 'tiny' \(0123456789abcdef\), and 'large' is"):
        found.check("fedcba9876543210", "large")


def test_a_fingerprint_is_of_structure_and_config():
    sites = [{"address": "a", "heads": 4}]
    one = fingerprint(sites, {"hidden_size": 64, "_name_or_path": "here"})
    assert one == fingerprint(sites, {"hidden_size": 64, "_name_or_path": "there", "use_cache": False})
    assert one != fingerprint(sites, {"hidden_size": 65})
    assert one != fingerprint([{"address": "a", "heads": 8}], {"hidden_size": 64})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "p.json: version: found 7; this sparsify reads plans of version 1"),
        ({"lengths": "many"}, "p.json: lengths: input should be a valid tuple, found 'many'"),
    ],
)
def test_what_is_no_plan_is_named(change, message, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(json.loads(example().to_json()) | change))
    with pytest.raises(InputError) as error:
        Plan.load(path)
    assert str(error.value) == message.replace("p.json", str(path))


def test_no_json_and_no_file(tmp_path):
    (tmp_path / "p.json").write_text("not")
    with pytest.raises(InputError, match="not JSON"):
        Plan.load(tmp_path / "p.json")
    with pytest.raises(InputError, match="can't be read: No such file"):
        Plan.load(tmp_path / "q.json")


def test_a_bound_that_was_kept_by_a_share_between_is_told_as_that():
    front = [Point("a", 0.5, validated=0.3), Point("b", 0.75, validated=0.1), Point("c", 0.5, True, validated=0.0)]
    assert not keeps(front, 0.05) and keeps(front, 0.1)
    assert missed(front, 0.05, "nats", Point("plan at 0.875", 0.87)) == (
        "no share of the front loses at most +0.05 nats; the nearest is +0.1 at 75.0% of the cost, so one at 87.0% of"
        " the cost was searched; try larger shares in --front"
    )


def test_what_a_run_kept_goes_and_nothing_else(tmp_path):
    folder = tmp_path / "state"
    kept = State(folder)
    kept.of("loss", lambda: {"value": np.ones(2)})
    (folder / "notes.txt").write_text("mine")
    kept.clear()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    kept.clear()
    assert not folder.exists()


def test_what_was_cut_short_is_made_again(tmp_path):
    kept = State(tmp_path)
    kept.of("loss", lambda: {"value": np.ones(2)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert kept.of("loss", lambda: {"value": np.zeros(1)})["value"].tolist() == [0.0] and kept.reused == 0
