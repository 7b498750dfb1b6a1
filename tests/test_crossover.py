"""Which sites are left to Inductor: the option, the variable, symbolic sizes, specs, strict and the report."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsify
from sparsify import backend
from sparsify.errors import InputError
from sparsify.options import Options

SMALL, LARGE = (1, 2, 9, 16), (1, 4, 700, 32)
WINDOW = {"version": 1, "sites": [{"match": "*", "heads": {"window": 4}}]}
DENSE = {"version": 1, "sites": [{"match": "*", "heads": "dense"}]}


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def captured(sizes, dynamic=False, k_len=None, dtype=torch.float32, kv_heads=None, **options):
    """The sites of one causal attention, and how many nodes of ours are in the graph."""
    found = []

    def record(gm, inputs):
        found.append(backend.captured(gm, inputs, Options.read({"crossover": True, "target": "cpp", **options})))
        return gm.forward

    batch, heads, q_len, size = sizes
    square = k_len is None

    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, enable_gqa=True)

    torch._dynamo.reset()
    q = torch.randn(sizes, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads or heads, k_len or q_len, size, dtype=dtype)
    for tensor in (q, k, v) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    with torch.no_grad():
        torch.compile(run, backend=record)(q, k, v)
    (capture,) = found
    ours = [node for node in capture.graph.nodes if "sparsify" in str(node.target)]
    return capture.sites[0], len(ours)


def test_small_sites_stay_dense_and_large_ones_are_rewritten():
    site, ours = captured(SMALL)
    assert site.dense.startswith("dense is faster for 9 queries over 9 keys") and ours == 0 and site.refusal is None
    site, ours = captured(LARGE)
    assert not site.dense and ours == 1


def test_a_decode_step_is_rewritten_where_heads_share_keys_or_a_window_leaves_few():
    one = (1, 8, 1, 64)
    assert captured(one, k_len=4096)[0].dense.startswith("dense is as fast for a decode step over 4096 keys")
    assert not captured((1, 8, 1, 128), k_len=4096, kv_heads=2)[0].dense
    assert not captured(one, k_len=4096, dtype=torch.bfloat16)[0].dense


def test_symbolic_sizes_are_taken_for_large_ones():
    site, ours = captured((2, 2, 9, 16), dynamic=True)
    assert not isinstance(site.q.meta["val"].shape[2], int) and not site.dense and ours == 1


def test_a_spec_decides_where_it_gives_a_pattern():
    assert captured(SMALL, spec=WINDOW)[1] == 1
    assert captured(SMALL, spec=DENSE)[0].dense


def test_it_can_be_switched_off(monkeypatch):
    assert captured(SMALL, crossover=False)[1] == 1
    assert not Options.read({}).crossover
    monkeypatch.setenv("SPARSIFY_CROSSOVER", "1")
    assert Options.read({}).crossover
    monkeypatch.setenv("SPARSIFY_CROSSOVER", "no")
    with pytest.raises(InputError, match="environment variable SPARSIFY_CROSSOVER: found 'no'; allowed: 0, 1"):
        Options.read({})


@torch.no_grad()
def test_it_is_no_refusal_and_the_report_says_why(monkeypatch):
    monkeypatch.setenv("SPARSIFY_CROSSOVER", "1")
    q, k, v = torch.randn(3, *SMALL)
    torch._dynamo.reset()
    run = torch.compile(attend, backend="sparsify", options={"strict": True, "inner": "eager"})
    assert torch.equal(run(q, k, v), attend(q, k, v))
    report = sparsify.explain(attend, q, k, v)
    assert not report.refused and not report.rewritten and report.sites[0].target == ""
    assert "dense (Inductor)" in str(report) and "dense is faster for 9 queries" in str(report)
    assert report.to_dict()["sites"][0]["dense"] == report.sites[0].dense


def test_masks_by_the_batch_and_empty_tensors_are_decided_too():
    def by_batch(q: torch.Tensor) -> torch.Tensor:
        limit = torch.arange(q.shape[0]) + 1
        keep = torch.arange(q.shape[2]) < limit[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep[:, None, None])

    def none(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, :0], q, q)

    q = torch.randn(8, 4, 512, 64)
    for function in (by_batch, none):
        torch._dynamo.reset()
        options = {"strict": True, "inner": "eager", "crossover": True}
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(function, backend="sparsify", options=options)(q), function(q))
