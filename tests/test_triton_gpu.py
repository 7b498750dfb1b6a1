"""The Triton target on a real GPU: `pytest -m gpu` runs there what `test_triton.py` runs in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'sparsify[triton]')")

from list_cases import ListCase
from triton_cases import CASES, DTYPES, FLOOR, LSE_ERROR, C, Case, errors
from triton_list_cases import Made

from sparsify import patterns as p

pytestmark = pytest.mark.gpu

MIXTURE = (C, p.window(300), (p.sinks(4) | p.window("N/8 + 300")) & C, p.dense())
LARGE = [
    Case(f"large_d{size}", MIXTURE, heads=(8, 4), lengths=(1000, 1333), sizes=(size, size), batch=2, dtype=dtype)
    for size in (64, 80, 128, 256)
    for dtype in DTYPES
]


@pytest.fixture(scope="module")
def device() -> str:
    from sparsify.codegen.triton.kernels import interpreting

    if not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    if interpreting():
        pytest.skip("TRITON_INTERPRET=1 is set: unset it to run on the GPU")
    return "cuda"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}")
def test_at_most_twice_the_error_of_pytorch(device: str, case: Case | Made):
    ours, theirs, lse = errors(case, device)
    assert ours <= 2 * theirs + FLOOR[case.dtype] and lse <= LSE_ERROR


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.name}-{case.dtype}")
def test_many_tiles(device: str, case: Case):
    ours, theirs, lse = errors(replace(case, pattern=case.pattern * 2), device)
    assert ours <= 2 * theirs + FLOOR[case.dtype] and lse <= LSE_ERROR


LISTED = [
    Made(f"{case.name} d{size}", partial(replace(case, size=size, dtype=dtype, heads=(8, 2)).launch, "triton"), dtype)
    for case in (
        ListCase("streaming", 64, 64, lengths=(1000, 1333)),
        ListCase("causal", 128, 128, "head", lengths=(1000, 1333)),
        ListCase("padded", 16, lengths=(1, 3333)),
        ListCase("causal", 1, lengths=(4, 3333)),
        ListCase("causal", 64, 1, lengths=(100, 1333)),
    )
    for size in (64, 128)
    for dtype in DTYPES
]


@pytest.mark.parametrize("case", LISTED, ids=lambda case: f"{case.name}-{case.dtype}")
def test_many_listed_tiles(device: str, case: Made):
    ours, theirs, lse = errors(case, device)
    assert ours <= 2 * theirs + FLOOR[case.dtype] and lse <= LSE_ERROR


def test_boxes_with_more_key_tiles_than_are_asked_at_once(device: str):
    from sparsify.functional import attention

    near = p.neighborhood([70, 70], [67, 9])
    q, k, v = (torch.randn(1, 2, 4900, 64, device=device) for _ in "qkv")
    keep, scores = near.mask(2, 4900, 4900).to(device), q.double() @ k.double().mT * 64**-0.5
    expected = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1) @ v.double()
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = attention(*(t.to(dtype) for t in (q, k, v)), near)
        assert (found.double() - expected).abs().max() < bound


TUNED = {
    "streaming": ((p.sinks(4) | p.window(256)) & C, 1333),
    "mixture": (MIXTURE, 1000),
    "neighborhood": (p.neighborhood([32, 40], 9), 1280),
}


@pytest.mark.parametrize("name", TUNED)
def test_candidates_are_checked_and_timed(device: str, name: str, tmp_path, monkeypatch):
    from sparsify.codegen import target
    from sparsify.functional import attention
    from sparsify.tuner.runner import Runner

    rules, length = TUNED[name]
    triton, here = target("triton"), Runner()
    here.truths, here.launches = [], []
    run = type(triton).run
    monkeypatch.setattr(
        type(triton), "run", lambda self, launch, *given: here.launches.append(launch) or run(self, launch, *given)
    )
    q, k, v = (torch.randn(1, heads, length, 64, device=device, dtype=torch.bfloat16) for heads in (4, 4, 4))
    attention(q, k, v, rules)
    monkeypatch.undo()
    error, bound = here.check({"num_stages": 2})
    assert here.launches and 0 < error <= bound
    race = here.race({"num_stages": 2}, {}, 5, 1.0)
    assert len(race.challenger) == len(race.incumbent) == 5
    assert all(0 < one < 0.1 for one in race.challenger + race.incumbent)
