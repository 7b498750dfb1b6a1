"""`sparsify.attention` under torch.compile(fullgraph=True): wherever its pattern comes from, one graph and one op."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify.errors import InputError
from sparsify.patterns import Pattern, causal, sinks, window

Q, K, V = (torch.randn(1, heads, 9, 8) for heads in (2, 2, 2))
STREAMING = sinks(2) | window(3)


class Counter:
    """A backend that counts graphs and their sparsify ops."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs.append(sum("sparsify" in str(node.target) for node in module.graph.nodes))
        return module.forward


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    torch._dynamo.reset()


def compiled(function):
    counter = Counter()
    return torch.compile(function, backend=counter, fullgraph=True), counter


def from_argument(pattern):
    return sparsify.attention(Q, K, V, pattern)


def from_closure(_):
    return sparsify.attention(Q, K, V, STREAMING & causal())


def built_inside(size):
    return sparsify.attention(Q, K, V, (sinks(1) | window(size, ahead=1)) & causal())


def per_head_inside(size):
    return sparsify.attention(Q, K, V, [window(size), window("N/4 + 1") & causal()])


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pattern = STREAMING
        self.each = [window(3), causal()]

    def forward(self, scale):
        return sparsify.attention(Q, K, V, self.pattern) + scale * sparsify.attention(Q, K, V, self.each)


@pytest.mark.parametrize(
    ("function", "argument", "ops"),
    [
        (from_argument, window(4), 1),
        (from_argument, [window(4), STREAMING], 1),
        (from_argument, (window(4), STREAMING & causal()), 1),
        (from_closure, 0, 1),
        (built_inside, 5, 1),
        (per_head_inside, 4, 1),
        (Layer(), 2, 2),
    ],
)
def test_one_graph_wherever_the_pattern_comes_from(function, argument, ops):
    run, counter = compiled(function)
    for _ in range(3):
        torch.testing.assert_close(run(argument), function(argument))
    assert counter.graphs == [ops]


def test_an_equal_pattern_does_not_recompile_and_another_one_does():
    run, counter = compiled(from_argument)
    for pattern in (window(4), window(4), window(4) & causal(), window(4) & causal(), window(5)):
        torch.testing.assert_close(run(pattern), from_argument(pattern))
    assert len(counter.graphs) == 3


def test_the_usual_position_said_in_numbers_is_no_guard():
    def at(q, k, offset):
        return sparsify.attention(q, k, k, STREAMING & causal(), q_offset=offset)

    run, counter = compiled(at)
    for length, offset in ((20, 11), (30, 21), (41, 30), (50, 41), (60, 0)):  # some are where they usually are
        k = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(run(Q, k, offset), at(Q, k, offset))
    assert len(counter.graphs) <= 2


def test_a_pattern_of_ones_own():
    from dataclasses import dataclass

    from sparsify.patterns.pattern import H, K, Q

    @dataclass(frozen=True)
    class Slope(Pattern):
        step: int

        def keep(self):
            return H * self.step >= Q - K

    run, counter = compiled(from_argument)
    torch.testing.assert_close(run(Slope(2) & causal()), from_argument(Slope(2) & causal()))
    assert counter.graphs == [1]


def test_the_rule_is_the_predicate():
    from sparsify.text import parse_pred

    for pattern in (STREAMING, ~STREAMING & causal(), window("N/8 + 2") | ~sinks(3)):
        assert parse_pred(pattern.rule) == pattern.keep()


def test_wrong_numbers_of_patterns():
    with pytest.raises(InputError, match="one for each of 2 heads, found 3 patterns"):
        from_argument([window(1)] * 3)
    with pytest.raises(InputError, match="found 'causal'"):
        from_argument("causal")
