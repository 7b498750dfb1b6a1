"""Attention summed over queries (H2O, A2SF), and the op `sparsify::select_summed`, whose sums go on from step to step.

The sums are buffers of the graph. Those of a row of the batch begin anew with another sequence (`sequence.begins`). The
op is one piece, as its buffers change in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.patterns.selector import Selector
from sparsify.selection import sequence
from sparsify.selection.choose import choose
from sparsify.selection.sequence import begins
from sparsify.selection.site import Ask, places_of

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define(
    "select_summed(Tensor q, Tensor k, Tensor[] loads, SymInt q_offset, float scale, str text, Tensor(a!) sums, "
    "Tensor(b!) last, Tensor(c!) seen) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def buffers(
    selector: Selector, batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> dict[str, Tensor]:
    """What the op keeps between steps, by the name of its argument: the sums (B, heads, views of keys) float32, and
    what tells sequences apart. Raises InputError where nothing says for how many keys there is to be room."""
    score = selector.score
    if score.history is None:
        raise InputError(
            "score.history: sums that go on from step to step need room for the most keys that there can be, found none"
        )
    unit = score.stride or (1 if score.kview == "token" else selector.unit.k)
    lists = selector.lists(heads, kv_heads) if selector.heads.when in ("query", "pre") else heads
    return {
        "sums": torch.zeros(batch, lists, -(-score.history // unit), dtype=torch.float32, device=device),
    } | sequence.buffers(batch, kv_heads, head_dim, device)


@torch.library.impl(LIBRARY, "select_summed", "CompositeExplicitAutograd")
def _select_summed(q, k, loads, q_offset, scale, text, sums, last, seen):  # type: ignore[no-untyped-def]
    ask, keys = Ask.parse(text), k.shape[2]
    if keys > ask.selector.score.history:
        raise InputError(f"score.history: there is room for {ask.selector.score.history} keys, found {keys}")
    position, valid = places_of(ask, q, k, loads, q_offset)
    at = position.expand(q.shape[0], 1)[:, 0]
    sums.masked_fill_(begins(k, at, last, seen)[:, None, None], 0.0)
    given = {"scale": scale, "position": position, "valid": valid, "causal": ask.causal}
    ((index, count),) = choose(ask.selector, q, k, **given, sums=sums)
    return [index, count]


@torch.library.register_fake("sparsify::select_summed", lib=LIBRARY)
def _fake(q, k, loads, q_offset, scale, text, sums, last, seen):  # type: ignore[no-untyped-def]
    ask = Ask.parse(text)
    position = torch.empty(q.shape[0], 1, dtype=torch.int64, device=q.device)
    ((index, count),) = choose(ask.selector, q, k, scale=scale, position=position, causal=ask.causal)
    return [torch.empty_like(index), torch.empty_like(count)]


select_summed = torch.ops.sparsify.select_summed.default
