"""The interpreter whose run is traced: it enters what tracing only records and opens what hides an attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from sparsify.passes.canonical import repeats
from sparsify.passes.canonical.bodies import called
from sparsify.passes.canonical.flex import open_flex
from sparsify.passes.canonical.fused import open_encoder_layer, open_multi_head

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast

# An operator that hides an attention: its rule gives what it computes in plain operators beside the whole, or None.
OPENED: dict[Any, Callable[[fx.Node, tuple[Any, ...], Any], Any]] = {
    torch.ops.higher_order.flex_attention: open_flex,
    torch._transformer_encoder_layer_fwd: open_encoder_layer,
    torch.ops.aten._transformer_encoder_layer_fwd.default: open_encoder_layer,
    torch._native_multi_head_attention: open_multi_head,
    torch.ops.aten._native_multi_head_attention.default: open_multi_head,
}


class Interpreter(fx.Interpreter):
    """Runs a graph, and enters the autocast regions that tracing only records: they decide the dtypes of values.

    Graphs that a higher-order operator only calls (checkpoints, compiled regions) are run in its place. followed: the
    operators whose graph autograd follows; what they make of that is lost in a graph without them. A call like one
    before it isn't traced again, but for operators that are opened: how depends on who reads them.
    """

    def __init__(self, module: fx.GraphModule, followed: list[str]) -> None:
        super().__init__(module)
        self.followed = followed
        self.entered: list[Any] = []
        self.node: fx.Node | None = None
        self.repeats = repeats.Repeats()

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        trace = partial(self._traced, n, args, kwargs)
        with self._set_current_node(n):
            return trace() if n.target in OPENED else self.repeats(n, args, kwargs, trace)

    def _traced(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(map(is_traceable_wrapper_subclass, tree_leaves((args, kwargs)))):
            return self._as_it_is(n, args, kwargs)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _as_it_is(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records a call whole that has a tensor of its own kind in it, such as quantised weights.

        What it computes with is inside that tensor, where tracing sees nothing but constants.
        """
        mode = get_proxy_mode()
        assert mode is not None
        tracer: Any = mode.tracer
        proxy = tracer.create_proxy(n.op, n.target, *tree_map(tracer.unwrap_proxy, (args, kwargs)))
        with disable_proxy_modes_tracing():
            result = getattr(self, n.op)(n.target, args, kwargs)
        return track_tensor_tree(result, proxy, constant=None, tracer=tracer)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = called(target, args, kwargs)
        if call is not None:
            if not call.free and _needs_gradient(args):
                self.followed.append(target._name)
            with call.around:
                return Interpreter(call.graph, self.followed).run(*call.operands)
        result = super().call_function(target, args, kwargs)
        if target in OPENED and self.node is not None:
            opened = OPENED[target](self.node, bound(target, args, kwargs), result)
            result = result if opened is None else opened
        with torch._C.DisableTorchFunction():
            if target is ENTER_AUTOCAST:
                self.entered.append(target(*args, **kwargs))
            elif target is EXIT_AUTOCAST:
                target(self.entered.pop())
        return result

    def leave(self) -> None:
        while self.entered:
            EXIT_AUTOCAST(self.entered.pop())


def bound(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of a call in the order that its operator declares, with the defaults of those that aren't given."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        found = inspect.signature(target.__call__).bind(*args, **kwargs)
        found.apply_defaults()
        return found.args
    operator = target if isinstance(target, torch._ops.OpOverload) else getattr(torch.ops.aten, target.__name__).default
    declared = operator._schema.arguments[len(args) :]
    return (*args, *(kwargs.get(arg.name, arg.default_value) for arg in declared))


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd follows a call: what a checkpoint saves is then for it to decide."""
    tensors = [arg for arg in tree_leaves(args) if isinstance(arg, torch.Tensor)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
