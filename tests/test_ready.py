"""Calls that are ready to be made again without Python: they give what was given before, and nothing that is stale."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import torch
from cpp_checks import CPP
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsify
from sparsify import errors, op, runtime
from sparsify import patterns as P
from sparsify.codegen import Launch
from sparsify.codegen.cpp import launch as launching
from sparsify.codegen.cpp import ready as holder
from sparsify.functional_plan import plan
from sparsify.patterns import Pattern
from sparsify.program import Program
from sparsify.runtime import ready, tuned
from sparsify.text import parse_pred

pytestmark = pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))

NEAR = (P.sinks(3) | P.window(37)) & P.causal()
ELASTIC = P.window("N/4 + 1") & P.causal()
EACH = [P.dense(), ELASTIC, NEAR, ~NEAR]
OTHER = [NEAR, NEAR, P.causal(), NEAR]
RULES = (NEAR, OTHER, ELASTIC, EACH, tuple(EACH))


@pytest.fixture(autouse=True)
def target(monkeypatch):
    """The C++ target, and whoever is asked first installed."""
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    sparsify.attention(*draw(1, 1, 1, 2, 5, 16), NEAR)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(batch, heads, kv_heads, q_len, k_len, size, dtype=torch.float32, seed=0):
    """q, k and v, whose positions and heads lie as those of a model's do: the other way round."""
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, q_len, heads, size), (batch, k_len, kv_heads, size), (batch, k_len, kv_heads, size)
    return [torch.randn(shape, generator=g).to(dtype).transpose(1, 2) for shape in shapes]


def text_of(q, k, rules):
    """The program of these patterns."""
    rules = [rules] * q.shape[1] if isinstance(rules, Pattern) else rules
    where = (0, None, None, "q - N + Nq")
    return plan(tuple(r.rule for r in rules), where, ((), 0), q.shape[1], k.shape[1], q.shape[2] == 1, "cpp")[0]


def anew(q, k, v, rules, scale=None):
    """What a call gives that nobody remembers."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    launch = Launch(Program.parse(text_of(q, k, rules)), q, k, v, (), k.shape[2] - q.shape[2], scale)
    return CPP.run(launch)


def told(q, k, v, rules, scale=None):
    """What a ready call gives: None where there is none."""
    out = ready.by_pattern(q, k, v, rules, scale)
    return None if out is NotImplemented else out


def is_ready(q, k, v, rules, scale=None):
    """Whether a call is ready once it was made, and all three give the same."""
    first, again = sparsify.attention(q, k, v, rules, scale=scale), told(q, k, v, rules, scale)
    assert again is not None and again.stride() == first.stride() and again.dtype == q.dtype
    return torch.equal(first, again) and torch.equal(first, anew(q, k, v, rules, scale))


@settings(max_examples=40)
@given(
    rules=st.sampled_from(RULES),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    q_len=st.integers(1, 8),
    past=st.integers(0, 90),
    scale=st.sampled_from([None, 0.3, -1.0]),
)
def test_a_call_that_is_ready_gives_the_same(rules, batch, kv_heads, q_len, past, scale):
    assert is_ready(*draw(batch, 4, kv_heads, q_len, q_len + past, 16), rules, scale)


def test_many_queries_have_another_kernel():
    """From 17 on; each is ready by itself."""
    q, k, v = draw(1, 4, 2, 17, 90, 16)
    ready.forget()
    assert is_ready(q[:, :, 1:], k, v, NEAR) and told(q, k, v, NEAR) is None
    assert is_ready(q, k, v, NEAR) and told(q[:, :, 1:], k, v, NEAR) is not None


def test_half_precision_and_other_value_sizes():
    """Beside what test_another_call_is_not_taken_for_it has."""
    q, k, _ = draw(1, 4, 2, 1, 70, 16, torch.bfloat16)
    assert is_ready(q, k, draw(1, 4, 2, 1, 70, 24, torch.bfloat16)[2], NEAR)


@pytest.mark.parametrize("rules", [NEAR, ELASTIC], ids=["any length", "each length"])
def test_a_cache_grows(rules):
    q, k, v = draw(1, 4, 2, 1, 200, 16)
    for length in range(90, 200, 7):
        assert is_ready(q, k[:, :, :length], v[:, :, :length], rules)
    assert is_ready(q, k, v, NEAR) and told(q, k[:, :, :199], v[:, :, :199], NEAR) is not None
    assert told(q, k[:, :, :198], v[:, :, :198], ELASTIC) is None


def test_strides_and_numbers_change():
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    assert is_ready(q, k, v, NEAR)
    lying = (
        [t.contiguous() for t in (q, k, v)],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)],
        [q, k[:, :1].expand(-1, 2, -1, -1), v[:, :, :1].expand(-1, -1, 80, -1)],
        [q[..., ::2], k[..., ::2], v],
    )
    for tensors in lying:
        assert is_ready(*tensors, NEAR)
        for tensor in tensors[:1]:
            tensor.mul_(-2.0)
        assert torch.equal(told(*tensors, NEAR), anew(*tensors, NEAR))


def test_threads_change():
    q, k, v = draw(2, 4, 2, 2, 5000, 16)
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        assert is_ready(q, k, v, ELASTIC)


def test_threads_call_at_once():
    """Some calls while others are made for the first time, and everything is forgotten."""
    calls = [(*draw(1, 4, 2, 1, length, 16), rule) for length in range(50, 60) for rule in (NEAR, ELASTIC)]
    expected, wrong = [anew(*call) for call in calls], []

    def repeat(first):
        for number in range(first, first + 400):
            at = number % len(calls)
            if not torch.equal(sparsify.attention(*calls[at]), expected[at]):
                wrong.append(at)
            if number % 50 == 0:
                ready.forget()

    threads = [threading.Thread(target=repeat, args=(5 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_call_points_to_stays_while_it_is_used(monkeypatch):
    """Whatever runs between a ready call's look-up and its kernel may have all of them forgotten."""
    monkeypatch.setattr(launching, "_BUILT", {})
    ready.forget()
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    first = sparsify.attention(q, k, v, NEAR)
    kernel, alive = weakref.ref(*launching._BUILT.values()), []

    def threads():
        launching._BUILT.clear()
        ready.forget()
        gc.collect()
        alive.append(kernel() is not None)
        return 1

    def set_up(objects):
        given = holder._tensor_of(), runtime.parallel_function(), os.getpid(), *map(id, objects)
        holder._library().ready_setup(holder.SETUP.pack(*given))

    objects = [threads if one is torch.get_num_threads else one for one in holder._OBJECTS]
    set_up(objects)
    try:
        assert torch.equal(told(q, k, v, NEAR), first)
    finally:
        set_up(holder._OBJECTS)
    gc.collect()
    assert alive == [True] and kernel() is None and told(q, k, v, NEAR) is None


