"""Count the softmaxes that a model runs, module by module, without any of our own code.

Everything that normalises scores is one call of ATen below autograd: a softmax, one of SDPA's kernels, or one of the
two operators that hold a whole layer. So the real model runs eagerly under a dispatch mode, which sees each of them
once.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zoo.entry import Call, Entry

ANCHORS = ("_softmax", "_safe_softmax", "_transformer_encoder_layer_fwd", "_native_multi_head_attention")
SDPA = "_scaled_dot_product_"


class Softmaxes(TorchDispatchMode):
    """Counts the softmaxes that run inside it, by the module that `stack` ends with."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name in ANCHORS or name.startswith(SDPA) or name.startswith("flex_attention"):
            self.found[self.stack[-1] if self.stack else ""] += 1
        return func(*args, **(kwargs or {}))


def softmaxes(model: nn.Module, call: Call) -> Counter[str]:
    """How many softmaxes each module of `model(**call)` runs itself, by the module's path."""
    names = {module: name for name, module in model.named_modules()}
    mode = Softmaxes()

    def enter(module: nn.Module, _args: Any) -> None:
        mode.stack.append(names.get(module, mode.stack[-1] if mode.stack else ""))

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        mode.stack.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with torch.no_grad(), mode:
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return mode.found


def expected(entry: Entry, model: nn.Module, call: Call) -> tuple[Counter[str], int]:
    """The attention sites of one forward by module, and how many softmaxes are others, as the entry says."""
    found = softmaxes(model, call)
    total = found.total()
    for path in list(found):
        for glob, number in entry.others.items():
            if fnmatchcase(path, glob):
                found[path] -= found[path] if number < 0 else number
    return +found, total - (+found).total()
