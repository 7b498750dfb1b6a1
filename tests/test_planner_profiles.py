"""Each profile against what it is defined as, on tiny models."""

import numpy as np
import pytest
import torch
from planner_cases import rig, tiny, tokens

from sparsify.errors import InputError
from sparsify.planner.objective import Tokens, Values
from sparsify.planner.profiles import KINDS, profiled
from sparsify.planner.profiles.gates import trained
from sparsify.planner.profiles.moa import own_answers
from sparsify.planner.profiles.repeats import repeat_scores
from sparsify.planner.profiles.retrieval import retrieval_scores
from sparsify.planner.progress import silent
from sparsify.planner.rig import set_up
from sparsify.planner.samples import Sample
from sparsify.planner.settings import PROFILES, Settings
from sparsify.planner.state import State

NONE = State(None)


def settings(profile="recall", **given):
    return Settings.read(lengths=48, profile=profile, **given)


def weights(made, sample, layer=0):
    """The dense weights (B, Hq, N, N) of a layer, and its values (B, Hq, N, 8), by hand."""
    model, found = made.probe.model, {}

    def hook(module, given, out):
        x = given[0]
        q, k, v = (one(x).unflatten(-1, (-1, 8)).transpose(1, 2) for one in (module.q, module.k, module.v))
        k, v = (one.repeat_interleave(4 // one.shape[1], 1) for one in (k, v))
        scores = q @ k.mT / 8**0.5
        if module.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
        found.update(weights=torch.softmax(scores.double(), -1), values=v.double())

    handle = model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        model(**sample.inputs)
    handle.remove()
    return found["weights"], found["values"]


@pytest.mark.parametrize("causal", [True, False])
def test_recall_and_output(causal):
    made, sample = rig(causal)
    a, v = weights(made, sample)
    mask = made.patterns[1].mask(4, 48, 48)[None]
    kept = (a * mask).sum(-1)
    recall = profiled(made, [sample], settings("recall"), NONE, silent).losses
    assert recall[:4, 1] == pytest.approx((1 - kept).mean((0, 2)).numpy(), abs=1e-5)
    dense, near = a @ v, (a * mask) @ v / kept.unsqueeze(-1)
    error = (near - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3))
    output = profiled(made, [sample], settings("output"), NONE, silent).losses
    assert output[:4, 1] == pytest.approx(error.numpy(), rel=1e-3)
    assert np.allclose(recall[:, 0], 0, atol=1e-6) and np.allclose(output[:, 0], 0, atol=1e-9)


def test_effect_is_the_distance_of_one_head_alone():
    made, sample = rig()
    losses = profiled(made, [sample], settings("effect"), NONE, silent).losses
    for head, candidate in ((0, 1), (5, 2), (7, 3)):
        chosen = np.zeros(8, dtype=int)
        chosen[head] = candidate
        assert losses[head, candidate] == pytest.approx(made.distance(sample, made.assignment(chosen)))
    assert (losses[:, 0] == 0).all()


def test_moa_is_the_influence_of_what_is_dropped():
    """Against autograd at the weights themselves, in one layer."""
    made, sample = rig()
    answered = own_answers(made, sample)
    assert torch.equal(answered.tokens[:, :42], sample.tokens[:, :42]) and answered.weights.sum() == 6
    found = profiled(made, [sample], settings("moa"), NONE, silent).losses
    last, model = made.probe.model.layers[1], made.probe.model
    held = {}

    def forward(x):
        q, k, v = (one(x).unflatten(-1, (-1, 8)).transpose(1, 2) for one in (last.q, last.k, last.v))
        k, v = (one.repeat_interleave(2, 1) for one in (k, v))
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
        held["a"] = torch.softmax(scores, -1).detach().requires_grad_()
        return last.o((held["a"] @ v).transpose(1, 2).flatten(2))

    last.forward = forward
    loss = Tokens().loss(model(answered.tokens), torch.empty(0), answered).sum()
    del last.forward
    (g,) = torch.autograd.grad(loss, [held["a"]])
    a = held["a"].detach()
    moved = a * (g - (g * a).sum(-1, keepdim=True)) / (1 - a + 1e-6)
    moved[:, :, 0] = (a * g)[:, :, 0]
    dropped = ~made.patterns[1].mask(4, 48, 48)[None]
    assert found[4:, 1] == pytest.approx((moved.abs() * dropped).sum((0, 2, 3)).numpy(), rel=1e-3, abs=1e-7)


class Copies(torch.nn.Module):
    """One attention whose first head looks at the token behind the last same one, and whose output says that token."""

    def __init__(self, behind=1):
        super().__init__()
        self.behind = behind

    def forward(self, input_ids):
        marks = torch.nn.functional.one_hot(input_ids, 64).float()
        before = marks.roll(self.behind, 1)
        before[:, : self.behind] = 0
        q = torch.stack([60 * marks, torch.zeros_like(marks)], 1)
        k = torch.stack([before, torch.zeros_like(marks)], 1)
        v = torch.stack([20 * marks, torch.zeros_like(marks)], 1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum(1)


def copying(behind=1):
    given = torch.randint(0, 20, (1, 64), generator=torch.Generator().manual_seed(0))
    run = torch.arange(20, 30)
    given[0, 5:15], given[0, 45:55] = run, run
    sample = Sample.of_tokens(given, needles=((6, 46, 9),), kind="recall")
    return set_up(Copies(behind), sample, rig()[0].candidates, Tokens(), "copies"), sample


def test_the_head_that_copies_is_named():
    made, sample = copying()
    scores = retrieval_scores(made, [sample], NONE, silent)
    assert scores == pytest.approx([1.0, 0.0])
    found = profiled(made, [sample], settings("retrieval"), NONE, silent)
    assert found.retrieval(made.heads) == [(0, 0)]
    assert found.losses[0, 1] > 50 * found.losses[1, 1] > 0 == found.losses[0, 0]


@pytest.mark.parametrize("behind", [0, 1])
def test_echo_and_induction_heads(behind):
    made, sample = copying(behind)
    scores = [repeat_scores(made, [sample], settings(), NONE, silent, which) for which in (0, 1)]
    looked = scores[behind]
    assert looked[0] > 0.5 > 0.2 > looked[1]
    assert scores[1 - behind][0] < 0.3


def test_gates_close_where_nothing_is_lost():
    """Of two heads one copies from far back, and the other's value is nothing."""
    made, sample = copying()
    gates = trained(made, [sample], settings(), NONE, silent, steps=60)
    assert gates[0] > 0.9 and gates[1] < 0.6


def test_local_queries_by_second_moments():
    made, sample = rig()
    losses = profiled(made, [sample], settings("local"), NONE, silent).losses
    assert (losses[:, 0] == 0).all()  # all keys are enough
    assert ((losses >= 0) & (losses <= 1)).all() and (losses[:, 2] >= losses[:, 1]).mean() > 0.5


SOON = ("output", "influence", "gates")  # the others are slow, all together


@pytest.mark.parametrize("profile", [p if p in SOON else pytest.param(p, marks=pytest.mark.slow) for p in PROFILES])
def test_every_profile_goes_on_after_a_kill(profile, tmp_path, monkeypatch):
    """What was found is read again, not computed: the model is not run."""
    made, sample = copying()
    made.candidates, made.patterns = made.candidates[:2], made.patterns[:2]
    monkeypatch.setattr("sparsify.planner.profiles.gates.STEPS", 3)
    first = profiled(made, [sample], settings(profile, probes=2), State(tmp_path, "run"), silent)
    monkeypatch.setattr(made.probe, "attend", None)
    again = State(tmp_path, "run")
    second = profiled(made, [sample], settings(profile, probes=2), again, silent)
    assert np.array_equal(first.losses, second.losses) and again.reused
    with pytest.raises(Exception):  # noqa: B017, whatever Dynamo makes of it
        profiled(made, [sample], settings(profile, probes=2), State(tmp_path, "another run"), silent)


class Hidden(torch.nn.Module):
    """A model that gives its last hidden states, and no logits."""

    def __init__(self):
        super().__init__()
        self.inner = tiny()
        self.inner.head = torch.nn.Identity()

    def forward(self, input_ids):
        return {"last_hidden_state": self.inner(input_ids)}


def test_no_retrieval_without_logits():
    """It is an error where it is asked for, and left out where facts happen to be planted."""
    sample = Sample.of_tokens(tokens(), needles=((4, 30, 4),), kind="recall")
    made = set_up(Hidden(), sample, rig()[0].candidates[:2], Values(), "hidden")
    with pytest.raises(InputError) as error:
        profiled(made, [sample], settings("retrieval"), NONE, silent)
    assert str(error.value) == (
        "plan: profile: retrieval needs a model that gives logits, and this one gives dict with last_hidden_state; "
        "take 'output' or 'influence'"
    )
    assert profiled(made, [sample], settings("output"), NONE, silent).scores is None
    with pytest.raises(InputError, match=r"has no logits \(batch, length, tokens\), found dict with last_hidden_state"):
        Tokens().reference(made.run(sample), sample)


def test_profiles_are_listed():
    assert set(KINDS) == set(PROFILES)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("moa", "plan: profile: moa needs a model that says what token comes next; take 'influence'"),
        ("retrieval", "plan: profile: retrieval needs samples with facts to copy; give recall a share above 0"),
    ],
)
def test_profiles_that_can_not_be_made(profile, message):
    sample = Sample.of_tokens(tokens())
    made = set_up(tiny(causal=False), sample, rig()[0].candidates, Tokens(next_token=False), "tiny")
    with pytest.raises(InputError) as error:
        profiled(made, [sample], settings(profile), NONE, silent)
    assert str(error.value) == message
