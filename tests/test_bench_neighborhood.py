"""`sparsify bench --neighborhood`: which cases there are, and what a model's site gives to measure."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sparsify.bench import sites
from sparsify.bench.cases import GRIDS, NEIGHBORHOODS
from sparsify.bench.peers import MASKED, Inputs, peers_of
from sparsify.errors import InputError
from sparsify.patterns import global_tokens, neighborhood
from sparsify.patterns.grid import grids


def test_cases_go_by_name() -> None:
    assert [case.pattern for case in NEIGHBORHOODS] == list(GRIDS)
    assert len(sites.named(None)) == len(GRIDS) + len(sites.MODELS)
    with pytest.raises(InputError, match="unknown case 'Wann'; did you mean 'Wan'"):
        sites.named(["Wann"])


def test_every_case_is_of_its_grids_length_and_bidirectional() -> None:
    for case in NEIGHBORHOODS:
        assert not case.causal and all(rule.fits(case.length) == "" for rule in case.rules)
        there = {"mask": case.length <= MASKED, "natten": importlib.util.find_spec("natten") is not None}
        assert list(peers_of(case)) == [
            name for name in ("sparsify", "dense", "mask", "flex", "natten") if there.get(name, True)
        ]
    for site in sites.MODELS.values():
        grid = grids(site.pattern)[0]
        assert site.pattern.fits(grid.start + grid.tokens) == ""


def test_a_site_is_measured_on_the_models_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = neighborhood([8, 8], 3, start=1) | global_tokens(0)

    class Tiny(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(attend(x, x + 1, x + 2), x[:, :, :5], x[:, :, :5])

    monkeypatch.setitem(
        sites.MODELS, "tiny", sites.ModelSite(lambda: (Tiny(), {"x": torch.randn(1, 2, 65, 8)}), pattern)
    )
    found = sites.inputs_of("tiny", "cpu")
    assert isinstance(found, Inputs) and found.case.rules == (pattern,) * 2 and found.case.length == 65
    assert torch.equal(found.k, found.q + 1) and torch.equal(found.v, found.q + 2)
