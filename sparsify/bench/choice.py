"""A selection as it is timed: what chooses, compiled, and what it chose, as lists for kernels and a table for peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsify import op
from sparsify.errors import InputError
from sparsify.expr import And, Chosen, Pred, conjunction
from sparsify.functional_plan import plan
from sparsify.patterns import Pattern
from sparsify.patterns.lists import choices
from sparsify.selection.site import Ask, select


@dataclass(frozen=True)
class Choice:
    """choose: gives the lists for q (1, H, Nq, D) and k (1, Hkv, Nk, D). text: the program that loops over them."""

    choose: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
    text: str
    unit: Any

    @classmethod
    def of(cls, rules: Sequence[Pattern], q: torch.Tensor, k: torch.Tensor) -> Choice:
        """Of the patterns of the heads, which have one selection; `choose` is compiled when it is first called."""
        where, one_query = (0, None, None, "q - N + Nq"), q.shape[2] == 1
        given = tuple(rule.rule for rule in rules)
        text, (ask,), _ = plan(given, where, ((), 0), q.shape[1], k.shape[1], one_query, q.device.type)
        offset, scale = k.shape[2] - q.shape[2], q.shape[3] ** -0.5
        run = torch.compile(lambda q, k: select(q, k, [], None, offset, scale, ask), dynamic=False)
        return cls(run, text, Ask.parse(ask).selector.unit)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Sequence[torch.Tensor]) -> torch.Tensor:
        """The attention over the lists."""
        return op.attention(q, k, v, list(lists), k.shape[2] - q.shape[2], q.shape[3] ** -0.5, self.text)

    def table(self, lists: Sequence[torch.Tensor], keys: int) -> torch.Tensor:
        """Which units of keys were chosen: bool (lists, rows, units) of the only sequence."""
        index, count = (tensor[0] for tensor in lists)
        used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        units = -(-keys // self.unit.k)
        found = torch.zeros(*index.shape[:2], units + 1, dtype=torch.bool, device=index.device)
        return found.scatter_(-1, index.long(), used)[..., :units]


def static_part(keep: Pred) -> Pred:
    """What a rule says beside its choice. Raises InputError where the two are not combined by `&`."""
    if not choices(keep):
        return keep
    parts = keep.parts if isinstance(keep, And) else (keep,)
    rest = conjunction(part for part in parts if not isinstance(part, Chosen))
    if choices(rest):
        raise InputError("bench: a selection can be combined with other patterns by & only")
    return rest
