"""NAtS: each key of a key head lives until a position. A model's own mask says so, and is raised to a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify
from sparsify import backend
from sparsify.errors import InputError, PatternError, RefusedError
from sparsify.options import Options
from sparsify.patterns.lists import passes
from sparsify.patterns.presets import nats
from sparsify.patterns.tiles import analyse
from sparsify.selection.lifetimes import expiry
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


class Types(nn.Module):
    """A linear map of keys to the logits of their types, one for each key head; global keys are rare."""

    def __init__(self, kinds: int = 3) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, 16, kinds, generator=g), requires_grad=False)
        self.bias = nn.Parameter(-3.0 * (torch.arange(kinds) == GLOBAL), requires_grad=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return k @ self.weight + self.bias


class Attend(nn.Module):
    """Causal attention of x (B, N, 64), 4 query heads and 2 key heads; or of one token behind a cache of keys."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None) -> torch.Tensor:
        q, k = heads_of(x)
        k = k if cache is None else torch.cat([cache, k], 2)
        return F.scaled_dot_product_attention(q, k, k, is_causal=cache is None, enable_gqa=True)


def heads_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n, _ = x.shape
    return x.view(batch, n, 4, 16).transpose(1, 2), x[..., :32].reshape(batch, n, 2, 16).transpose(1, 2)


def compiled(types: nn.Module):
    torch._dynamo.reset()
    spec = {"version": 1, "sites": [{"heads": {"nats": {"window": 9}}}]}
    options = {"spec": spec, "strict": True, "inner": "eager", "learned": {"nats": types}}
    return torch.compile(Attend(), backend="sparsify", options=options, fullgraph=True)


@pytest.mark.parametrize("target", ["null", "cpp"])
@pytest.mark.parametrize("queries", [1, 83])
@torch.no_grad()
def test_the_preset_runs_by_the_types_that_a_module_gives(queries, target, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", target)
    x, types = torch.randn(2, 83, 64, generator=torch.Generator().manual_seed(0)), Types()
    q, k = heads_of(x)
    kinds = types(q, k).argmax(-1).numpy()
    assert {*kinds.flatten()} == {GLOBAL, LOCAL, WINDOW}
    keep = torch.tensor(np.stack([by_types(one, 9) for one in kinds])).repeat_interleave(2, 1)[:, :, -queries:]
    expected = F.scaled_dot_product_attention(q[:, :, -queries:], k, k, keep, enable_gqa=True)
    given = (x, None) if queries > 1 else (x[:, -1:], k[:, :, :-1])
    torch.testing.assert_close(compiled(types)(*given), expected, atol=1e-5, rtol=1e-5)


def test_expiry_is_that_of_the_types():
    types = torch.rand(2, 2, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.6, 1.0, 1.0])
    found = expiry(types, 9)
    assert found.dtype == torch.int32 and torch.equal(found.long(), expiry_of(types.argmax(-1), 9))


@torch.no_grad()
def test_what_lifetimes_need_is_said():
    x = torch.randn(2, 83, 64)
    with pytest.raises(InputError, match="nats: expected a torch module, or a list or a mapping by layer of them"):
        compiled(None)(x, None)
    with pytest.raises(RefusedError, match=r"the module 'nats' gives \(2, 2, 83, 4\), not types \(batch, 2, keys, 3\)"):
        compiled(Types(4))(x, None)
    with pytest.raises(InputError, match=r"^attention: pattern: lifetimes of keys need their module"):
        sparsify.attention(*(torch.randn(1, 2, 9, 16) for _ in "qkv"), nats())
    for build, message in (
        (lambda: nats(-1), "nats.window: expected an integer >= 0, found -1"),
        (lambda: nats(types="a b"), "lifetimes.learned: expected a hook's name of letters, digits"),
    ):
        with pytest.raises(PatternError, match=message):
            build()
