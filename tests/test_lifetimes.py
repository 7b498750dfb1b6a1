"""NAtS: each key of a key head lives until a position. A model's own mask says so, and is raised to a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsify import backend
from sparsify.options import Options
from sparsify.patterns.lists import passes
from sparsify.patterns.tiles import analyse
from sparsify.walk import data_bounds

GLOBAL, LOCAL, WINDOW = range(3)


def by_types(types: np.ndarray, window: int) -> np.ndarray:
    """Keys are kept forever (global), to the next global one of their head (local), or for a window: (J, N, N) bool."""
    heads, n = types.shape
    keep = np.zeros((heads, n, n), bool)
    for j, q, k in np.ndindex(keep.shape):
        after = [t for t in range(k + 1, n) if types[j, t] == GLOBAL]
        lives = {GLOBAL: True, LOCAL: q <= min(after, default=n), WINDOW: q <= k + window}
        keep[j, q, k] = k <= q and lives[types[j, k]]
    return keep


def expiry_of(types: torch.Tensor, window: int) -> torch.Tensor:
    """The last position that sees each key: (B, J, N) int64, from their types."""
    n = types.shape[-1]
    at = torch.arange(n)
    coming = torch.where(types == GLOBAL, at, n).flip(-1).cummin(-1).values.flip(-1)
    following = F.pad(coming[..., 1:], (0, 1), value=n)
    return torch.where(types == GLOBAL, n, torch.where(types == LOCAL, following, at + window))


@pytest.mark.parametrize("target", ["null", "cpp"])
def test_lifetimes_of_keys_need_no_mask_of_all_pairs(target):
    g = torch.Generator().manual_seed(0)
    types = torch.multinomial(torch.tensor([0.1, 0.4, 0.5]), 2 * 2 * 83, True, generator=g).view(2, 2, 83)
    x, found = torch.randn(2, 83, 64, generator=g), []

    def attend(x, expiry):
        batch, n, _ = x.shape
        q, k = x.view(batch, n, 4, 16).transpose(1, 2), x[..., :32].reshape(batch, n, 2, 16).transpose(1, 2)
        row = torch.arange(n)
        alive = row[:, None] <= expiry.repeat_interleave(2, 1)[:, :, None]
        return F.scaled_dot_product_attention(q, k, k, (row <= row[:, None]) & alive, enable_gqa=True)

    def record(gm, inputs):
        found.append(backend.captured(gm, inputs, Options.read({"target": target, "crossover": False})))
        return found[-1].module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(attend, backend=record, fullgraph=True)(x, expiry_of(types, 9))
    (site,) = found[0].sites
    assert site.mask_text == "causal & (q <= expiry[b, h//2, k])"
    assert data_bounds(analyse(passes(site.programs[0]).static).empty), "tiles of dead keys are not skipped"
    keep = torch.tensor(np.stack([by_types(one, 9) for one in types.numpy()])).repeat_interleave(2, 1)
    q, k = x.view(2, 83, 4, 16).transpose(1, 2), x[..., :32].reshape(2, 83, 2, 16).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, k, keep, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
