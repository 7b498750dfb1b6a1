"""Calls that repeat: the layers of a model call the same on tensors alike, and one call's trace tells that of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    get_proxy_mode,
    get_proxy_slot,
    set_original_aten_op,
    set_proxy_slot,
    snapshot_fake,
)
from torch.utils._pytree import tree_leaves

CONSTANTS = (int, bool, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
FROM_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Unlike(Exception):
    """A call of which another one that looks like it may be traced to something else."""


@dataclass(frozen=True)
class Place:
    """What a call is given at this place, in the arguments of the operation that it is traced to."""

    index: int


@dataclass(frozen=True)
class Recipe:
    """The one operation that a call was traced to, and the tensor that it gave.

    args, kwargs: of the operation, with a `Place` for each node. itself: the place at which the call was given that
    very tensor, if it was; base: the place of the one whose memory it is in. noted: what its node's "tensor_meta" says.
    """

    target: torch._ops.OpOverload
    args: Any
    kwargs: Any
    result: FakeTensor
    noted: Any
    itself: int | None
    base: int | None


@dataclass
class Call:
    """What a call is given: its tensors and symbolic numbers in order, and the first place of each tensor's node."""

    tracer: Any
    given: list[Any] = field(default_factory=list)
    places: dict[fx.Node, int] = field(default_factory=dict)

    def key(self, arg: Any) -> Any:
        """An argument, with all that a trace may read of it, and nothing else, in the place of a tensor.

        Raises Unlike for one whose data may be read, or that can't be compared.
        """
        kind = type(arg)
        if kind is FakeTensor:
            return self._tensor(arg)
        if kind in CONSTANTS:
            return kind, arg
        if kind is float:
            return kind, repr(arg)  # 0.0 and -0.0 are equal
        if isinstance(arg, (tuple, list)):
            return kind, *map(self.key, arg)
        if isinstance(arg, dict):
            return kind, *arg, *map(self.key, arg.values())
        if kind is slice:
            return kind, self.key(arg.start), self.key(arg.stop), self.key(arg.step)
        if kind in SYMBOLS:
            self.given.append(arg)
            return kind, arg.node.expr
        raise Unlike

    def _tensor(self, tensor: FakeTensor) -> Any:
        slot = get_proxy_slot(tensor, self.tracer, None)
        if slot is None or slot.constant is not None or tensor.constant is not None:
            raise Unlike
        place = self.places.setdefault(slot.proxy.node, len(self.given))
        self.given.append(tensor)
        return place, _kind(tensor)

    def place(self, node: fx.Node) -> Place:
        """Where the call is given what a node stands for. Raises Unlike where it is not."""
        if node in self.places:
            return Place(self.places[node])
        for index, given in enumerate(self.given):
            if isinstance(given, SYMBOLS) and self.node(index) is node:
                return Place(index)
        raise Unlike

    def placed(self, part: Any) -> Any:
        """The node in the place of a `Place`, anything else itself."""
        return self.node(part.index) if type(part) is Place else part

    def node(self, index: int) -> fx.Node:
        """The node that stands for what the call is given at a place."""
        slot: Any = get_proxy_slot(self.given[index], self.tracer)
        return slot.proxy.node if isinstance(self.given[index], torch.Tensor) else slot.force().node


def _kind(tensor: FakeTensor) -> Any:
    """All that there is to a tensor but its data. Raises Unlike for one that is not just sizes and strides."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise Unlike
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    if tensor._has_symbolic_sizes_strides:
        sizes = tuple(size if isinstance(size, int) else size.node.expr for size in sizes)
    flags = tensor.requires_grad, tensor.is_leaf, tensor.is_inference()
    return tensor.dtype, tensor.device, sizes, flags


class Repeats:
    """What calls were traced to, as far as one operation is all of it, for the calls like them that come later.

    Tracing an operation takes a millisecond; all calls alike in targets, constants and kinds of tensors are traced to
    the same, until something changes the state that they run in: what does gives neither a tensor nor a number.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Recipe | None] = {}

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], trace: Callable[[], Any]) -> Any:
        """The result of a node's call, of which `trace` makes nodes; they are made without it where they are known."""
        mode = get_proxy_mode()
        assert mode is not None
        with torch._C.DisableTorchFunction():
            call = Call(mode.tracer)
            try:
                key = node.op, node.target, call.key(args), call.key(kwargs)
            except Unlike:
                key = None
            recipe = self.known.get(key)
            if recipe is not None:
                return _repeated(recipe, call)
        last = next(reversed(call.tracer.graph.nodes))
        result = trace()
        if not _is_value(result):
            self.known.clear()
        elif key is not None and key not in self.known:
            with torch._C.DisableTorchFunction():
                self.known[key] = _learnt(call, last, result)
        return result


