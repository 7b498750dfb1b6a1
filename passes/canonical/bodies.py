"""Higher-order operators that call one graph: the graph, what it is called with, and what it runs under."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

HIGHER = torch.ops.higher_order
CHECKPOINT_OPTIONS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")


@dataclass(frozen=True)
class Call:
    """A graph and its operands; `around`: the context it runs in; free: it may be inlined where autograd follows it."""

    graph: Any
    operands: tuple[Any, ...]
    around: AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    free: bool = False


def called(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What a higher-order operator calls, or None for one that does something else with its graphs."""
    rule = _RULES.get(target)
    return None if rule is None else rule(*args, **kwargs)


def _checkpoint(graph: Any, *operands: Any, **options: Any) -> Call:
    given = [value for name, value in options.items() if name not in CHECKPOINT_OPTIONS]
    return Call(graph, (*operands, *given))


def _wrap(graph: Any, *operands: Any) -> Call:
    return Call(graph, operands, free=True)


def _subgraph(graph: Any, _identifier: Any, *operands: Any) -> Call:
    return Call(graph, operands, free=True)


def _grad(enabled: bool, graph: Any, *operands: Any) -> Call:
    return Call(graph, operands, torch.set_grad_enabled(enabled), free=True)


def _autocast(device: str, dtype: Any, enabled: bool, cache: Any, graph: Any, *operands: Any) -> Call:
    return Call(graph, operands, torch.autocast(device, dtype, enabled, cache), free=True)


_RULES: dict[Any, Callable[..., Call]] = {
    HIGHER.tag_activation_checkpoint: _checkpoint,
    HIGHER.wrap_activation_checkpoint: _checkpoint,
    HIGHER.wrap: _wrap,
    HIGHER.invoke_subgraph: _subgraph,
    HIGHER.wrap_with_set_grad_enabled: _grad,
    HIGHER.wrap_with_autocast: _autocast,
}
