"""What selections keep of made-up data, as masks for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.expr import FALSE, TRUE
from sparsify.patterns.dense_mask import dense_mask
from sparsify.patterns.head_choices import head_choices
from sparsify.patterns.head_rules import Lifetimes
from sparsify.patterns.lists import with_choices
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.selection.choose import choose
from sparsify.selection.lifetimes import expiry
from sparsify.selection.permute import key_order

SIZE = 32  # of a head


def kept_of_made_up(pattern: Pattern, q_len: int, k_len: int) -> Tensor:
    """(q_len, k_len) bool: what one head keeps of random queries and keys that drift along the sequence.

    A hook's scores are those of the means of blocks, and types of keys are drawn. What the kernel itself skips is not
    left out, and a key for all that is dropped is not drawn. Raises PatternError for what no kernel can do.
    """
    keep = pattern.keep()
    found = head_choices(keep)
    mask = dense_mask(with_choices(keep, {one: TRUE for one in found if one is not None}), 1, q_len, k_len)
    if found.lives is not None:
        mask = mask & _living(Choice.parse(found.lives.text).selector, q_len, k_len)
    if found.listed is None:
        return mask[0]
    selector = Choice.parse(found.listed.text).selector
    assert isinstance(selector, Selector)
    q, k = _drifting(q_len, 0), _drifting(k_len, 1)
    given = {"scale": SIZE**-0.5, "position": torch.arange(k_len - q_len, k_len).unsqueeze(0), "valid": None}
    causal = not bool(mask.triu(k_len - q_len + 1).any())
    scores = _by_means(selector, q, k) if selector.learned else None
    order = key_order(selector, q, k, **given) if selector.permute else None
    lists = choose(selector, q, k, **given, causal=causal, scores=scores, order=order)
    kept = mask_of(lists, selector, q_len, k_len)[0, 0]
    if selector.permute:
        kept = torch.zeros_like(kept).scatter(-1, order[0].long().expand_as(kept), kept)
        segment = torch.arange(k_len) // selector.permute.segment
        kept = kept | (segment[k_len - q_len :, None] == segment)
    rest = dense_mask(
        with_choices(keep, {one: FALSE if one == found.listed else TRUE for one in found if one is not None}),
        1,
        q_len,
        k_len,
    )
    return rest[0] | mask[0] & kept


def _living(lifetimes: Any, q_len: int, k_len: int) -> Tensor:
    """(q_len, k_len): the keys that live at each query, of drawn types of which few are global."""
    assert isinstance(lifetimes, Lifetimes)
    types = torch.rand(1, 1, k_len, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.55, 1.0, 1.0])
    return torch.arange(k_len - q_len, k_len)[:, None] <= expiry(types, lifetimes.window)[0, 0]


def mask_of(lists: list[tuple[Tensor, Tensor]], selector: Selector, q_len: int, k_len: int) -> Tensor:
    """A selector's lists as a mask (B, L, q_len, k_len)."""
    kept = torch.zeros((), dtype=torch.bool)
    for (index, _), unit in zip(lists, selector.units(), strict=True):
        units = -(-k_len // unit)
        listed = torch.zeros(*index.shape[:-1], units + 1, dtype=torch.bool).scatter(-1, index.long(), True)
        tokens = listed[..., :units].repeat_interleave(unit, -1)[..., :k_len]
        kept = kept | tokens.repeat_interleave(selector.unit.q, -2)[..., :q_len, :]
    return kept


def _drifting(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(1, 1, n, SIZE, generator=generator)
    return own + torch.randn(1, 1, n, SIZE, generator=torch.Generator().manual_seed(2)).cumsum(2) / 8


def _by_means(selector: Selector, q: Tensor, k: Tensor) -> Tensor:
    rows, units = (
        torch.stack([part.mean(2) for part in x.split(size, 2)], 2)
        for x, size in ((q, selector.unit.q), (k, selector.unit.k))
    )
    return torch.softmax(rows @ units.mT * SIZE**-0.5, -1)
