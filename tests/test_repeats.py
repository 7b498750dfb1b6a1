"""Calls that repeat in a graph: made without tracing them, the graph is the one that tracing all of them gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from captures import CONFIGS
from torch import fx

from sparsify.passes.canonical import interpreter
from sparsify.passes.canonicalise import retrace

LAYERS = 3


def deep(name: str, attention: str) -> torch.nn.Module:
    """A tiny model of some layers."""
    cls, config, sizes = CONFIGS[name]
    layers = {"n_layer" if name == "gpt2" else "num_hidden_layers": LAYERS}
    made = getattr(transformers, config)(**sizes | layers, attn_implementation=attention, use_cache=False)
    return getattr(transformers, cls)(made).eval()


class Traced:
    """In the place of `Repeats`: traces all."""

    def __call__(self, node: fx.Node, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        return trace()


def described(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """All that there is to each node but its name: what it calls, what is known of it, and which memory is whose."""
    memory: dict[int, int] = {}
    places = {node: f"%{place}" for place, node in enumerate(module.graph.nodes)}
    return [
        (
            *(node.op, str(node.target), str(fx.map_arg((node.args, node.kwargs), places.__getitem__))),
            _value(node.meta.get("val"), memory),
            *(str(node.meta.get(key)) for key in ("tensor_meta", "original_aten", "stack_trace", "nn_module_stack")),
        )
        for node in module.graph.nodes
    ]


def _value(value: Any, memory: dict[int, int]) -> Any:
    if not isinstance(value, torch.Tensor):
        return str(value)
    place = memory.setdefault(value.untyped_storage()._cdata, len(memory))
    sizes = str((value.shape, value.stride(), value.storage_offset()))
    return sizes, value.dtype, value.device, value.requires_grad, value.is_inference(), place


def both(monkeypatch: pytest.MonkeyPatch, run: Any, *args: Any, **options: Any) -> list[tuple[Any, Any, int]]:
    """For each graph of a compiled function: its nodes, those where all is traced, and how many calls were repeated."""
    found: list[tuple[Any, Any, int]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        count = 0
        with monkeypatch.context() as patch:
            repeated = interpreter.repeats._repeated

            def counted(*given: Any) -> Any:
                nonlocal count
                count += 1
                return repeated(*given)

            patch.setattr(interpreter.repeats, "_repeated", counted)
            quick = described(retrace(gm, inputs)[0])
        with monkeypatch.context() as patch:
            patch.setattr(interpreter.repeats, "Repeats", Traced)
            found.append((quick, described(retrace(gm, inputs)[0]), count))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend, **options)(*args)
    return found


class Block(torch.nn.Module):
    """Attention by hand, with a chunk, an in-place step, a constant, an autocast region and a tensor that repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        with torch.autocast("cpu", torch.bfloat16):
            scores = q @ k.mT
        scores = scores.float().mul_(0.125) + torch.tensor(0.5)
        y = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        y = (y * y).contiguous() + (y * x) * 0.0 + (y * x) * -0.0
        return x + self.out(y.view(x.shape[0], -1, 32))


BOTH = [pytest.param(both, both, marks=pytest.mark.slow) for both in (False, True)]


@pytest.mark.parametrize(("dynamic", "grad"), [(False, True), (True, False), *BOTH])
def test_a_graph_by_hand_is_the_one_that_tracing_gives(monkeypatch, dynamic, grad):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
    with torch.set_grad_enabled(grad):
        for quick, traced, _ in both(monkeypatch, layers, torch.randn(2, 12, 32), dynamic=dynamic):
            assert quick == traced


MODELS = [("llama", "sdpa", False), ("qwen2", "eager", True), ("gpt2", "eager", False), ("bert", "sdpa", False)]
OTHERS = [
    pytest.param(*one, marks=pytest.mark.slow)
    for one in itertools.product(("llama", "qwen2", "gpt2", "bert"), ("eager", "sdpa"), (False, True))
    if one not in MODELS
]


@pytest.mark.parametrize(("name", "attention", "dynamic"), MODELS + OTHERS)
def test_a_model_is_the_one_that_tracing_gives(monkeypatch, name, attention, dynamic):
    tokens = torch.ones(2, 12, dtype=torch.long)
    with torch.inference_mode():
        for quick, traced, count in both(monkeypatch, deep(name, attention), tokens, dynamic=dynamic):
            assert quick == traced
            assert count > len(traced) // 4
