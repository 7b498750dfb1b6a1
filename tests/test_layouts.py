"""Attention in any layout and spelling: found, rewritten, and equal to what eager gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from captures import compiled, traced
from einops import einsum, rearrange
from torch import softmax

B, H, N, M, D = 2, 3, 5, 7, 8
C = 16
RANDOM = torch.Generator().manual_seed(0)


def drawn(*sizes):
    return torch.randn(*sizes, generator=RANDOM)


Q, K, V = drawn(B, H, N, D), drawn(B, H, M, D), drawn(B, H, M, D)
W = [drawn(C, C) * 0.3 for _ in range(3)]
X, QKV = (drawn(4, N, C), *W), drawn(3 * C, C) * 0.3
AHEAD = torch.ones(N, M, dtype=torch.bool).triu(1)


def scored(change):
    """The whole attention, of which `change` writes what becomes of the scores."""
    return lambda q, k, v, *more: change(q @ k.mT * 0.3, v, *more)


def projected(pattern, attend, back):
    """Attention over projections of x that einops brings into a layout."""

    def function(x, *weights):
        parts = (rearrange(F.linear(x, w), pattern, h=2) for w in weights)
        return rearrange(attend(*parts), back, h=2)

    return function


def eager(q, k, v):
    return softmax(q @ k.mT * 0.3, -1) @ v


def windows(x, w):
    x = rearrange(x, "b (x i) (y j) d -> b x y i j d", i=2, j=2)
    columns = x.shape[2]
    x = rearrange(x, "b x y i j d -> (b x y) (i j) d")
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=2) for t in F.linear(x, w).chunk(3, -1))
    out = rearrange(eager(q, k, v), "b h (i j) d -> b i j (h d)", i=2)
    return rearrange(out, "(b x y) i j d -> b (x i) (y j) d", b=2, y=columns)


def shifted_windows(x, w1, w2, w3, mask, bias):
    many, n, _ = x.shape
    q, k, v = (F.linear(x, w).reshape(many, n, 2, 8).transpose(1, 2) for w in (w1, w2, w3))
    scores = q * 8**-0.5 @ k.mT + bias[None]
    scores = scores.view(many // 2, 2, 2, n, n) + mask[None, :, None]
    return (softmax(scores.view(-1, 2, n, n), -1) @ v).transpose(1, 2).reshape(x.shape)


def grouped_by_einsum(x, w1, w2, w3):
    q = rearrange(F.linear(x, w1), "b n (g h d) -> b g h n d", g=2, h=2)
    k, v = (rearrange(F.linear(x, w)[..., :8], "b n (g d) -> b g n d", g=2) for w in (w2, w3))
    weights = softmax(einsum(q, k, "b g h i d, b g j d -> b g h i j"), -1)
    return rearrange(einsum(weights, v, "b g h i j, b g j d -> b g h i d"), "b g h n d -> b n (g h d)")


def weights_of_heads(x, *weights):
    return eager(*(torch.einsum("bnc,hcd->bhnd", x, w) for w in weights))


def convolved(x, *weights):
    q, k, v = (F.conv2d(x, w[:, :, None, None]).reshape(2, 2, 8, -1) for w in weights)
    return softmax(q.mT @ k * 0.3, -1) @ v.mT


def rotated(x, *weights):
    q, k, v = (F.linear(x, w).view(4, N, 2, 8).transpose(1, 2) for w in weights)
    cos = torch.arange(N)[:, None].float().cos()
    q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * (1 - cos) for t in (q, k))
    return eager(q, k, v)


def rotated_by_complex(x, *weights):
    """Features in pairs on their way, and keys that several queries share."""
    q, k, v = (F.linear(x, w[:n]).unflatten(-1, (-1, 4)) for w, n in zip(weights, (16, 8, 8), strict=True))
    turn = torch.polar(torch.ones(N, 1, 2), torch.arange(N * 2).view(N, 1, 2) * 0.1)
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2))) * turn).flatten(3) for t in (q, k))
    k, v = (t.transpose(1, 2)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v)


def over_pixels(q, k, v):
    scores = torch.einsum("bhxyd,bhuvd->bhxyuv", q, k) * 0.2
    weights = softmax(scores.flatten(-2), -1).view_as(scores)
    return torch.einsum("bhxyuv,bhuvd->bhxyd", weights, v)


def several_letters(q, k, v):
    q, k = q.view(B, H, N, 2, 4), k.view(B, H, M, 2, 4)
    return torch.einsum("bhij,bhjd->bihd", softmax(torch.einsum("bhiuv,bhjuv->bhij", q, k), -1), v).flatten(2)


def merged(q, k, v, bias):
    scores = torch.bmm(q.reshape(B * H, N, D), k.reshape(B * H, M, D).mT)
    scores = scores.view(B, H, N, M) + bias
    return torch.bmm(softmax(scores, -1).view(B * H, N, M), v.reshape(B * H, M, D)).view(B, H, N, D)


def two_products(x, *weights):
    """Relative positions as a second product: the one with the keys is the attention's."""
    q, k, v = (F.linear(x, w).view(4, N, 2, 8).transpose(1, 2) for w in weights)
    places = F.linear(x.flip(1) * 0.5, weights[0]).view(4, N, 2, 8).transpose(1, 2)
    return softmax(q @ places.mT + q @ k.mT, -1) @ v


