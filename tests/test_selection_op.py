"""`choose`, and `sparsify::select` around it, under torch.compile and make_fx."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify.patterns.selector import Budget, Force, Heads, Lines, Score, Selector, Unit
from sparsify.selection import choose
from sparsify.selection.site import Ask, select
from sparsify.text import parse_pred

BOUND, HEAD = Score(kview="minmax", combine="upper_bound"), Heads("head")
SELECTORS = {
    "pages": Selector(Budget("topk", 3), Unit(k=4), BOUND, force=Force(sink=1, local=1), phase="decode"),
    "tokens": Selector(Budget("topk", 9), heads=Heads("layer", "best_rank"), force=Force(local=3), phase="decode"),
    "strided": Selector(
        Budget("topp", 0.8), Unit(16, 16), Score(kview="strided(4)", norm="softmax"), HEAD, Force(1, 1)
    ),
    "relative": Selector(
        Budget("relmax", 0.3, max=6), Unit(16, 16), Score(kview="mean", norm="exp_rowmax", causal="past"), HEAD
    ),
    "matrix": Selector(
        Budget("topp", 0.8, "head", 2), Unit(16, 16), Score("mean", "mean", norm="softmax", smooth="max(3)"), HEAD
    ),
    "exempt": Selector(Budget("ratio", 0.5), Unit(16, 8), Score("mean", "mean"), HEAD, Force(exempt=0.2, last_rows=1)),
    "searched": Selector(
        Budget("topk", 3), Unit(16, 4), Score(kview="rep_search", pool="max"), Heads("layer", "max"), Force(local=1)
    ),
    "lines": Selector(None, Unit(8, 8), Score("last(5)", norm="softmax"), HEAD, lines=Lines(4, 5, 1, 2)),
}


def arguments(selector: Selector, keys: int) -> tuple:
    torch.manual_seed(keys)
    queries = 1 if selector.phase == "decode" else keys
    valid = torch.arange(keys)[None] >= torch.tensor([[0], [7]])
    q, k = torch.randn(2, 4, queries, 8, requires_grad=True), torch.randn(2, 2, keys, 8)
    return q, k, valid


def call(q, k, valid, text):
    return select(q, k, [valid], None, k.shape[2] - q.shape[2], 0.35, text)


def text_of(selector: Selector) -> str:
    return Ask(selector, usable=parse_pred("_0[b, k]")).text()


def test_a_longer_cache_compiles_nothing_with_inductor():
    check_compiled("pages", "inductor")


@pytest.mark.parametrize(
    "name",
    ["lines", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tokens", "relative", "exempt", "searched"))],
)
def test_compiled_lists_are_the_same_and_more_keys_compile_nothing(name):
    check_compiled(name, "aot_eager")


def check_compiled(name: str, backend: str) -> None:
    torch._dynamo.reset()
    selector, counter = SELECTORS[name], CompileCounterWithBackend(backend)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for keys in (61, 62, 63, 64, 65, 80):
        q, k, valid = arguments(selector, keys)
        for x, dim in ((q, 2), (k, 2), (valid, 1)):
            if x.shape[dim] == keys:
                torch._dynamo.mark_dynamic(x, dim)
        given = (q, k, valid, text_of(selector))
        for found, expected in zip(compiled(*given), call(*given), strict=True):
            assert torch.equal(found, expected), (name, keys)
    assert counter.frame_count == 1


def test_the_op_decomposes_into_plain_operators():
    selector = SELECTORS["pages"]
    traced = make_fx(lambda *given: call(*given, text_of(selector)))(*arguments(selector, 61))
    names = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in names for word in ("choose", "nonzero", "unique", "aten.item", "_scalar_"))
    given = arguments(selector, 61)
    assert all(map(torch.equal, traced(*given), call(*given, text_of(selector))))


def test_choose_itself_compiles():
    selector = SELECTORS["matrix"]
    compiled = torch.compile(
        lambda q, k, p: choose(selector, q, k, scale=0.35, position=p), backend="aot_eager", fullgraph=True
    )
    q, k, _ = arguments(selector, 40)
    position = torch.arange(40)[None]
    plain = choose(selector, q, k, scale=0.35, position=position)
    assert all(map(torch.equal, compiled(q, k, position)[0], plain[0]))
