"""`verify`: the first call of each compiled graph compares the recovered masks with the model's own."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from captures import model

import sparsify
from sparsify import VerifyError
from sparsify.codegen.null import NullTarget
from sparsify.expr import Var
from sparsify.passes import recover_masks

B, H, N, D = 2, 3, 11, 8
Q, K, V = (torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(i)) for i in range(3))
OPTIONS = {"target": "null", "inner": "eager", "verify": True}


def verifying(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, backend="sparsify", options=OPTIONS, fullgraph=True, **kwargs)


@pytest.fixture
def wrong(monkeypatch):
    """Recovers every mask with one key too many after the query."""
    placed = recover_masks._place

    def place(site, rows):
        placed(site, rows)
        site.keep = recover_masks.substitute(site.keep, {"q": Var("q") + 1})

    monkeypatch.setattr(recover_masks, "_place", place)


SHAPES = [("llama", True), ("gemma2", True), ("bert", False), ("gpt2", False)]
OTHERS = [pytest.param(name, not dynamic, marks=pytest.mark.slow) for name, dynamic in SHAPES]


@pytest.mark.parametrize(("name", "dynamic"), SHAPES + OTHERS)
@torch.no_grad()
def test_models_verify(name, dynamic):
    made = model(name, "eager")
    ids = torch.randint(0, 64, (2, N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    run = verifying(made, dynamic=dynamic)
    found, wanted = (call(ids, attention_mask=mask)[0][mask.bool()] for call in (run, made))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_wrong_mask_is_named(wrong, dynamic):
    run = verifying(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    given = [t.clone() for t in (Q, K, V)]
    for tensor in given if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    with torch.no_grad():
        with pytest.raises(VerifyError) as caught:
            run(*given)
        run(*given)  # only the first call looks
    text = "'k <= q + 1' keeps the pair at (b, h, q, k) = (0, 0, 0, 1), the model's own drops the pair"
    assert str(caught.value) == f"verify: scaled_dot_product_attention: the recovered mask {text}"


@torch.no_grad()
def test_what_each_side_adds_is_said(wrong):
    def function(q, k, v, table):
        rows = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, torch.where(rows >= rows[:, None], table, -torch.inf))

    with pytest.raises(
        VerifyError, match=re.escape("drops the pair at (b, h, q, k) = (0, 0, 0, 0), the model's own keeps the pair")
    ):
        verifying(function)(Q, K, V, torch.zeros(N, N))


@torch.inference_mode()
def test_a_static_cache_is_not_written_to_twice():
    made = model("llama", "sdpa")
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(3))
    outputs = []
    for run in (made, verifying(made)):
        past = transformers.StaticCache(config=made.config, max_cache_len=16)
        outputs.append(torch.cat([run(part, past_key_values=past).logits for part in ids.split([4, 1, 1], 1)], 1))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_integers_that_are_no_mask_are_found():
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, (1.0 - mask[:, None, None, :].float()) * -1e9)

    run = verifying(function)
    with pytest.raises(VerifyError, match="the recovered mask"):
        run(Q, K, V, torch.full((B, N), 2))
    torch.testing.assert_close(
        run(Q, K, V, torch.ones(B, N, dtype=torch.long)), F.scaled_dot_product_attention(Q, K, V)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("given", [False, True], ids=["from positions", "from a tensor"])
@torch.no_grad()
def test_what_is_added_counts_as_numbers(dtype, given):
    def function(q, k, v, same):
        groups = torch.arange(N) // 4
        added = same if given else (groups == groups[:, None]).to(dtype)
        return torch.softmax(q @ k.mT + added, -1) @ v

    same = torch.randint(0, 2, (N, N), generator=torch.Generator().manual_seed(5)).to(dtype)
    torch.testing.assert_close(verifying(function)(Q, K, V, same), function(Q, K, V, same), atol=1e-5, rtol=1e-5)


def attention(q, k, v):
    rows = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, (rows > 2)[:, None] & (rows <= rows[:, None]))


@pytest.mark.parametrize("factor", [0.0, 1.05])
@torch.no_grad()
def test_a_wrong_output_is_named(monkeypatch, factor):
    run_right = NullTarget.run
    monkeypatch.setattr(NullTarget, "run", lambda self, launch: run_right(self, launch) * factor)
    with pytest.raises(VerifyError, match="scaled_dot_product_attention: the attention's output differs from"):
        verifying(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))(Q, K, V)


@torch.no_grad()
def test_rows_that_keep_nothing_and_what_a_spec_changes_are_no_difference():
    """The first three rows keep no key: the model gives NaN, we give 0."""
    found = verifying(attention)(Q, K, V)
    assert not found[:, :, :3].any()
    torch.testing.assert_close(found[:, :, 3:], attention(Q, K, V)[:, :, 3:], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    options = OPTIONS | {"spec": sparsify.Spec(sites=[{"heads": {"window": 2}}])}
    sparse = torch.compile(attention, backend="sparsify", options=options)(Q, K, V)
    assert (sparse - found)[:, :, 5:].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@torch.no_grad()
def test_positions_that_wrap_around(dtype):
    def difference(q):
        at = torch.arange(q.shape[2]).to(dtype)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=(at[:, None] - at < 10) | (at[:, None] == at))

    def product(q):
        at = torch.arange(q.shape[2], dtype=torch.int32) * 20_000_000
        return F.scaled_dot_product_attention(q, q, q, attn_mask=at[:, None] >= at)

    q = torch.randn(1, 2, 150, 8)
    for function in (difference, product):
        torch.testing.assert_close(verifying(function)(q), function(q), atol=1e-5, rtol=1e-5)