def by_hand(s, v):
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return (e / e.sum(-1, keepdim=True)) @ v


def divided_after(s, v):
    e = s.exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def inverted(s, v):
    e = s.exp()
    return (e * e.sum(-1).reciprocal()[..., None]) @ v


def in_place(s, v, bias):
    s *= 0.2
    s += bias
    s[AHEAD.expand(B, H, N, M)] = -math.inf
    return softmax(s, -1) @ v


def masked_twice(s, v):
    return softmax(s.masked_fill(AHEAD, -math.inf), -1).masked_fill(AHEAD, 0.0) @ v


def rows_emptied(s, v):
    empty = torch.arange(N)[:, None] < 2
    return torch.where(empty, 0.0, softmax(s, -1)) @ v


def no_nan(s, v):
    mask = torch.arange(M)[None, :] > torch.arange(N)[:, None] - 2
    return softmax(s.masked_fill(mask, -math.inf), -1).nan_to_num(0.0) @ v


FOLDED = projected("b n (h d) -> (b h) n d", eager, "(b h) n d -> b n (h d)")
HEADS_FIRST = projected("b n (h d) -> h b n d", eager, "h b n d -> b n (h d)")
FLAT = [t[:, 0] for t in (Q, K, V)]
FEW = [drawn(B, 2, M, D) for _ in range(2)]
PIXELS = [drawn(B, H, 2, 3, D), drawn(B, H, 2, 2, D), drawn(B, H, 2, 2, D)]

