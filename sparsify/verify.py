"""`options={"verify": True}`: masks and outputs against the model's own, on real tensors, in the first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sparsify import bias as biases
from sparsify.errors import VerifyError
from sparsify.passes import Capture
from sparsify.passes.masks.compare import Difference, first_difference
from sparsify.passes.masks.values import DROPPED
from sparsify.passes.remember_masks import MaskCheck
from sparsify.passes.site import Mask
from sparsify.walk import evaluate, variables

# What outputs may differ by, as a part of the largest: a wrong mask, scale or kernel differs by more.
TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def verified(compiled: Callable[..., Any], capture: Capture) -> Callable[..., Any]:
    """The compiled graph; its first call checks the sites before it runs. Raises VerifyError."""
    pending = [capture]

    def run(*inputs: Any) -> Any:
        while pending:
            check(pending.pop(), inputs)
        return compiled(*inputs)

    return run


def check(capture: Capture, inputs: Sequence[Any]) -> None:
    """Runs a capture as it was on real inputs, which stay as they are; compares masks at every pair, and outputs.

    The op computes each attention that no spec changes from the same q, k and v. Needs the memory of the model's mask
    tensors and, three times, of its attentions' outputs. Raises VerifyError naming the site, and of a mask the first
    (b, h, q, k) and what is found and expected there, of an output the largest difference.
    """
    if capture.remembered is None:
        return
    values = _Recorder(capture.remembered).values(_copied(inputs))
    sizes = _sizes(capture.remembered.graph, inputs)
    for item in capture.checks:
        _check_site(item, values, sizes)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what its results were when they were made: a later write in place can't reach that."""

    def values(self, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        output = next(iter(reversed(self.module.graph.nodes)))  # type: ignore[arg-type]
        self.wanted = set(output.args[0])
        self.found: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.found[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def _copied(inputs: Sequence[Any]) -> list[Any]:
    """Inputs over memory of their own, shared where theirs is; parameters, which no mask writes into, as they are."""
    memory: dict[int, torch.UntypedStorage] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            return value
        if type(value) is not torch.Tensor or value.layout != torch.strided:
            return value.clone()
        storage = value.untyped_storage()
        mine = memory.setdefault(storage._cdata, storage.clone())
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        return made.set_(mine, value.storage_offset(), value.shape, value.stride())

    with torch.no_grad():
        return [copy(value) for value in inputs]


def _sizes(graph: fx.Graph, inputs: Sequence[Any]) -> dict[Any, int]:
    """What the symbols of symbolic sizes are for these inputs."""
    found: dict[Any, int] = {}
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt):
            found[known.node.expr] = int(value)
        elif isinstance(known, torch.Tensor) and isinstance(value, torch.Tensor):
            for symbolic, size in zip(known.shape, value.shape, strict=True):
                if isinstance(symbolic, torch.SymInt):
                    found[symbolic.node.expr] = size
    return found


def _check_site(item: MaskCheck, values: Mapping[fx.Node, Any], symbols: Mapping[Any, int]) -> None:
    batch, heads, q_len, k_len = (_number(size, symbols, item) for size in item.sizes)
    offset = values[item.q_offset] if isinstance(item.q_offset, fx.Node) else item.q_offset
    device = values[item.masks[0].node].device if item.masks else None
    rows = torch.arange(q_len, device=device).view(-1, 1)
    env: dict[str, Any] = {"N": k_len, "Nq": q_len, "q": rows + offset, "k": torch.arange(k_len, device=device)}
    env |= {f"_{i}": values[node] for i, node in enumerate(item.loads)}
    masks = [_effect(mask, values[mask.node]).expand(batch, heads, q_len, k_len) for mask in item.masks]
    sink = None if item.sink is None else values[item.sink].expand(batch, heads, q_len, 1)
    causal, empty = env["k"] <= rows, False
    for b, h in _distinct(item, [values[mask.node] for mask in item.masks], batch, heads):
        here = env | {"b": b, "h": h}
        parts = [mask[b, h] for mask in masks] + ([causal] if item.causal else [])
        kept = torch.as_tensor(evaluate(item.keep, here), device=device).expand(q_len, k_len)
        bias = biases.evaluate(item.bias, here).to(kept.device)
        empty |= bool((~(kept & ~(bias <= DROPPED)).any(-1)).any())
        found = first_difference(kept, bias, _model_mask(parts, kept))
        if found is not None:
            _raise(item, "mask", (b, h, *found.at), found)
        if sink is not None and item.sink_bias is not None:
            logit = biases.evaluate(item.sink_bias, here)
            found = first_difference(torch.ones((), dtype=torch.bool), logit, sink[b, h])
            if found is not None:
                _raise(item, "sink", (b, h, found.at[0]), found)
    if item.outputs:
        _check_output(item, *(values[node].double() for node in item.outputs), empty)


def _check_output(item: MaskCheck, own: torch.Tensor, made: torch.Tensor, weights: torch.Tensor, empty: bool) -> None:
    """Both round, in an order of their own: what differs by little beside the largest output is equal.

    weights: those of the kept keys, summed; where some rows are empty, those of which it is 0 say nothing (there the
    model's own is an average over everything or NaN, and 0 here).
    """
    counts = weights != 0 if empty else torch.ones_like(own, dtype=torch.bool)
    own, made = own[counts], made[counts]
    gap = (made - own).abs()
    limit = TOLERANCE[item.coarsest] * own.abs().nan_to_num().max() if own.numel() else 0.0
    if bool((gap <= limit).all()):
        return
    raise VerifyError(
        f"verify: {item.address}: the attention's output differs from the model's own by {float(gap.max()):.3g}, "
        f"where the largest of that is {float(own.abs().max()):.3g}"
    )


def _number(size: int | torch.SymInt, symbols: Mapping[Any, int], item: MaskCheck) -> int:
    if isinstance(size, int):
        return size
    found = size.node.expr.xreplace(dict(symbols))
    if getattr(found, "free_symbols", None):
        raise VerifyError(f"verify: {item.address}: the size {size} is not known from the inputs")
    return int(found)


def _distinct(item: MaskCheck, masks: list[torch.Tensor], batch: int, heads: int) -> list[tuple[int, int]]:
    """The (b, h) to look at: all, or the first where neither side depends on it."""
    tensors = [mask for mask in masks if mask.dim() > 2]
    names = _variables(item)
    by_head = "h" in names or item.sink is not None or any(m.shape[-3] > 1 for m in tensors)
    by_batch = "b" in names or any(m.dim() == 4 and m.shape[0] > 1 for m in tensors)
    return [(b, h) for b in range(batch if by_batch else min(batch, 1)) for h in range(heads if by_head else 1)]


def _variables(item: MaskCheck) -> frozenset[str]:
    return variables(item.keep) | biases.variables((*item.bias, *(item.sink_bias or ())))


def _effect(mask: Mask, tensor: torch.Tensor) -> torch.Tensor:
    """A mask as a bool tensor that keeps or a floating one that is added: what it does, not its dtype, decides."""
    if mask.kind == "bool":
        return tensor.bool()
    return tensor if tensor.is_floating_point() else tensor.float()


def _model_mask(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """One mask that does what several do, in the widest of their dtypes."""
    whole = torch.ones((), dtype=torch.bool, device=like.device)
    for part in parts:
        if whole.dtype == part.dtype == torch.bool:
            whole = whole & part
        elif part.dtype == torch.bool:
            whole = whole.masked_fill(~part, -torch.inf)
        elif whole.dtype == torch.bool:
            whole = part.masked_fill(~whole, -torch.inf)
        else:
            whole = whole + part
    return whole


def _raise(item: MaskCheck, what: str, at: tuple[int, ...], found: Difference) -> None:
    where = "(b, h, q, k)" if len(at) == 4 else "(b, h, q)"
    raise VerifyError(
        f"verify: {item.address}: the recovered {what} '{item.text}' {found.found} at {where} = {at}, "
        f"the model's own {found.expected}"
    )
