"""What the tests of the C++ target share: launches on poisoned tensors, and how far a kernel may be off."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from sparsify import bias
from sparsify.codegen import Launch, target
from sparsify.codegen.cpp import launch as launching
from sparsify.codegen.oracle import environment, kept, oracle_lse
from sparsify.codegen.slots import gathered, scattered, tokens
from sparsify.runtime import toolchain as tools

CPP = target("cpp")

ISAS = ["avx512", "avx2", "portable"]
BEST = tools.machine_isa().name
BEST_ALONE = [pytest.param(isa, marks=() if isa == BEST else pytest.mark.slow) for isa in ISAS]
OTHERS_ALONE = [pytest.param(isa, marks=pytest.mark.slow if isa == BEST else ()) for isa in ISAS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Forces each instruction set that this machine has."""
    if not tools.ISAS[request.param].needs <= tools.cpu_features():
        pytest.skip(f"this machine doesn't run {request.param}")
    monkeypatch.setenv("SPARSIFY_ISA", request.param)
    return request.param


@pytest.fixture
def bf16_pairs(monkeypatch):
    """Kernels that keep bf16 in pairs, by their own code where the machine has no products of such pairs."""
    best = tools.machine_isa()
    paired = best if best.bf16_dot else replace(best, name=f"{best.name}_pairs", bf16_dot=True)
    monkeypatch.setattr(launching.runtime, "machine_isa", lambda: paired)
    monkeypatch.setattr(launching, "_BUILT", {})


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """New tensors are full of NaN, so an output element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensor(generator, dtype, *shape):
    """Normal numbers in a tensor with odd strides: a slice of a larger, transposed one, whose rest is NaN."""
    b, h, n, d = shape
    large = torch.full((b, n + 1, h, d + 3), torch.nan, dtype=dtype)
    part = large[:, :n, :, 1 : d + 1].transpose(1, 2)
    part.copy_(torch.randn(shape, generator=generator))
    return part


def launch(program, shape, dtype, head=(16, 16), *, loads=(), offset=None, scale=None, seed=0):
    """A launch on drawn tensors; shape is (batch, query heads per KV head, queries, keys)."""
    batch, group, q_len, k_len = shape
    generator = torch.Generator().manual_seed(seed)
    heads = len(program.heads)
    q = tensor(generator, dtype, batch, heads, q_len, head[0])
    k = tensor(generator, dtype, batch, heads // group, k_len, head[0])
    v = tensor(generator, dtype, batch, heads // group, k_len, head[1])
    offset = k_len - q_len if offset is None else offset
    return Launch(program, q, k, v, tuple(loads), offset, head[0] ** -0.5 if scale is None else scale)


def reference(call):
    """What PyTorch itself computes in the same dtype with the same mask, as plain operations where SDPA has none."""
    group = call.q.shape[1] // call.k.shape[1]
    q, k, v = call.q, *(t.repeat_interleave(group, dim=1) for t in (call.k, call.v))
    env, queries, keys = environment(call), call.program.queries, call.program.keys
    if queries is not None:
        q = gathered(q, *tokens(queries, "q", q.shape[2], env))
    if keys is not None:
        k, v = (gathered(t, *tokens(keys, "k", k.shape[2], env)) for t in (k, v))
    out = _attended(call, q, k, v).nan_to_num(nan=0.0)
    return out if queries is None else scattered(out, *tokens(queries, "q", call.q.shape[2], env), call.q.shape[2])


def _attended(call, q, k, v):
    """The same of rows by slot."""
    terms, low = bias.evaluate(call.program.bias, environment(call)), torch.finfo(q.dtype).min
    add = torch.where(terms.isinf(), terms, terms.clamp(low, -low)).to(q.dtype)
    add = add.masked_fill(~kept(call), -torch.inf)
    cap, sink = call.program.softcap, call.program.sink
    if cap is None and sink is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=add, scale=call.scale)
    scores = q @ k.mT * call.scale
    scores = (scores if cap is None else torch.tanh(scores / cap) * cap) + add
    if sink is not None:
        logit = bias.evaluate(sink, environment(call)).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit.to(scores.dtype)], -1)
    return torch.softmax(scores, -1)[..., : v.shape[2]] @ v


def check(call):
    """The kernel's error is at most twice PyTorch's own, and what keeps nothing is exactly 0; so with an lse.

    Both are the largest of few numbers, and where they lie is chance: of hundreds of small cases, float32's are up to
    7 units in the last place of the largest output, mostly 1.4, on different cases. So a few units are free.
    """
    lse = torch.full(call.q.shape[:3], torch.nan)
    found, (truth, expected) = CPP.run(replace(call, lse=lse)), oracle_lse(call)
    assert torch.equal(found, CPP.run(call))
    check_lse(lse, expected, call)
    assert found.shape == truth.shape and found.dtype == call.q.dtype
    assert found.stride() == call.empty_output().stride()
    if not truth.numel():
        return
    own = (reference(call).double() - truth).abs().max().item()
    units = torch.finfo(call.q.dtype).eps + 5 * torch.finfo(torch.float32).eps
    floor = units * truth.abs().max().item()
    assert (found.double() - truth).abs().max().item() <= 2 * own + floor
    nothing = ~kept_pairs(call).any(-1)
    if call.program.queries is not None:  # then tokens that no slot holds keep nothing, too
        where = tokens(call.program.queries, "q", call.q.shape[2], environment(call))
        nothing = scattered(~nothing[..., None] * 1.0, *where, call.q.shape[2])[..., 0] == 0
    assert (found[nothing] == 0).all()


# Kernels multiply in float32, whatever they read, and take exp2 as exactly as their dtype's weights need.
LSE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def check_lse(found, expected, call):
    """An lse is right to what its dtype's kernels owe; biases near a dtype's lowest value may be as if infinite."""
    low = expected < -1e30
    assert (found[low] < -1e30).all() and torch.equal(found == -torch.inf, expected == -torch.inf)
    error = LSE_ERROR[call.q.dtype]
    torch.testing.assert_close(found[~low].double(), expected[~low], atol=error, rtol=error)


def kept_pairs(call):
    """Which pairs have a weight: kept by the rule and by the bias."""
    return kept(call) & (bias.evaluate(call.program.bias, environment(call)) != -torch.inf)


SHAPES = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2]), st.one_of(st.integers(1, 9), st.integers(90, 300)), st.integers(1, 400)
)
DRAWN = settings(  # the draws are small already, and shrinking would build kernels
    max_examples=8, database=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)

FEW = settings(DRAWN, max_examples=4)
