"""Finding sites: many spellings of one attention come to one op, and the graph that is left has only what it needs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from captures import compiled, traced

import sparsify
from sparsify.passes.masks.describe_bias import describe_bias
from sparsify.passes.nodes import op
from sparsify.patterns import causal, window

B, H, N, D = 2, 4, 9, 8
Q, K, V = (torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(i)) for i in range(3))
FLAT = [t.transpose(1, 2).contiguous() for t in (Q, K, V)]  # (B, N, H, D)
FEW = [t[:, :2].contiguous() for t in (K, V)]
TRIL = torch.ones(N, N, dtype=torch.bool).tril()
BIAS = torch.randn(H, N, N, generator=torch.Generator().manual_seed(9))


def eager(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), dim=-1) @ v


def scaled_query(q, k, v):
    return F.softmax(torch.matmul(q * D**-0.5, k.mT), -1).matmul(v)


def scaled_by_a_tensor(q, k, v):
    scores = q @ k.mT / torch.sqrt(torch.tensor(float(D)))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def causal_fill(q, k, v):
    scores = (q @ k.mT) * D**-0.5
    return scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), float("-inf")).softmax(-1) @ v


def causal_fill_in_place(q, k, v):
    scores = q @ k.mT
    scores *= D**-0.5
    scores.masked_fill_(torch.ones(N, N, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    return F.dropout(scores.softmax(-1), 0.1, training=False) @ v


def causal_where(q, k, v):
    scores = q @ k.mT * D**-0.5
    i = torch.arange(N)
    return torch.where(i[None, :] <= i[:, None], scores, -torch.inf).softmax(-1) @ v


def minus_the_maximum(q, k, v):
    scores = q @ k.mT * D**-0.5
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def softcapped(q, k, v):
    scores = 5.0 * torch.tanh(q @ k.mT * D**-0.5 / 5.0)
    return scores.softmax(-1) @ v


def einsum_heads_last(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", *(t.transpose(1, 2) for t in (q, k)))
    return torch.einsum("bhqk,bkhd->bhqd", (scores * D**-0.5).softmax(-1), v.transpose(1, 2))


def batched_bmm(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return (torch.bmm(q, k.mT) * D**-0.5).softmax(-1).bmm(v).view(B, H, N, D)


def baddbmm(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(B * H, N, N), q, k.mT, beta=0, alpha=D**-0.5)
    return scores.softmax(-1).bmm(v).view(B, H, N, D)


@pytest.mark.parametrize(
    ("function", "mask", "softcap"),
    [
        (eager, "none", None),
        (scaled_query, "none", None),
        (scaled_by_a_tensor, "none", None),
        (causal_fill, "causal", None),
        (causal_fill_in_place, "causal", None),
        (causal_where, "causal", None),
        (minus_the_maximum, "none", None),
        (softcapped, "none", 5.0),
        (einsum_heads_last, "none", None),
        (batched_bmm, "none", None),
        (baddbmm, "none", None),
    ],
)
def test_each_spelling_is_one_op(function, mask, softcap):
    capture = traced(function, Q, K, V)
    (site,) = capture.sites
    assert (str(site.refusal), site.mask_text, site.softcap) == ("None", mask, softcap)
    left = {op(node) for node in capture.graph.nodes}
    assert not left & {"softmax", "matmul", "bmm", "baddbmm", "einsum", "masked_fill", "where", "tril", "arange"}


def test_before_and_after_a_causal_sdpa():
    """Before: sdpa(q, repeated k, repeated v, mask made of aranges). After: one op on the 2 KV heads."""

    def function(q, k, v):
        k, v = (t[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D) for t in (k, v))
        i = torch.arange(N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=i <= i[:, None])

    capture = traced(function, Q, *FEW)
    assert {op(node) for node in capture.graph.nodes} - {""} == {"sparsify::attention"}
    (node,) = (n for n in capture.graph.nodes if op(n) == "sparsify::attention")
    assert node.args[3:6] == ([], 0, D**-0.5)
    assert '"keep":["(q - k >= 0)"]' in node.args[6]


@pytest.mark.parametrize(
    "repeat",
    [
        lambda t: t.repeat_interleave(2, dim=1),
        lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
        lambda t: torch.repeat_interleave(t.transpose(1, 2), 2, 2).transpose(1, 2),
        lambda t: t.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(B, N, H, D).transpose(1, 2),
        lambda t: t.unsqueeze(2).expand(B, 2, 2, N, D).contiguous().view(B, H, N, D),
    ],
)
def test_repeated_heads_are_taken_back(repeat):
    for attention in (eager, F.scaled_dot_product_attention):
        capture = traced(lambda q, k, v, run=attention: run(q, repeat(k), repeat(v)), Q, *FEW)
        (site,) = capture.sites
        assert site.k.meta["val"].shape[1] == site.v.meta["val"].shape[1] == 2


def test_heads_that_are_tiled_are_left():
    """Head h reads KV head h % 2: not the order of a grouped kernel."""
    capture = traced(lambda q, k, v: eager(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), Q, *FEW)
    assert capture.sites[0].k.meta["val"].shape[1] == H


def test_one_key_head_for_all():
    capture = traced(lambda q, k, v: eager(q, k[:, :1].expand(B, H, N, D), v[:, :1].expand(B, H, N, D)), Q, K, V)
    assert capture.sites[0].k.meta["val"].shape[1] == 1


@pytest.mark.parametrize("attention", [eager, F.scaled_dot_product_attention])
@pytest.mark.parametrize("heads_first", [True, False])
def test_heads_of_queries_keys_and_values_in_one_tensor(heads_first, attention):
    """Cut along the heads, as OpenELM does: each part's are its own."""

    def function(x, weight):
        packed = F.linear(x, weight).unflatten(-1, (-1, D))
        packed = packed.transpose(1, 2) if heads_first else packed
        q, k, v = packed.split([H, 2, 2], 1 if heads_first else 2)
        q, k, v = (q, k, v) if heads_first else (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k.repeat_interleave(H // 2, 1), v.repeat_interleave(H // 2, 1))

    (site,) = traced(function, torch.randn(B, N, 16), torch.nn.Parameter(torch.randn((H + 4) * D, 16))).sites
    assert site.q.meta["val"].shape == (B, H, N, D) and site.k.meta["val"].shape == (B, 2, N, D)


def test_a_bias_becomes_a_term_beside_its_mask():
    def function(q, k, v, bias):
        scores = q @ k.mT * D**-0.5 + bias
        return scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v

    (site,) = traced(function, Q, K, V, BIAS).sites
    assert (site.mask_text, describe_bias(site.bias, site.load_names)) == ("causal", "bias[h, q, k]")


def test_a_bias_that_is_scaled_with_the_scores():
    (site,) = traced(lambda q, k, v, b: ((q @ k.mT + b) * D**-0.5).softmax(-1) @ v, Q, K, V, BIAS).sites
    assert site.mask_text == "none" and len(site.bias) == 1


def test_a_learned_temperature_goes_onto_the_queries():
    def function(q, k, v, t):
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * t).softmax(-1) @ v

    (site,) = traced(function, Q, K, V, torch.rand(H, 1, 1)).sites
    assert site.scale == 1.0


def test_three_dimensions_are_one_head():
    for function in (eager, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)):
        (site,) = traced(function, Q[:, 0], K[:, 0], V[:, 0]).sites
        assert site.refusal is None


