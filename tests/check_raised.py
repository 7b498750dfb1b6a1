"""Proof by running: a raised mask or bias against the real tensor, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify import bias as biases
from sparsify.passes.masks.compare import first_difference
from sparsify.passes.masks.raise_mask import RaisedMask, raise_mask
from sparsify.walk import evaluate


def check_raised(
    gm: fx.GraphModule, node: fx.Node, inputs: Sequence[Any], shape: tuple[Any, ...], real: tuple[int, int, int, int]
) -> RaisedMask:
    """Raises the mask `node` for scores of `shape` and compares it with what the graph computes from `inputs`.

    `real` holds the numbers (B, H, Q, K) that `shape` comes to for these inputs. Returns what `raise_mask` returned.
    Raises AssertionError naming the first element that differs.
    """
    raised = raise_mask(node, shape)
    values = Recorder(gm, inputs).values
    check_equal(raised, values[node].expand(real), values, real)
    return raised


def check_equal(
    raised: RaisedMask, mask: torch.Tensor, values: dict[fx.Node, Any], real: tuple[int, int, int, int]
) -> None:
    """AssertionError unless what was raised does to every score what the mask does: bool, or floating to be added."""
    found, bias = evaluate_raised(raised, values, real)
    differs = first_difference(found, bias, mask)
    if differs is not None:
        what = f"{raised.keep} with {raised.bias} {differs.found}"
        raise AssertionError(f"{what} at {differs.at}, the mask {differs.expected}")


def evaluate_raised(
    raised: RaisedMask, values: dict[fx.Node, Any], real: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicate (bool) and the bias (float64) at every element: (B, H, Q, K) each."""
    env: dict[str, Any] = {"N": real[3], "Nq": real[2]}
    for axis, name in enumerate("bhqk"):
        env[name] = torch.arange(real[axis]).view([-1 if i == axis else 1 for i in range(4)])
    for number, load in enumerate(raised.loads):
        value = torch.as_tensor(values[load])
        env[f"_{number}"] = value if value.dim() else value.reshape(1)
    return torch.as_tensor(evaluate(raised.keep, env)).expand(real), biases.evaluate(raised.bias, env).expand(real)


class Recorder(fx.Interpreter):
    """Runs a graph on real inputs and keeps a copy of what every node made (a later write in place can't reach it)."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value
