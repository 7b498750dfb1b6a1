"""The probe runs a model as the backend would with the same spec, and candidates' outputs are those of running them."""

import numpy as np
import pytest
import torch
from planner_cases import CANDIDATES, rig, tiny, tokens

import sparsify
from sparsify.errors import InputError
from sparsify.patterns import Pattern, causal, column_stride, dense, sinks, topk, window
from sparsify.planner import blocks, site_call
from sparsify.planner.influence import Sketch, sketch
from sparsify.planner.probe import Probe
from sparsify.planner.study import studied

MIXTURE: tuple[Pattern | None, ...] = (
    None,
    sinks(2) | window(7),
    column_stride(3) & ~window(2),
    sinks(1) | topk(2, unit=8, queries=8, scope="head"),
)


def spec(mixture, layers=2):
    heads = {str(head): dense() if one is None else one for head, one in enumerate(mixture)}
    return {"version": 1, "patterns": {}, "sites": [{"match": "*", "heads": heads}]}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("whole", [1024, 0])  # lengths that are looked at in one piece, and none
def test_a_probe_does_what_the_backend_does_with_the_spec(is_causal, whole, monkeypatch):
    monkeypatch.setattr(site_call, "MOST_WHOLE", whole)
    monkeypatch.setattr(blocks, "MOST_ROWS", 64)
    model, given = tiny(is_causal), tokens(100, 2)
    probe = Probe(model)
    options = {"spec": spec(MIXTURE), "inner": "eager", "strict": True, "target": "null"}
    with torch.no_grad():
        assert torch.equal(probe(given), model(given))
        with probe.under(dict.fromkeys(probe.sites, MIXTURE)):
            found = probe(given)
        assert torch.equal(probe(given), model(given))
        report = sparsify.explain(model, given, spec=options["spec"])
        assert len(report.sites) == len(probe.sites) == 2
        expected = by_masks(model, given, MIXTURE, is_causal)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def by_masks(model, given, mixture, is_causal):
    """The model with its attention under the masks that `sparsify.kept` gives."""

    def forward(self, x):
        q, k, v = (made(x).unflatten(-1, (-1, 8)).transpose(1, 2) for made in (self.q, self.k, self.v))
        own = causal() if is_causal else dense()
        kept = sparsify.kept(q, k, [own if one is None else one & own for one in mixture])
        k, v = (one.repeat_interleave(4 // k.shape[1], 1) for one in (k, v))
        scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(~kept, -torch.inf)
        out = torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()
        return self.o(out.float().transpose(1, 2).flatten(2))

    before = type(model.layers[0]).forward
    try:
        type(model.layers[0]).forward = forward
        return model(given)
    finally:
        type(model.layers[0]).forward = before


def test_candidates_outputs_are_those_of_running_them():
    made, sample = rig(rows=2)
    found = {}

    def watch(call, out):
        for number, pattern in enumerate(made.patterns):
            keep = call.keep(pattern)
            rows = torch.cat([rows.under(keep)[0] for rows in studied(call)], 2)
            expected = site_call.attend(call, [keep] * out.shape[1])
            found[call.key, number] = (rows - expected).abs().max().item()
        return out

    with torch.no_grad():
        made.run(sample, {}, watch)
    assert len(found) == 2 * len(CANDIDATES)
    assert max(found.values()) < 1e-5


def test_kept_mass_and_counts_of_rows():
    made, sample = rig(length=40)

    def watch(call, out):
        keep = call.keep(sinks(1) | window(3))
        for rows in studied(call):
            at = torch.arange(rows.first, rows.last)
            assert torch.equal(rows.count(keep)[0, 0], (1 + at).clamp(max=4).float())
            shares = rows.shares()
            kept = (at[:, None] - torch.arange(rows.last) < 3) | (torch.arange(rows.last) == 0)
            torch.testing.assert_close(rows.under(keep)[1], (shares[..., : rows.last] * kept).sum(-1))
            torch.testing.assert_close(rows.part(shares, keep), rows.under(keep)[1])
        return out

    with torch.no_grad():
        made.run(sample, {}, watch)


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_small_effects_are_what_the_model_really_does(is_causal):
    """Residual and effects of a sketch, made with many probes, give the distance that is measured."""
    made, sample = rig(is_causal, length=32)
    with torch.no_grad():
        for layer in made.probe.model.layers:
            layer.o.weight.mul_(0.02)  # heads that change little: then effects add up
    chosen = np.zeros(8, dtype=int)
    found = Sketch(**sketch(made, sample, chosen, 400, 0), dense=0)
    assert np.allclose(found.residual, 0, atol=1e-5)
    for other in ([1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 2, 1, 0], [3] * 8):
        measured = made.distance(sample, made.assignment(other))
        assert found.together(np.array(other)) == pytest.approx(measured, rel=0.25)
    alone = [made.distance(sample, made.assignment(np.eye(8, dtype=int)[head])) for head in range(8)]
    assert np.corrcoef(found.alone()[:, 1], alone)[0, 1] > 0.95


@pytest.mark.slow
def test_a_sketch_knows_where_it_was_made():
    made, sample = rig(length=32)
    chosen = np.array([1, 1, 0, 3, 2, 0, 1, 1])
    found = Sketch(**sketch(made, sample, chosen, 200, 0), dense=0)
    assert found.together(chosen) == pytest.approx(made.distance(sample, made.assignment(chosen)), rel=0.3)
    assert np.allclose(found.effects[:, np.arange(8), chosen], 0, atol=1e-4)


def test_no_attention_is_an_error():
    with pytest.raises(InputError, match="plan: plain: no attention of the model can be rewritten"):
        probe = Probe(torch.nn.Linear(4, 4))
        probe(torch.randn(2, 4))
        probe.check("plain")
