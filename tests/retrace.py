"""Graphs for mask tests: Dynamo's own, traced again to pre-dispatch ATen under its fake mode, with the real inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass
class Traced:
    """An ATen graph and what it is called with."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]

    def masks(self) -> list[tuple[fx.Node, tuple[Any, ...], tuple[int, int, int, int]]]:
        """(mask node, symbolic shape, real shape) of each attention: an SDPA call or an addition under a softmax."""
        return [(mask, shape, _numbers(shape)) for mask, shape in map(_mask, self.gm.graph.nodes) if mask is not None]


def _mask(node: fx.Node) -> tuple[fx.Node | None, tuple[Any, ...]]:
    name = str(node.target)
    if "scaled_dot_product_attention" in name:
        q, k = (node.args[i].meta["val"].shape for i in (0, 1))
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        return mask, (q[0], q[1], q[2], k[2])
    if "softmax" in name:
        scores = node.args[0]
        if "add" in str(scores.target):
            return scores.args[1], tuple(scores.meta["val"].shape)
    return None, ()


def _numbers(shape: tuple[Any, ...]) -> tuple[int, int, int, int]:
    return tuple(size if isinstance(size, int) else size.node.hint for size in shape)


def trace(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dynamic: bool) -> Traced:
    """A function as an ATen graph. Symbolic sizes appear as placeholders, as in Dynamo's graphs, only through use."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    with torch.no_grad(), mode:
        fakes = [mode.from_tensor(x, static_shapes=not dynamic) for x in inputs]
        return Traced(make_fx(function, pre_dispatch=True)(*fakes), inputs)


def compile_and_trace(run: Callable[[Callable[..., Any]], Any], model: torch.nn.Module, dynamic: bool) -> list[Traced]:
    """The graphs that Dynamo makes while `run(compiled model)` runs, traced again."""
    found: list[Traced] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        context = TracingContext.get()
        mode, symbolic = context.fake_mode, context.tensor_to_context
        fakes = [_fake(mode, symbolic, x) for x in inputs]
        with torch.no_grad(), mode:
            again = make_fx(gm, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
        found.append(Traced(again, tuple(x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        run(torch.compile(model, backend=backend, dynamic=dynamic))
    return found


def _fake(mode: FakeTensorMode, contexts: Any, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    known = value in contexts
    return mode.from_tensor(value, static_shapes=None if known else True, symbolic_context=contexts.get(value))
