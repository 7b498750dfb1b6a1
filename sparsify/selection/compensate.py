"""The op `sparsify::attention_compensated`: attention over the kept keys and one more, for all that a head drops.

That key is the mean of the dropped keys, its value the mean of their values, and it counts as often as they are many
(Tang et al., RazorAttention, arXiv 2407.15891). It is for one query: with several, each would need means of its own.
torch.compile decomposes the op into the attention and plain tensor operations.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.expr import Pred
from sparsify.op import attention_lse, sizes
from sparsify.selection.site import environment
from sparsify.text import parse_pred, to_text
from sparsify.walk import evaluate, variables

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define(
    "attention_compensated(Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt q_offset, float scale, str program, "
    "str dropped) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class Dropped:
    """Which keys each head drops, to join as one, as one text.

    rules: distinct predicates over b, h, q (absolute), k, N, Nq, sizes and loads; heads: that of each query head.
    """

    rules: tuple[Pred, ...]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, rules: Sequence[Pred]) -> Dropped:
        """From one predicate per query head."""
        distinct = tuple(dict.fromkeys(rules))
        return cls(distinct, tuple(map(distinct.index, rules)))

    def text(self) -> str:
        """The canonical string."""
        return json.dumps([[to_text(rule) for rule in self.rules], self.heads], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Dropped:
        """Reads `text()` back."""
        return _parse(text)

    def by_group(self, group: int) -> bool:
        """Whether the `group` query heads of each key head drop the same keys."""
        starts = range(0, len(self.heads), group)
        alike = all(len({*self.heads[start : start + group]}) == 1 for start in starts)
        return alike and not any("h" in variables(rule) for rule in self.rules)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Dropped:
    rules, heads = json.loads(text)
    return Dropped(tuple(map(parse_pred, rules)), tuple(heads))


@torch.library.impl(LIBRARY, "attention_compensated", "CompositeImplicitAutograd")
def _attention_compensated(q, k, v, loads, q_offset, scale, program, dropped):  # type: ignore[no-untyped-def]
    out, lse = attention_lse(q, k, v, loads, q_offset, scale, program)
    away = dropped_keys(Dropped.parse(dropped), q, k, loads, q_offset)
    count, kv_heads = away.sum(-1), k.shape[1]
    rows = q[:, :, 0].unflatten(1, (kv_heads, -1)).float()
    score = (rows * _means(k, away, count)).sum(-1) * scale + count.log()  # -inf where nothing is dropped
    value = _means(v, away, count).expand(-1, -1, rows.shape[2], -1).flatten(1, 2).unsqueeze(2)
    score = score.flatten(1, 2).unsqueeze(-1)
    weight = torch.where(score == -torch.inf, 0.0, torch.sigmoid(score - lse)).unsqueeze(-1)
    return (out.float() * (1 - weight) + value * weight).to(out.dtype), torch.logaddexp(lse, score)


def _means(x: Tensor, away: Tensor, count: Tensor) -> Tensor:
    """The means (B, J, R, D), in float32, of what is dropped of x (B, J, M, D); 0 of nothing.

    away: which keys, (B or 1, J or 1, R, M); count: how many, (B or 1, J or 1, R).
    """
    used = torch.where(away.any(2).unsqueeze(-1), x.float(), 0.0)  # what nobody drops can be NaN, as unwritten memory
    total = used.sum(2, keepdim=True) if away.shape[2] == 1 else away.float() @ used
    return total / count.clamp(min=1).unsqueeze(-1)


def dropped_keys(dropped: Dropped, q: Tensor, k: Tensor, loads: Sequence[Tensor], q_offset: int) -> Tensor:
    """bool (B or 1, J or 1, R, M): the keys that the one query's heads drop; R is 1 where those of a group drop the
    same, else as many as they are."""
    (batch, heads), (kv_heads, k_len) = q.shape[:2], k.shape[1:3]
    env = environment(q, k, loads, q_offset)
    names = sorted(name for name in frozenset().union(*map(variables, dropped.rules)) if name.startswith("size("))
    if names:
        env |= dict(zip(names, sizes(q, k_len, names).unbind(), strict=True))
    found = [torch.as_tensor(evaluate(rule, env), device=q.device) for rule in dropped.rules]
    found = [mask.expand(*(1,) * (4 - mask.dim()), *mask.shape).expand(-1, -1, 1, k_len) for mask in found]
    if not dropped.by_group(heads // kv_heads):
        whole = [mask.expand(batch, heads, -1, -1) for mask in found]
        by_head = torch.stack([whole[rule][:, h, 0] for h, rule in enumerate(dropped.heads)], 1)
        return by_head.unflatten(1, (kv_heads, -1))
    if len(found) == 1:
        return found[0]
    return torch.cat([found[rule].expand(batch, -1, -1, -1) for rule in dropped.heads[:: heads // kv_heads]], 1)


# The output, and the lse of the kept keys and that one together.
attention_compensated = torch.ops.sparsify.attention_compensated.default
