"""`sparsify.explain`: what it reports, and how it reads."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from captures import model

import sparsify
from sparsify.errors import SpecError
from sparsify.patterns import causal, dense, window

IDS = torch.zeros(1, 16, dtype=torch.long)
SPEC = {"version": 1, "sites": [{"match": "model.layers.0.*", "heads": {"0-1": "dense", "rest": {"window": 4}}}]}


@pytest.fixture(autouse=True)
def _null(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    torch._dynamo.reset()


@torch.no_grad()
def test_a_report_without_and_with_a_spec():
    made = model("gemma2", "eager")
    report = sparsify.explain(made, IDS, use_cache=False)
    assert [site.mask for site in report.sites] == ["window(6)", "causal"]
    assert report.rewritten == report.sites and not report.refused
    assert [site.patterns for site in report.sites] == [(dense(),) * 4] * 2
    assert report.sites[1].density == causal().density(4, 16, 16) and not report.sites[1].at_most
    assert {site.target for site in report.sites} == {"null"}
    assert report.passes[0].name == "Canonicalise"
    assert all(step.seconds > 0 for step in report.passes)

    report = sparsify.explain(made, IDS, use_cache=False, spec=SPEC)
    first, second = report.sites
    assert first.patterns == (dense(),) * 2 + (window(4),) * 2
    both = [(window(6) & causal()).density(2, 16, 16), (window(4) & causal()).density(2, 16, 16)]
    assert first.density == pytest.approx(sum(both) / 2)
    assert second.patterns == (dense(),) * 4
    assert first.pattern_text() == "0-1: dense; 2-3: window(4)"


@torch.no_grad()
def test_it_prints_as_a_table_and_as_json():
    report = sparsify.explain(model("gemma2", "eager"), IDS, use_cache=False, attention_mask=torch.ones_like(IDS))
    text = str(report)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "2 of 2 attention sites rewritten, in 1 graph" in text
    assert "model.layers.0.self_attn" in text and "≤ 51.6%" not in text.splitlines()[0]
    found = json.loads(json.dumps(report.to_dict()))
    assert found["sites"][0]["address"] == "model.layers.0.self_attn"
    assert found["sites"][0]["at_most"] is True


class Layer(torch.nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x):
        if self.last:
            return (x @ x.mT).exp().softmax(-1) @ x
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Layers(torch.nn.Module):
    """Three equal layers, and one that is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(last=i == 3) for i in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_equal_layers_are_one_line_and_refusals_say_why():
    report = sparsify.explain(Layers(), torch.randn(1, 2, 16, 8))
    text = str(report)
    assert "layers.0-2" in text
    assert "refused   the scores pass through exp\n  node      exp\n  line      " in text
    assert "test_explain.py:" in text and "\n            return (x @ x.mT).exp().softmax(-1) @ x\n" in text
    assert [site.address for site in report.refused] == ["layers.3"]


@torch.no_grad()
def test_a_rule_for_no_site_is_an_error():
    spec = {"version": 1, "sites": [{"match": "model.layer.*", "heads": "dense"}]}
    with pytest.raises(
        SpecError, match=r"matches no site; the model has 4: layers\.0-2 \(self, causal\), layers\.3 \("
    ):
        sparsify.explain(Layers(), torch.randn(1, 2, 16, 8), spec=spec)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)


UNITS = {"unit": {"q": 8, "k": 8}}
MEAN = {"score": {"qview": "mean", "kview": "mean"}, **UNITS}
ROOMS = {  # selections, and how many keys query q keeps at most of those that it sees; None where the scores say
    "topk": ({"topk": {"keep": 2, "unit": 8, "queries": 8}}, lambda q: (2 + 2) * 8),  # the query's own, wherever it is
    "counted": ({"select": {"budget": {"rule": "topk", "value": 3}, "force": {"sink": 1, "counted": True}, **MEAN}},
                lambda q: 3 * 8),
    "ratio": ({"select": {"budget": {"rule": "ratio", "value": 0.25}, **MEAN}}, lambda q: (q // 8 // 4 + 1) * 8),
    "most": ({"select": {"budget": {"rule": "threshold", "value": 0.0, "max": 2}, **MEAN}}, lambda q: 2 * 8),
    "lines": ({"select": {"lines": {"verticals": 3, "slashes": 2}, "score": {"qview": "last(8)", "norm": "softmax"},
                          **UNITS}}, lambda q: 2 * 2 * 8 + 3),
    "both": ({"any": [{"topk": {"keep": 1, "unit": 8, "queries": 8}}, {"sinks": 4}]}, lambda q: 4 + 3 * 8),
    "topp": ({"topp": {"share": 0.5, "unit": 8, "queries": 8}}, None),
    "last rows": ({"select": {"budget": {"rule": "topk", "value": 1}, "force": {"last_rows": 1}, **MEAN}}, None),
    "online": ({"all": ["causal", {"online": 0.01}]}, None),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", ROOMS)
def test_a_selection_counts_as_its_budget_says(name):
    form, room = ROOMS[name]
    spec = {"version": 1, "sites": [{"match": "*", "heads": {"0": "dense", "1": form}}]}
    q, k, v = torch.randn(3, 1, 2, 64, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    report = sparsify.explain(Attention(), q, k, v, spec=spec)
    (site,) = report.sites
    assert site.refusal is None and site.at_most
    most = [min(q + 1, room(q) if room else 64) for q in range(64)]
    assert site.density == pytest.approx((sum(range(65)) + sum(most)) / 2 / 64**2)
    chosen = sparsify.kept(q, k, [one & causal() for one in site.patterns], scale=0.25)
    assert chosen[0, 1].sum() <= sum(most)
    assert any("heads 1 keep is in the data" in note for note in site.notes) == (room is None)


@torch.no_grad()
def test_a_decode_step_counts_as_its_budget_says():
    spec = {"version": 1, "sites": [{"heads": {"topk": {"keep": 2, "unit": 16, "local": 0}}}]}

    def step(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 128, 16)
    (site,) = sparsify.explain(step, q, k, k, spec=spec, crossover=False).sites
    assert site.phase == "decode" and site.density == 2 * 16 / 128 and site.at_most


def test_it_can_be_asked_often():
    layers, x = Layers(), torch.randn(1, 2, 16, 8)
    with torch.no_grad():
        assert {len(sparsify.explain(layers, x).sites) for _ in range(12)} == {4}
    assert torch.compile(layers, backend="eager", fullgraph=True)(x).shape == x.shape


def test_gradients_are_reported():
    report = sparsify.explain(model("llama", "sdpa"), IDS, use_cache=False)
    assert len(report.refused) == 1 and "needs gradients" in report.refused[0].refusal.reason