def test_a_list_of_patterns_changes():
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    rules = [NEAR] * 4
    assert is_ready(q, k, v, rules)
    rules[2] = OTHER[2]
    assert told(q, k, v, rules) is None
    assert is_ready(q, k, v, rules)
    rules.pop()
    with pytest.raises(errors.InputError, match="one for each of 4 heads, found 3 patterns"):
        sparsify.attention(q, k, v, rules)


def test_what_is_built_changes(monkeypatch):
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    assert is_ready(q, k, v, NEAR)
    with tuned.forced({"items": 4}):
        assert told(q, k, v, NEAR) is None and is_ready(q, k, v, NEAR)
    assert told(q, k, v, NEAR) is None and is_ready(q, k, v, NEAR)
    tuned.reload()
    assert told(q, k, v, NEAR) is None and is_ready(q, k, v, NEAR)
    for name, value in (("SPARSIFY_ISA", "portable"), ("SPARSIFY_TARGET", "null")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert told(q, k, v, NEAR) is None
            torch.testing.assert_close(sparsify.attention(q, k, v, NEAR), anew(q, k, v, NEAR))
        assert told(q, k, v, NEAR) is None and is_ready(q, k, v, NEAR)


def test_the_usual_position_of_the_first_query_may_be_said(monkeypatch):
    for q_len, k_len in ((1, 70), (5, 70), (70, 70)):
        q, k, v = draw(1, 4, 2, q_len, k_len, 16)
        ready.forget()
        first = sparsify.attention(q, k, v, NEAR, q_offset=k_len - q_len)
        assert torch.equal(told(q, k, v, NEAR), first)
        with monkeypatch.context() as patch:
            patch.setattr(launching.Kernel, "run", None)
            assert torch.equal(sparsify.attention(q, k, v, NEAR, q_offset=k_len - q_len), first)
    q, k, v = draw(1, 4, 2, 69, 70, 16)
    assert is_ready(q, k, v, NEAR)
    assert not torch.equal(sparsify.attention(q, k, v, NEAR, q_offset=0), told(q, k, v, NEAR))
    for wrong in (True, 1.0, "1"):
        with pytest.raises(errors.InputError, match="q_offset: expected an integer"):
            sparsify.attention(q, k, v, NEAR, q_offset=wrong)


def other_shapes(q, k, v):
    return {
        "queries": (torch.cat([q, q], 2), k, v),
        "heads": (q[:, :2], k, v),
        "key heads": (q, k[:, :1], v[:, :1]),
        "head size": (q[..., :8], k[..., :8], v),
        "value size": (q, k, v[..., :8]),
        "dtype": (q.half(), k.half(), v.half()),
        "as many queries as keys": (q, k[:, :, :1], v[:, :, :1]),
    }


@pytest.mark.parametrize("fact", other_shapes(*draw(1, 4, 2, 1, 8, 16)))
def test_another_call_is_not_taken_for_it(fact):
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    ready.forget()
    assert is_ready(q, k, v, NEAR)
    other = other_shapes(q, k, v)[fact]
    assert told(*other, NEAR) is None and told(q, k, v, NEAR & P.window(80)) is None
    assert is_ready(*other, NEAR) and is_ready(q, k, v, NEAR)


WRONG = {
    "batch": lambda q, k, v: (torch.cat([q, q]), k, v),
    "length": lambda q, k, v: (q, k, v[:, :, 1:]),
    "heads": lambda q, k, v: (q, k, v[:, :1]),
    "head size": lambda q, k, v: (q[..., 1:], k, v),
    "one dtype": lambda q, k, v: (q, k, v.half()),
    "a tensor": lambda q, k, v: (q, None, v),
    "gradients": lambda q, k, v: (q.requires_grad_(), k, v),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named_after_a_ready_call(what):
    given = draw(1, 4, 2, 1, 80, 16)
    assert is_ready(*given, NEAR)
    with pytest.raises(errors.InputError, match=what):
        sparsify.attention(*WRONG[what](*given), NEAR)
    with pytest.raises(errors.InputError, match="expected one pattern"):
        sparsify.attention(*draw(1, 4, 2, 1, 80, 16), text_of(*draw(1, 4, 2, 1, 80, 16)[:2], NEAR))
    for scale in (torch.nan, True, "1"):
        with pytest.raises(errors.InputError, match="scale"):
            sparsify.attention(*draw(1, 4, 2, 1, 80, 16), NEAR, scale=scale)


def test_who_looks_on_is_not_passed_by():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen: list = []
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    assert is_ready(q, k, v, NEAR)
    with Seen():
        sparsify.attention(q, k, v, NEAR)
    assert op.attention in seen
    with pytest.raises(RuntimeError, match="Batching rule not implemented for sparsify::attention"):
        torch.vmap(lambda q: sparsify.attention(q, k, v, NEAR))(torch.stack([q, -q]))
    with pytest.raises(errors.InputError, match="gradients"):
        torch.func.grad(lambda q: sparsify.attention(q, k, v, NEAR).sum())(q)
    negative = torch.complex(torch.zeros_like(q), q).conj().imag
    assert negative.is_neg() and torch.equal(sparsify.attention(negative, k, v, NEAR), anew(-q, k, v, NEAR))


def test_the_op_is_ready_with_its_loads():
    """A mask that changes in place, of several dtypes, one of which Python widens; and positions of the first query."""
    q, k, v = draw(2, 4, 2, 3, 80, 16)
    keeps = [parse_pred("_0[b, k] > 0 and k <= q")] * 4
    program = Program.of(keeps, loads=1, target="cpp")
    for dtype in (torch.bool, torch.int64, torch.int32, torch.int16, torch.uint8):
        load = (torch.rand(2, 80) > 0.5).to(dtype)
        for offset in (77, 40, 79):
            first = torch.ops.sparsify.attention(q, k, v, [load], offset, 0.25, program.text())
            assert torch.equal(first, CPP.run(Launch(program, q, k, v, (load,), offset, 0.25)))
            again = ready.by_program(q, k, v, [load], offset, 0.25, program.text())
            assert (again is NotImplemented) == (dtype == torch.int16)
            assert again is NotImplemented or torch.equal(first, again)
            load.logical_not_()


def test_a_compiled_call_is_ready(monkeypatch):
    """What Inductor's graph calls at each step doesn't come by Python's launch."""
    q, k, v = draw(1, 4, 2, 1, 80, 16)
    compiled = torch.compile(lambda q, k, v: sparsify.attention(q, k, v, NEAR) * 2, fullgraph=True)
    with torch.inference_mode():
        first = compiled(q, k, v)
        monkeypatch.setattr(launching.Kernel, "run", None)
        assert torch.equal(compiled(q, k, v), first)