def _is_value(result: Any) -> bool:
    return all(isinstance(leaf, (torch.Tensor, int, float, *SYMBOLS)) for leaf in tree_leaves(result))


def _learnt(call: Call, last: fx.Node, result: Any) -> Recipe | None:
    """What a call was traced to, in the nodes behind `last`; None where that is more than one operation, or something
    that the next call like it may be traced to is not sure to be."""
    try:
        return _recipe(call, last, result)
    except Unlike:
        return None


def _recipe(call: Call, last: fx.Node, result: Any) -> Recipe:
    made = last.next
    while made.next.op != "root" and made.op != "root":
        call.place(made)  # a symbolic number that was not used before
        made = made.next
    target = made.target
    if type(result) is not FakeTensor or not isinstance(target, torch._ops.OpOverload):
        raise Unlike
    slot = get_proxy_slot(result, call.tracer, None)
    if slot is None or slot.proxy.node is not made or slot.constant is not None:
        raise Unlike
    if target._schema.is_mutable or FROM_DATA & set(target.tags) or "unbacked_bindings" in made.meta:
        raise Unlike
    itself = next((index for index, given in enumerate(call.given) if given is result), None)
    base = None if itself is not None else _base(call, result)
    args, kwargs = fx.map_arg((made.args, made.kwargs), call.place)
    return Recipe(target, args, kwargs, result, made.meta["tensor_meta"], itself, base)


def _base(call: Call, result: FakeTensor) -> int | None:
    """The place of what a new tensor is a view of. Raises Unlike for a tensor that autograd follows, and for a view of
    something else, or as another dtype."""
    _kind(result)
    storage = result.untyped_storage()._cdata
    for index, given in enumerate(call.given):
        if isinstance(given, torch.Tensor) and given.untyped_storage()._cdata == storage:
            if given.dtype == result.dtype and not result.requires_grad:
                return index
            raise Unlike
    if result.requires_grad or not isinstance(result.storage_offset(), int) or result.storage_offset():
        raise Unlike
    return None


def _repeated(recipe: Recipe, call: Call) -> torch.Tensor:
    """Makes a recipe's node for another call, and its tensor."""
    tracer = call.tracer
    args, kwargs = fx.node.map_aggregate((recipe.args, recipe.kwargs), call.placed)
    name = tracer.graph._target_to_str(recipe.target.overloadpacket.__name__)
    with set_original_aten_op(recipe.target):
        node = tracer.create_node("call_function", recipe.target, args, kwargs, name=name)
    if recipe.itself is None:
        result, node.meta["val"] = _alike(recipe, call)
    else:
        result = call.given[recipe.itself]
        node.meta["val"] = snapshot_fake(result)
    node.meta["tensor_meta"] = recipe.noted
    set_proxy_slot(result, tracer, _ProxyTensor(tracer.proxy(node), None))
    return result


def _alike(recipe: Recipe, call: Call) -> tuple[FakeTensor, FakeTensor]:
    """A new fake tensor like a recipe's, made of what is known of that, and another one over the same memory.

    All sizes that it has are symbols that tracing knows already.
    """
    like = recipe.result
    sizes, mode = (like.shape, like.stride()), like.fake_mode
    with in_kernel_invocation_manager(mode):
        if recipe.base is None:
            made = torch.empty_strided(*sizes, dtype=like.dtype, device="meta")
        else:
            made = torch.as_strided(call.given[recipe.base], *sizes, like.storage_offset())
    return FakeTensor(mode, made, like.device), FakeTensor(mode, made, like.device)
