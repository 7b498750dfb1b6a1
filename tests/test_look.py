"""The pictures of heads against attention computed whole, and against what patterns keep of the model's own tensors."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from plan_cases import CANDIDATES, made_up_plan
from torch import nn

import sparsify
from sparsify.cli.evidence import draw_evidence, origin
from sparsify.errors import InputError
from sparsify.patterns import causal
from sparsify.planner.look import CELLS, pictures, pictures_of
from sparsify.planner.pictures import GAMMA
from sparsify.planner.probe import Probe
from sparsify.planner.samples import of_bytes
from sparsify.spec import load_spec

HEADS, KV_HEADS, SIZE = 4, 2, 8
CHOICES = ((0, 2, 7, 11), (11, 10, 10, 3))  # dense, windows, spans, a stride and a selection


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, heads * SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(HEADS * SIZE, 16)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in self.parts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        made = nn.functional.scaled_dot_product_attention(3 * q, 3 * k, v, is_causal=True, enable_gqa=True)
        return x + self.out(made.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def planned(probe: Probe):
    plan = made_up_plan(2, HEADS, KV_HEADS)
    sites = [
        replace(site, address=address, use=use, heads=tuple(
            replace(head, candidate=choice) for head, choice in zip(site.heads, choices, strict=True)
        ))
        for site, (address, use), choices in zip(plan.sites, probe.sites, CHOICES, strict=True)
    ]  # fmt: skip
    return replace(plan, sites=tuple(sites))


@pytest.fixture(scope="module")
def probed():
    torch.manual_seed(0)
    model = Model().eval()
    probe = Probe(model)
    with torch.no_grad():
        probe(torch.randn(2, 40, 16))
    return model, probe, planned(probe)


def in_cells(values: torch.Tensor, cell: int) -> torch.Tensor:
    """Sums over the cells of the last two axes."""
    short = -values.shape[-1] % cell
    whole = nn.functional.pad(values, (0, short, 0, short))
    return whole.unflatten(-1, (-1, cell)).sum(-1).unflatten(-2, (-1, cell)).sum(-2)


@pytest.mark.parametrize("length", [50, 700])
def test_a_picture_is_the_attention_and_the_mask_summed_over_cells(length, probed):
    model, probe, plan = probed
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))
    found = pictures_of(plan, probe, lambda: probe(x))
    with torch.no_grad():
        for layer, site, picture in zip(model.layers, plan.sites, found.sites, strict=True):
            q, k, _ = (part[:1] for part in layer.split(x))
            scores = 9 * q @ k.repeat_interleave(HEADS // KV_HEADS, 1).mT / SIZE**0.5
            attention = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf).softmax(-1)[0]
            patterns = [CANDIDATES[head.candidate].pattern() & causal() for head in site.heads]
            kept = sparsify.kept(3 * q, 3 * k, patterns)[0]
            assert (picture.queries, picture.keys) == (length, length) and max(picture.attention.shape[1:]) <= CELLS
            sizes = in_cells(torch.ones(length, length), picture.cell)
            queries = sizes.diagonal().sqrt().view(-1, 1)
            shares = (255 * (in_cells(attention, picture.cell) / queries) ** GAMMA).numpy()
            np.testing.assert_allclose(picture.attention, shares, atol=0.51)
            whole, left = in_cells(attention, picture.cell), in_cells(attention * ~kept, picture.cell)
            seen = (whole > 1e-6).numpy()
            np.testing.assert_allclose(picture.dropped[seen], (255 * left / whole).numpy()[seen], atol=0.6)
            np.testing.assert_allclose(picture.kept, 255 * in_cells(kept.float(), picture.cell) / sizes, atol=0.51)
            np.testing.assert_allclose(picture.recall, (attention * kept).sum((1, 2)) / length, rtol=1e-4)
            x = layer(x)


def test_the_first_text_of_a_batch_is_pictured(probed):
    model, probe, plan = probed
    x = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(5))
    whole, alone = pictures_of(plan, probe, lambda: probe(x)), pictures(plan, model, x[:1])
    for one, other in zip(whole.sites, alone.sites, strict=True):
        np.testing.assert_allclose(one.recall, other.recall, rtol=1e-5)
        assert np.abs(one.attention.astype(int) - other.attention).max() <= 1 and np.array_equal(one.kept, other.kept)


def test_a_plan_for_a_site_that_is_not_there_is_an_error(probed):
    _, probe, plan = probed
    absent = replace(plan, sites=(*plan.sites, replace(plan.sites[0], address="layers.7")))
    with pytest.raises(InputError, match=r"^plan: pictures: the model did not reach 'layers.7', of which"):
        pictures_of(absent, probe, lambda: probe(torch.randn(1, 40, 16)))


def test_a_command_draws_the_page_and_the_png_beside_the_spec(tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=KV_HEADS, **sizes)).eval()
    plan = replace(made_up_plan(2, HEADS, KV_HEADS), lengths=(64, 128))
    given = plan, model, ["a text of some length, " * 20], of_bytes()
    drawn = draw_evidence(*given, tmp_path / "out.yaml")
    assert [path.name for path in drawn] == ["out.html", "out.png"] and all(path.is_file() for path in drawn)
    assert drawn[0].read_text().count('class="pic ') == 2 * HEADS and "facts are planted" in drawn[0].read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert draw_evidence(*given, tmp_path / "bare.yaml") == [tmp_path / "bare.html"]
    assert "bare.png: a PNG needs matplotlib" in capsys.readouterr().err.replace("\n", "")


def test_a_planned_spec_says_where_it_comes_from(tmp_path):
    plan = made_up_plan(2)
    plan.spec().save(tmp_path / "plan.yaml", origin(plan))
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    assert lines[:4] == [
        f"# Planned by sparsify {sparsify.__version__} for made/up-model <8B> (0123456789abcdef).",
        "# Budget: 25 % of dense time, on a machine, 2 threads; profiled at 1,024 and 2,048 tokens.",
        "# Validated: +0.017 bits per byte at 25 % of the cost.",
        "version: 1",
    ]
    assert load_spec(tmp_path / "plan.yaml") == plan.spec()
    assert "# Budget: loss +1%, on a machine" in "# " + origin(replace(plan, budget="loss +1%")).replace("\n", "\n# ")