def test_causal_flag_with_more_keys_than_queries():
    """SDPA's flag counts from the top left: k <= row, whatever the number of keys."""
    (site,) = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), Q[:, :, :4], K, V).sites
    assert (site.mask_text, site.q_offset) == ("causal", 0)


def test_multi_head_attention_module():
    layer = torch.nn.MultiheadAttention(H * D, H, batch_first=True).eval()
    x = torch.randn(B, N, H * D)
    (site,) = traced(lambda x: layer(x, x, x, need_weights=False, attn_mask=~TRIL, is_causal=True)[0], x).sites
    assert site.refusal is None


def test_cross_attention_is_told_from_self_attention():
    project = [torch.nn.Linear(H * D, H * D, bias=False) for _ in range(3)]

    def attend(x, y):
        q, k, v = (p(t).view(B, -1, H, D).transpose(1, 2) for p, t in zip(project, (x, y, y), strict=True))
        return F.scaled_dot_product_attention(q, k, v)

    x, y = torch.randn(B, N, H * D), torch.randn(B, N, H * D)
    capture = traced(lambda x, y: attend(x, x) + attend(x, y), x, y)
    assert [site.kind for site in capture.sites] == ["self", "cross"]


def early_copy(q, k, v):
    repeated = k.repeat_interleave(2, dim=1)
    k.add_(1)
    return F.scaled_dot_product_attention(q, repeated, v.repeat_interleave(2, dim=1))