CASES = {
    "windows": (windows, (drawn(2, 4, 6, C), QKV)),
    "shifted windows": (shifted_windows, (drawn(4, 4, C), *W, drawn(2, 4, 4), drawn(2, 4, 4))),
    "axial": (projected("b x n (h d) -> b x h n d", eager, "b x h n d -> b x n (h d)"), (drawn(2, 3, N, C), *W)),
    "heads in the batch": (FOLDED, X),
    "heads first": (HEADS_FIRST, X),
    "grouped": (grouped_by_einsum, X),
    "weights of heads": (weights_of_heads, (X[0], *(drawn(2, C, D) for _ in range(3)))),
    "convolved": (convolved, (drawn(2, C, 2, 3), *W)),
    "rotated": (rotated, X),
    "rotated by complex numbers": (rotated_by_complex, X),
    "pixels": (over_pixels, PIXELS),
    "several letters": (several_letters, (Q, K, V)),
    "merged, biased apart": (merged, (Q, K, V, drawn(H, N, M))),
    "two products": (two_products, X),
    "one key head": (lambda q, k, v: eager(q, k[:, None], v[:, None]), (Q, K[:, 0], V[:, 0])),
    "grouped query": (lambda q, k, v: eager(q, k[:, :, None], v[:, :, None]), (drawn(B, 2, 3, N, D), *FEW)),
    "two dimensions": (lambda q, k, v: softmax(q @ k.T, -1) @ v, [t[0] for t in FLAT]),
    "tensordot": (lambda q, k, v: softmax(torch.tensordot(q, k, dims=([1], [1])), -1) @ v, [t[0] for t in FLAT]),
    "transposed": (lambda q, k, v: softmax(k @ q.mT * 0.2, -2).mT @ v, (Q, K, V)),
    "keys first": (lambda q, k, v: torch.einsum("bji,bjd->bid", softmax(torch.bmm(k, q.mT), 1), v), FLAT),
    "output transposed": (lambda q, k, v: (v.mT @ softmax(q @ k.mT, -1).mT).mT, (Q, K, V)),
    "ellipsis": (
        lambda q, k, v: torch.einsum("...ij,...jd->...id", softmax(torch.einsum("...id,...jd->...ij", q, k), -1), v),
        (Q, K, V),
    ),
    "broadcast": (
        lambda q, k, v: (softmax((q[:, :, :, None] * k[:, :, None]).sum(-1), -1)[..., None] * v[:, :, None]).sum(-2),
        (Q, K, V),
    ),
    "sdpa of five dimensions": (F.scaled_dot_product_attention, [drawn(2, *t.shape) for t in (Q, K, V)]),
    "sdpa of two": (F.scaled_dot_product_attention, [t[0] for t in FLAT]),
    "by hand": (scored(by_hand), (Q, K, V)),
    "divided after": (scored(divided_after), (Q, K, V)),
    "minus logsumexp": (scored(lambda s, v: (s - s.logsumexp(-1, keepdim=True)).exp() @ v), (Q, K, V)),
    "log softmax": (scored(lambda s, v: s.log_softmax(-1).exp() @ v), (Q, K, V)),
    "reciprocal": (scored(inverted), (Q, K, V)),
    "head gates": (scored(lambda s, v, t: (softmax(s, -1) * t * 0.5) @ v), (Q, K, V, drawn(H, 1, 1))),
    "scaled after the bias": (scored(lambda s, v, t: softmax((s + t) / 3.0, -1) @ v), (Q, K, V, drawn(H, N, M))),
    "keys scaled": (scored(lambda s, v, t: softmax(s * t, -1) @ v), (Q, K, V, drawn(B, 1, 1, M))),
    "in place": (scored(in_place), (Q, K, V, drawn(H, N, M))),
    "masked twice": (scored(masked_twice), (Q, K, V)),
    "rows emptied": (scored(rows_emptied), (Q, K, V)),
    "no NaN": (scored(no_nan), (Q, K, V)),
    "one query": (eager, (Q[:, :, :1], K, V)),
    "one key": (eager, (Q, K[:, :, :1], V[:, :, :1])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_found_and_exact(name):
    function, inputs = CASES[name]
    for site in traced(function, *inputs).sites:
        assert site.refusal is None
        assert len(site.q.meta["val"].shape) == len(site.k.meta["val"].shape) == len(site.v.meta["val"].shape) == 4


@pytest.mark.parametrize("name", ["heads in the batch", "heads first", "axial", "rotated", "grouped", "convolved"])
def test_heads_are_known_from_their_projection(name):
    function, inputs = CASES[name]
    (site,) = traced(function, *inputs).sites
    assert site.heads_known
    assert site.q.meta["val"].shape[1] == (4 if name == "grouped" else 2)


@pytest.mark.parametrize("function", [FOLDED, HEADS_FIRST])
def test_each_head_gets_its_own_pattern(function):
    def masked(q, k, v):
        near = (torch.arange(N)[:, None] - torch.arange(N)).clamp(min=-1)
        keep = torch.stack([torch.ones(N, N, dtype=torch.bool), (near >= 0) & (near < 2)])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)

    wanted = projected("b n (h d) -> b h n d", masked, "b h n d -> b n (h d)")
    rule = {"match": "*", "heads": {"0": "dense", "rest": {"window": 2}}}
    with torch.no_grad():
        run, recorded = compiled(function, spec={"version": 1, "sites": [rule]})
        torch.testing.assert_close(run(*X), wanted(*X), atol=2e-5, rtol=2e-5)
    assert recorded.sites[0].refusal is None


@pytest.mark.parametrize("function", [FOLDED, windows])
def test_sizes_may_be_dynamic(function):
    inputs = X if function is FOLDED else (drawn(2, 4, 6, C), QKV)
    given = [t.clone() for t in inputs]
    for t in given:
        torch._dynamo.mark_static(t, -1)
    for t in given[1:]:
        torch._dynamo.mark_static(t)
    with torch.no_grad():
        run, recorded = compiled(function, dynamic=True)
        torch.testing.assert_close(run(*given), function(*inputs), atol=2e-5, rtol=2e-5)
    assert [site.refusal for site in recorded.sites] == [None]
