"""Proof by running: a raised mask against the real mask tensor, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.masks.raise_mask import DROPPED, RaisedMask, raise_mask
from sparsify.walk import evaluate


def check_raised(
    gm: fx.GraphModule, node: fx.Node, inputs: Sequence[Any], shape: tuple[Any, ...], real: tuple[int, int, int, int]
) -> RaisedMask | Refusal:
    """Raises the mask `node` for scores of `shape` and compares it with what the graph computes from `inputs`.

    `real` holds the numbers (B, H, Q, K) that `shape` comes to for these inputs. Returns what `raise_mask` returned.
    Raises AssertionError naming the first element that differs.
    """
    raised = raise_mask(node, shape)
    if not raised:
        return raised
    values = Recorder(gm, inputs).values
    found = evaluate_raised(raised, values, real)
    mask = values[node].expand(real)
    bias = torch.zeros(()) if raised.bias is None else values[raised.bias]
    wanted = mask if mask.dtype == torch.bool else mask > DROPPED
    differs = (found != wanted) if mask.dtype == torch.bool else (found != wanted) & ~(bias <= DROPPED)
    if mask.dtype != torch.bool:
        differs = differs | (found & (mask != bias.expand(real)) & ~(bias <= DROPPED))
    if differs.any():
        b, h, q, k = differs.nonzero()[0].tolist()
        at = (b, h, q, k)
        raise AssertionError(f"{raised.keep} is {bool(found[at])} at {at}, the mask is {mask[at]}")
    return raised


def evaluate_raised(raised: RaisedMask, values: dict[fx.Node, Any], real: tuple[int, int, int, int]) -> torch.Tensor:
    """The predicate at every element: bool (B, H, Q, K)."""
    env: dict[str, Any] = {"N": real[3], "Nq": real[2]}
    for axis, name in enumerate("bhqk"):
        env[name] = torch.arange(real[axis]).view([-1 if i == axis else 1 for i in range(4)])
    for number, load in enumerate(raised.loads):
        value = torch.as_tensor(values[load])
        env[f"_{number}"] = value if value.dim() else value.reshape(1)
    return torch.as_tensor(evaluate(raised.keep, env)).expand(real)


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
