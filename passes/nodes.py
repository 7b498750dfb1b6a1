"""Reading and writing FX nodes: what a node computes, its shape and dtype, constants, and insertion of new ones."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true

ATEN = torch.ops.aten

# A cast, or something that hands its input on as it is.
CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16")
COPIES = ("contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh")
VIEWS = ("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten")


def op(node: Any) -> str:
    """The name of the ATen (or sparsify) operator that a node calls, without its overload; "" for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    if target is ATEN.view.dtype:
        return "view_dtype"  # not the same numbers in another shape, but the same bytes as other numbers
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name.removeprefix("aten::")
    return ""


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The value of a schema argument of an ATen node, by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if arg.name == name:
            if position < len(node.args):
                return node.args[position]
            return arg.default_value if arg.has_default_value() else default
    return default


def value(node: Any) -> Any:
    """The fake tensor or number that stands for a node, or the thing itself if it is no node."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("val", node.meta.get("example_value"))


def is_tensor(node: Any) -> bool:
    return isinstance(value(node), torch.Tensor)


def shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(value(node).shape)


def dtype(node: fx.Node) -> torch.dtype:
    return value(node).dtype


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def keeps_numbers(node: fx.Node) -> bool:
    """Whether a cast or copy of a number gives it again, but for rounding: within the usual floats, or no cast."""
    given, made = dtype(node.args[0]), dtype(node)
    return given == made or (given in FLOATS and made in FLOATS)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; asking adds no guard."""
    return bool(statically_known_true(a == b))


def hint(size: Any) -> int | None:
    """The size in this run, without a guard on it."""
    return size if isinstance(size, int) else size.node.hint if isinstance(size, torch.SymInt) else None


def same_sizes(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """All nodes that the given ones are computed from."""
    seen: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        for parent in queue.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
    return seen


def call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Inserts a call before a node, with its fake value, and the metadata of that node."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    node.meta["val"] = fake_call(target, args, kwargs)
    return node


def fake_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The target's result on the fake values of its arguments."""
    args, kwargs = fx.map_arg((args, kwargs), value)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, torch._subclasses.FakeTensor)), None)
    # Some operators have a version for symbolic sizes in Python only.
    with torch.no_grad(), enable_python_dispatcher(), mode or contextlib.nullcontext():
        return target(*args, **kwargs)


def size(before: fx.Node, node: fx.Node, dim: int) -> Any:
    """The size of a dimension: an int, or a node for it where it is dynamic."""
    found = shape(node)[dim]
    return found if isinstance(found, int) else call(before, ATEN.sym_size.int, node, dim)


def scalar(node: Any) -> Any:
    """The number (int, float or symbolic) that a node or an argument is, or None if it is not a constant number.

    Tensors without dimensions count where they are built from constants alone.
    """
    if isinstance(node, bool) or node is None:
        return None
    if isinstance(node, int | float):
        return node
    if not isinstance(node, fx.Node):
        return None
    found = value(node)
    if isinstance(found, int | float | torch.SymInt | torch.SymFloat) and not isinstance(found, bool):
        return found
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        return None
    return _constant_tensor(node)


def constant(node: Any) -> Any:
    """The number that is in all elements of a tensor, whatever its size, or None."""
    if op(node) in ("full_like", "new_full", "full"):
        return _of_dtype(scalar(argument(node, "fill_value")), node)
    if op(node) in ("zeros", "zeros_like", "new_zeros"):
        return 0
    if op(node) in ("ones", "ones_like", "new_ones"):
        return 1
    if op(node) in (*CASTS, *COPIES, *VIEWS, "expand", "expand_as", "unsqueeze"):
        return constant(node.args[0]) if keeps_numbers(node) else None
    return scalar(node)


_FOLDED = {
    "sqrt": lambda x: x**0.5,
    "rsqrt": lambda x: x**-0.5,
    "reciprocal": lambda x: 1 / x,
    "neg": lambda x: -x,
}
_FOLDED_PAIRS = {"mul": operator.mul, "div": operator.truediv, "pow": operator.pow, "add": operator.add}


def _constant_tensor(node: fx.Node) -> Any:
    if node.op == "get_attr":
        return _attribute(node)
    name = op(node)
    if name in CASTS + COPIES + VIEWS + ("expand", "unsqueeze", "squeeze"):
        widens = dtype(node) in FLOATS and dtype(node.args[0]) in (torch.int32, torch.int64)
        return scalar(node.args[0]) if widens or keeps_numbers(node) else None
    if name in ("full", "new_full"):
        return _of_dtype(scalar(argument(node, "fill_value")), node)
    if name == "scalar_tensor":
        return _of_dtype(scalar(argument(node, "s")), node)
    if name in _FOLDED:
        inner = scalar(node.args[0])
        return None if inner is None else _FOLDED[name](inner)
    if name in _FOLDED_PAIRS and not node.kwargs:
        left, right = map(scalar, node.args[:2])
        return None if left is None or right is None else _FOLDED_PAIRS[name](left, right)
    return None


def _of_dtype(number: Any, node: fx.Node) -> Any:
    """The number that a new tensor holds, None where its dtype changes it."""
    floating = isinstance(number, float | torch.SymFloat)
    return number if dtype(node) in FLOATS or (dtype(node) == torch.int64 and not floating) else None


def _attribute(node: fx.Node) -> Any:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    if not isinstance(owner, torch.Tensor) or owner.numel() != 1 or owner.dtype == torch.bool:
        return None
    constant = getattr(owner, "constant", None)
    if isinstance(owner, torch._subclasses.FakeTensor):
        return None if constant is None else constant.item()
    return owner.item()


def module_kind(node: fx.Node) -> str:
    """The class of the innermost module that a node was traced in, such as `torch.nn.Linear`'s full name, or ""."""
    stack = node.meta.get("nn_module_stack")
    kind = list(stack.values())[-1][1] if stack else ""
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def module_path(node: fx.Node, names: Mapping[str, str]) -> str:
    """The path of the innermost module that a node was traced in, such as `model.layers.3.self_attn`; "" if unknown.

    From the model's own names where it is known, else from where Dynamo found the module.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    key, (source, _) = list(stack.items())[-1]
    if key in names:
        return names[key]
    path = re.sub(r"^[LG]\['\w+'\]\.?", "", source)
    path = re.sub(r"\._modules\['([^']+)'\]|\['?([^'\]]+)'?\]", r".\1\2", path)
    return path.removeprefix("_orig_mod.")