def sliced_scores(q, k, v):
    scores = q @ k.repeat_interleave(2, dim=1).mT
    scores[..., 3:] = -torch.inf
    return scores.softmax(-1) @ v.repeat_interleave(2, dim=1)


@pytest.mark.parametrize("function", [early_copy, sliced_scores])
def test_a_write_in_between_is_refused(function):
    given = [t.clone() for t in (Q, *FEW)]
    with torch.no_grad():
        run, recorded = compiled(function)
        torch.testing.assert_close(run(*given), function(*(t.clone() for t in (Q, *FEW))))
    (site,) = recorded.sites
    assert "is changed in place by" in site.refusal.reason


def test_a_write_to_the_graphs_own_copy_is_followed():
    def function(q, k, v):
        k = k.clone()
        repeated = k.repeat_interleave(2, dim=1)
        k.add_(1)
        return F.scaled_dot_product_attention(q, repeated, v.repeat_interleave(2, dim=1)) + k.mean()

    assert traced(function, Q, *FEW).sites[0].refusal is None


def test_autocast_decides_the_dtype():
    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return eager(q, k, v)

    with torch.no_grad():
        run, recorded = compiled(function)
        found = run(Q, K, V)
    assert found.dtype == function(Q, K, V).dtype
    torch.testing.assert_close(found.float(), eager(Q, K, V), atol=3e-2, rtol=3e-2)
    assert recorded.sites[0].refusal is None


def test_our_own_op_stays(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    capture = traced(lambda q, k, v: sparsify.attention(q, k, v, window(3) & causal()) + eager(q, k, v), Q, K, V)
    assert len(capture.sites) == 1
    assert sum(op(node) == "sparsify::attention" for node in capture.graph.nodes) == 2


def test_without_a_re_trace_sdpa_is_still_found(monkeypatch):
    from sparsify.passes import canonicalise

    def refuse(*_):
        raise NotImplementedError("no")

    monkeypatch.setattr(canonicalise, "retrace", refuse)
    capture = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).relu(), Q, K, V)
    assert [str(site.refusal) for site in capture.sites] == ["None"]
    (note,) = capture.notes
    assert note == "the graph could not be re-traced (NotImplementedError: no); only its SDPA calls are matched"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_without_a_re_trace_masks_are_read_as_they_are(monkeypatch, dtype):
    from sparsify.passes import canonicalise

    def refuse(*_):
        raise NotImplementedError("no")

    def function(q, k, v):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        mask = mask if dtype == torch.bool else torch.zeros(N, N).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * 2

    monkeypatch.setattr(canonicalise, "retrace", refuse)
    run, recorded = compiled(function)
    with torch.no_grad():
        torch.testing.assert_close(run(Q, K, V), function(Q, K, V), atol=1e-5, rtol=1e-5)
    assert [site.refusal for site in recorded.sites] == [None]


def test_every_pass_says_what_it_does_and_runs():
    from sparsify.passes import pipeline

    for step in pipeline():
        assert "Before:" in type(step).__doc__ and "After:" in type(step).__doc__, type(step)
    capture = traced(eager, Q, K, V)
    assert [record.name for record in capture.records] == [type(step).__name__ for step in pipeline()]


def test_heads_that_are_split_between_the_scores_and_the_softmax():
    """As Bloom does it: a bias of all heads in baddbmm, the mask added after the split."""

    def function(q, k, v, bias):
        q, k, v = (t.reshape(B * H, N, D) for t in (q * 1, k * 1, v * 1))
        scores = torch.baddbmm(bias, q, k.mT, beta=1.0, alpha=D**-0.5).view(B, H, N, N)
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
        return scores.softmax(-1).view(B * H, N, N).bmm(v).view(B, H, N, D)

    (site,) = traced(function, Q, K, V, torch.randn(B * H, 1, N)).sites
    assert (site.mask_text, site.q.meta["val"].shape[1]) == ("causal", H)


def test_sinks_beside_the_scores():
    """As GPT-OSS does it: one more column in the softmax, cut off again."""

    def function(q, k, v, sink):
        scores = torch.cat([q @ k.mT * D**-0.5, sink.expand(B, H, N, 1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v

    (site,) = traced(function, Q, K, V, torch.randn(H, 1, 1)).sites
    assert site.sink.meta["val"].shape[-3:] == (H, 1, 1) and "cat" in site.form
