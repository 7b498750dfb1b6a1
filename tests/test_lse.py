"""The lse of attention: by hand, as what merges attention over parts of the keys, and where there are no keys.

The targets' own numbers are checked with their outputs: `test_lists.py`, `cpp_checks.py`, `triton_cases.py`.
"""

from __future__ import annotations

import pytest
import torch
from strategies import term

import sparsify
from sparsify.codegen import Launch, target
from sparsify.codegen.oracle import oracle_lse
from sparsify.codegen.target import empty_lse
from sparsify.patterns import causal, sinks, window
from sparsify.program import Program

STREAMING = (sinks(3) | window(20)) & causal()


@pytest.fixture(params=["null", "cpp"], autouse=True)
def name(request, monkeypatch):
    refusal = target(request.param).unavailable()
    if refusal is not None:
        pytest.skip(str(refusal))
    monkeypatch.setenv("SPARSIFY_TARGET", request.param)
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def inputs(q_len: int = 33, k_len: int = 70, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(draw(1, h, n, 16, dtype=dtype) for h, n in ((4, q_len), (2, k_len), (2, k_len)))


@pytest.mark.parametrize("kind", ["none", "bool", "add"])
def test_it_is_the_logarithm_of_the_sum_of_weights(kind):
    q, k, v = inputs()
    mask = {"none": None, "bool": draw(1, 1, 33, 70) > 0, "add": draw(4, 33, 70)}[kind]
    out, lse = sparsify.attention(q, k, v, STREAMING, mask=mask, scale=0.3, return_lse=True)
    scores = q.double() @ k.repeat_interleave(2, 1).double().mT * 0.3
    scores = scores + mask if kind == "add" else scores
    kept = STREAMING.mask(4, 33, 70) & (mask if kind == "bool" else True)
    expected = scores.masked_fill(~kept, -torch.inf).logsumexp(-1)
    assert lse.dtype == torch.float32 and lse.shape == (1, 4, 33)
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out, sparsify.attention(q, k, v, STREAMING, mask=mask, scale=0.3))


@pytest.mark.parametrize(("q_len", "dtype"), [(1, torch.float32), (33, torch.float32), (33, torch.bfloat16)], ids=str)
def test_two_halves_merge_to_the_whole(q_len, dtype):
    q, k, v = inputs(q_len, dtype=dtype)
    first = (torch.arange(70) < 40).expand(1, 1, q_len, 70)
    masks = (first, ~first, torch.ones_like(first))
    found = [sparsify.attention(q, k, v, STREAMING, mask=mask, return_lse=True) for mask in masks]
    (left, one), (right, other), (whole, lse) = found
    share = torch.sigmoid(one - other)[..., None]
    error = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close((left * share + right * (1 - share)).to(dtype), whole, atol=error, rtol=error)
    torch.testing.assert_close(torch.logaddexp(one, other), lse, atol=error, rtol=error)


def test_a_row_without_keys_is_minus_infinity():
    q, k, v = inputs(8, 8)
    out, lse = sparsify.attention(q, k, v, sinks(4) & ~causal(), return_lse=True)
    assert (lse[:, :, 3:] == -torch.inf).all() and (out[:, :, 3:] == 0).all() and lse[:, :, :3].isfinite().all()
    out, lse = sparsify.attention(q, k[:, :, :0], v[:, :, :0], causal(), q_offset=0, return_lse=True)
    assert (lse == -torch.inf).all() and (out == 0).all()


@pytest.mark.parametrize("k_len", [9, 0])
def test_sinks_and_caps_count(name, k_len):
    q, k, v, logits = draw(1, 2, 9, 4), draw(1, 2, k_len, 4), draw(1, 2, k_len, 4), draw(3)[:2]
    program = Program.of([causal().keep()] * 2, loads=1, softcap=2.0, sink=(term(loads="_0[h]"),), target=name)
    launch = Launch(program, q, k, v, (logits,), 0, 0.5, empty_lse(q))
    target(name).run(launch)
    scores = 2 * torch.tanh(q @ k.mT * 0.5 / 2)
    scores = scores.masked_fill(torch.arange(k_len) > torch.arange(9)[:, None], -torch.inf)
    expected = torch.cat([scores, logits.view(1, 2, 1, 1).expand(1, 2, 9, 1)], -1).logsumexp(-1)
    torch.testing.assert_close(launch.lse, expected)
    torch.testing.assert_close(oracle_lse(launch)[1].float(), expected)


def test_it_compiles_to_one_graph_with_one_op():
    q, k, v = inputs()
    found = []

    def backend(module, _):
        found.append([str(node.target) for node in module.graph.nodes if "sparsify" in str(node.target)])
        return module.forward

    def attend(q, k, v):
        out, lse = sparsify.attention(q, k, v, STREAMING, return_lse=True)
        return out * 2, lse + 1

    torch._dynamo.reset()
    out, lse = torch.compile(attend, backend=backend, fullgraph=True)(q, k, v)
    expected = attend(q, k, v)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert found == [["sparsify.attention_lse.default"]]


def test_the_op_keeps_torch_library_rules(name):
    q, k, v = inputs(9, 12)
    program = Program.of([causal().keep()] * 4, target=name)
    torch.library.opcheck(torch.ops.sparsify.attention_lse.default, (q, k, v, [], 3, 0.25, program.text()))
