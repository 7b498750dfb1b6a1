"""The op `sparsify::choose`: tensors, numbers and a selector's text. It decomposes into the plain operations."""

from __future__ import annotations

import torch

from sparsify.patterns.selector import Selector
from sparsify.selection.choose import choose as choose_lists

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define(
    "choose(Tensor q, Tensor k, Tensor position, Tensor? valid, Tensor? scores, bool causal, float scale, str selector)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(LIBRARY, "choose", "CompositeImplicitAutograd")
def _choose(q, k, position, valid, scores, causal, scale, selector):  # type: ignore[no-untyped-def]
    lists = choose_lists(
        Selector.parse(selector), q, k, scale=scale, position=position, valid=valid, causal=causal, scores=scores
    )
    return [tensor for pair in lists for tensor in pair]


# A flat list: index and count of the first list, then of the second.
choose = torch.ops.sparsify.choose.default
