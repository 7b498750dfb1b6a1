"""`sparsify.attention`: right against the oracle on the null target, under torch.compile, and clear about bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BIASES, SINKS, composed, shapes, term

import sparsify
from sparsify.codegen.oracle import oracle
from sparsify.codegen.target import Launch
from sparsify.errors import InputError
from sparsify.patterns import causal, dense, sinks, window
from sparsify.program import Program


@pytest.fixture(autouse=True)
def null_target(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@settings(max_examples=25)
@given(composed(), composed(), shapes, st.sampled_from([None, "bool", "add"]), st.sampled_from([3, 16]))
def test_the_null_target_is_dense_attention_under_the_mask(one, other, shape, kind, head_dim):
    (q_len, k_len, q_offset), rules = shape, [one[0], other[0]] * 2
    q, k, v = draw(2, 4, q_len, head_dim), draw(2, 2, k_len, head_dim), draw(2, 2, k_len, head_dim)
    mask = {None: None, "bool": draw(2, 1, q_len, k_len) > 0, "add": draw(4, q_len, k_len)}[kind]
    found = sparsify.attention(q, k, v, rules, mask=mask, q_offset=q_offset)
    offset = k_len - q_len if q_offset is None else q_offset
    kept = torch.cat([rule.mask(4, q_len, k_len, offset)[h : h + 1] for h, rule in enumerate(rules)])
    scores = q.double() @ k.repeat_interleave(2, 1).double().mT * head_dim**-0.5
    scores = scores + mask if kind == "add" else scores
    scores = scores.masked_fill(~(kept & mask if kind == "bool" else kept), -torch.inf)
    truth = torch.softmax(scores, -1).nan_to_num(nan=0.0) @ v.repeat_interleave(2, 1).double()
    torch.testing.assert_close(found.double(), truth, atol=1e-6, rtol=1e-6)


@settings(max_examples=40)
@given(composed(), st.integers(1, 50), st.integers(1, 70), st.sampled_from([*BIASES]), st.sampled_from([*SINKS]))
def test_the_null_target_adds_biases_and_sinks(rule, q_len, k_len, bias, sink):
    q, k, v = draw(2, 4, q_len, 8), draw(2, 2, k_len, 8), draw(2, 2, k_len, 8)
    loads = (draw(4), draw(4, q_len + k_len), draw(2, k_len), draw(2, 4, q_len, k_len))
    loads[3][:, :, :, ::3] = -torch.inf
    program = Program.of([rule[0].keep()] * 4, loads=4, bias=BIASES[bias], sink=SINKS[sink], target="null")
    assert Program.parse(program.text()) == program
    launch = Launch(program, q, k, v, loads, 0, 0.3)
    found = torch.ops.sparsify.attention(q, k, v, list(loads), 0, 0.3, program.text())
    torch.testing.assert_close(found.double(), oracle(launch), atol=1e-6, rtol=1e-6)


def test_biases_and_sinks_by_hand():
    q, k, v, slopes, sinks_ = draw(1, 2, 9, 4), draw(1, 2, 9, 4), draw(1, 2, 9, 4), draw(2), draw(3)[:2]
    program = Program.of([causal().keep()] * 2, loads=2, bias=BIASES["alibi"], sink=(term(loads="_1[h]"),))
    launch = Launch(program, q, k, v, (slopes, sinks_), 0, 0.5)
    at = torch.arange(9)
    scores = q @ k.mT * 0.5 + slopes[:, None, None] * (at - at[:, None])
    scores = torch.cat(
        [scores.masked_fill(at > at[:, None], -torch.inf), sinks_.view(1, 2, 1, 1).expand(1, 2, 9, 1)], -1
    )
    expected = torch.softmax(scores, -1)[..., :9] @ v
    torch.testing.assert_close(oracle(launch).float(), expected)


def test_it_is_scaled_dot_product_attention_where_nothing_is_sparse():
    q, k, v = draw(2, 4, 33, 16), draw(2, 4, 33, 16), draw(2, 4, 33, 16)
    torch.testing.assert_close(sparsify.attention(q, k, v, dense()), F.scaled_dot_product_attention(q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(sparsify.attention(q, k, v, causal(), scale=0.3), expected)


def test_a_row_that_keeps_nothing_is_zero():
    q = draw(1, 2, 8, 4)
    out = sparsify.attention(q, q, q, sinks(4) & ~causal())
    assert torch.equal(out[:, :, 3:], torch.zeros_like(out[:, :, 3:])) and out[:, :, :3].abs().min() > 0


def test_the_output_is_laid_out_for_the_transpose_that_follows():
    out = sparsify.attention(draw(2, 4, 9, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8), causal())
    assert out.transpose(1, 2).is_contiguous()


def test_the_op_keeps_torch_library_rules():
    q, k, v = draw(2, 4, 9, 8), draw(2, 2, 12, 8), draw(2, 2, 12, 8)
    program = Program.of([causal().keep()] * 2 + [window("N/4 + 1").keep()] * 2, target="null")
    torch.library.opcheck(torch.ops.sparsify.attention.default, (q, k, v, [], 3, 0.25, program.text()))


def test_a_program_survives_its_text():
    program = Program.of([causal().keep(), window("N/8 + 1").keep(), causal().keep()], loads=2, softcap=50.0)
    assert Program.parse(program.text()) == program
    assert program.heads == (0, 1, 0) and program.size_values(64) == [9]


q4 = draw(1, 4, 8, 16)
kv2 = draw(1, 2, 8, 16)
BAD = [
    (lambda: sparsify.attention(q4[0], kv2, kv2, causal()), "q: expected (batch, heads, length, head size), found the"),
    (
        lambda: sparsify.attention(q4.double(), kv2, kv2, causal()),
        "q: expected float32, bfloat16 or float16, found torch",
    ),
    (lambda: sparsify.attention(q4.half(), kv2, kv2, causal()), "q, k and v must have one dtype, found torch.float16"),
    (lambda: sparsify.attention(q4[:, :3], kv2, kv2, causal()), "the 3 query heads must be a multiple of the 2 key"),
    (lambda: sparsify.attention(q4, kv2, kv2[:, :, :5], causal()), "length: k and v must agree, found 8 and 5"),
    (lambda: sparsify.attention(q4, kv2[..., :7], kv2, causal()), "head size: q and k must agree, found 16 and 7"),
    (lambda: sparsify.attention(q4.numpy(), kv2, kv2, causal()), "q: expected a tensor, found ndarray"),
    (
        lambda: sparsify.attention(q4.to_sparse(), kv2, kv2, causal()),
        "q: expected a strided tensor, found the layout torch.sparse_coo; give q.to_dense()",
    ),
    (
        lambda: sparsify.attention(q4, kv2, kv2, causal(), mask=torch.ones(8, 8).to_sparse()),
        "mask: expected a strided tensor, found the layout torch.sparse_coo; give mask.to_dense()",
    ),
    (lambda: sparsify.attention(q4, kv2, kv2, causal), "(write causal(), with brackets)"),
    (lambda: sparsify.attention(q4, kv2, kv2, causal(), mask=[[True]]), "mask: expected a tensor, found list"),
    (
        lambda: sparsify.attention(q4, kv2, kv2, causal(), scale=float("nan")),
        "scale: expected a finite number, found nan",
    ),
    (lambda: sparsify.attention(q4, kv2, kv2, causal(), scale="1"), "scale: expected a number, found '1'"),
    (lambda: sparsify.attention(q4, kv2, kv2, causal(), q_offset=1.5), "q_offset: expected an integer, found 1.5"),
    (lambda: sparsify.attention(q4, kv2, kv2, causal(), q_offset=2**70), "q_offset: expected at most 2**40 in size"),
    (lambda: sparsify.attention(q4, kv2, kv2, [causal()] * 3), "one for each of 4 heads, found 3 patterns"),
    (lambda: sparsify.attention(q4, kv2, kv2, "causal"), "expected one pattern, or one a head, found 'causal'"),
    (
        lambda: sparsify.attention(q4, kv2, kv2, causal(), mask=torch.ones(8, 7)),
        "mask: expected a shape that broadcasts to",
    ),
    (
        lambda: sparsify.attention(q4, kv2, kv2, causal(), mask=torch.ones(8, 8).int()),
        "mask: expected bool or floating",
    ),
    (lambda: sparsify.attention(q4.clone().requires_grad_(), kv2, kv2, causal()), "gradients are not supported yet"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_told_clearly(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("attention: ")


def test_an_unknown_target_names_the_nearest(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "cppp")
    with pytest.raises(InputError, match=r"SPARSIFY_TARGET: found 'cppp'; did you mean 'cpp'\?"):
        sparsify.attention(q4, kv2, kv2, causal())
