"""What has a softmax and is no attention leaves no site; an attention that no kernel can run leaves one reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from captures import compiled
from torch import softmax

B, H, N, M, D, C = 2, 3, 5, 7, 8, 16
RANDOM = torch.Generator().manual_seed(0)


def drawn(*sizes):
    return torch.randn(*sizes, generator=RANDOM)


Q, K, V, X = drawn(B, H, N, D), drawn(B, H, M, D), drawn(B, H, M, D), drawn(B, N, C)
SQUARE = (Q, K[:, :, :N], V[:, :, :N])
AHEAD = torch.ones(N, M, dtype=torch.bool).triu(1)


class Layer(torch.nn.Module):
    """A function with parameters."""

    def __init__(self, function, *sizes):
        super().__init__()
        self.function = function
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(drawn(*s), requires_grad=False) for s in sizes])

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def routed(x, w, experts):
    return (softmax(F.linear(x, w), -1)[..., None] * torch.einsum("bnd,edf->bnef", x, experts)).sum(-2)


def soft_routed(x, slots):
    logits = torch.einsum("bnd,esd->bnes", x, slots)
    inputs = torch.einsum("bnd,bnes->besd", x, softmax(logits, 1))
    return torch.einsum("bnes,besd->bnd", softmax(logits.flatten(2), -1).view_as(logits), inputs)


def codebook(x, codes):
    return softmax(F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).T, -1) @ codes


def codebooks(x, codes):
    x = x.view(B, N, 2, 8).transpose(1, 2)
    return torch.einsum("bhnc,hcd->bhnd", softmax(torch.einsum("bhnd,hcd->bhnc", x, codes), -1), codes)


def mixture(x, w, classes):
    return (softmax(F.linear(x, w), -1)[..., None] * softmax(F.linear(x, classes).view(B, N, 3, 4), -1)).sum(-2)


def gated_convolution(x, w):
    return x * softmax(F.conv1d(x.mT, w, padding=1), 1).mT


def selective_kernels(x, w):
    return (softmax(F.linear(x.mean(1), w).view(B, 2, C), 1)[:, :, None] * x[:, None]).sum(1)


def additive(q, k, v, a, w):
    return softmax(torch.tanh(F.linear(q, a)[:, :, None] + F.linear(k, a)[:, None]) @ w, -1) @ v


def deformable(x, w, v):
    return (softmax(F.linear(x, w).view(B, N, 2, 4), -1)[..., None] * F.linear(x, v).view(B, N, 2, 4, 2)).sum(-2)


def linear_by_einsum(q, k, v):
    context = torch.einsum("bhnd,bhne->bhde", softmax(k, -2), v)
    return torch.einsum("bhnd,bhde->bhne", softmax(q * 0.3, -1), context)


NEAR = {
    "router": (Layer(routed, (4, C), (4, C, C)), (X,)),
    "soft router": (Layer(soft_routed, (4, 2, C)), (X,)),
    "pooling": (Layer(lambda x, w: softmax(x @ w, 1).mT @ x, (C, 1)), (X,)),
    "pooling by several": (Layer(lambda x, w: softmax(F.linear(x, w), 1).mT @ x, (4, C)), (X,)),
    "linear attention": (lambda q, k, v: softmax(q, -1) @ (softmax(k, -2).mT @ v), SQUARE),
    "linear attention by einsum": (linear_by_einsum, SQUARE),
    "codebook": (Layer(codebook, (6, C)), (X,)),
    "codebooks": (Layer(codebooks, (2, 6, 8)), (X,)),
    "classifier": (Layer(lambda x, w: softmax(F.linear(x, w), -1), (6, C)), (X,)),
    "mixture of softmaxes": (Layer(mixture, (3, C), (12, C)), (X,)),
    "gumbel": (Layer(lambda x, w: softmax((x @ w + 0.1) / 0.5, -1) @ w.T, (C, 4)), (X,)),
    "gated convolution": (Layer(gated_convolution, (C, C, 3)), (X,)),
    "selective kernels": (Layer(selective_kernels, (2 * C, C)), (X,)),
    "contrast": (lambda a, b: softmax(a @ b.T / 0.07, -1), (drawn(4, D), drawn(4, D))),
    "contrastive loss": (lambda q, k: -(q @ k.mT).log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(), (Q, Q)),
    "expected place": (lambda q, k: (softmax(q @ k.mT, -1) * torch.arange(float(M))).sum(-1), (Q, K)),
    "mask head": (lambda q, k: softmax((q @ k.mT).flatten(2), -1), (Q, K)),
    "scores of pairs": (lambda q, k: (softmax((q * k).sum(-1), -1)[..., None] * k).sum(-2), (Q, Q)),
    "additive": (Layer(additive, (D, D), (D,)), (Q[:, 0], K[:, 0], V[:, 0])),
    "deformable": (Layer(deformable, (8, C), (C, C)), (X,)),
}  # fmt: skip


def same_as_eager(function, inputs):
    with torch.no_grad():
        wanted = function(*inputs)
        run, recorded = compiled(function)
        torch.testing.assert_close(run(*inputs), wanted, atol=2e-5, rtol=2e-5)
    return recorded.sites


@pytest.mark.parametrize("name", NEAR)
def test_is_no_attention(name):
    assert not same_as_eager(*NEAR[name])


def scored(change):
    return lambda q, k, v, *more: change(q @ k.mT * 0.3, v, *more)


def with_weights(s, v):
    weights = softmax(s, -1)
    return weights @ v, weights


def best_two(s, v):
    return softmax(s.masked_fill(s < s.topk(2, -1).values[..., -1:], -math.inf), -1) @ v


def normalised_again(s, v):
    weights = softmax(s, -1) * torch.ones(N, M).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def off_by_one_of_the_maximum(s, v):
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def over_heads_too(q, k, v, k2, v2):
    return softmax(torch.cat([q @ k.mT, q @ k2.mT], -1), -1) @ torch.cat([v, v2], -2)


def talking(name):
    def mix(s, w):
        if name == "einsum":
            return torch.einsum("bhij,hg->bgij", s, w)
        if name == "linear":
            return F.linear(s.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)
        return F.conv2d(s, w[:, :, None, None])

    return mix


REFUSED = {
    "weights returned": (scored(with_weights), (), "weights are also used by output"),
    "normalised again": (scored(normalised_again), (), "normalised again"),
    "top two": (scored(best_two), (), "made of the scores"),
    "filled with 0": (scored(lambda s, v: softmax(s.masked_fill(AHEAD, 0.0), -1) @ v), (), "filled with 0"),
    "filled with numbers": (
        scored(lambda s, v, t: softmax(torch.where(AHEAD, t, s), -1) @ v), (drawn(N, 1),), "scores are filled with"
    ),
    "pairs scaled": (scored(lambda s, v, t: softmax(s * t, -1) @ v), (drawn(N, M),), "differs from key to key"),
    "weights scaled": (scored(lambda s, v, t: (softmax(s, -1) * t) @ v), (drawn(N, M),), "differs from key to key"),
    "weights masked": (
        scored(lambda s, v: softmax(s, -1).masked_fill(AHEAD, 0.0) @ v), (), "masked after the softmax"
    ),
    "off by one": (scored(off_by_one_of_the_maximum), (), "a maximum was taken off"),
    "over the heads": (scored(lambda s, v: softmax(s, 1) @ v), (), "not over the keys"),
    "over the queries": (scored(lambda s, v: softmax(s, -2) @ v), (), "the softmax is not over the keys"),
    "float64": (scored(lambda s, v: softmax(s.double(), -1) @ v.double()), (), "float64"),
    "concatenated": (over_heads_too, (K, V), "several products are concatenated"),
}  # fmt: skip


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", ["einsum", "linear", "conv2d"])
def test_talking_heads_are_refused(how, after):
    mix = talking(how)
    attend = scored(lambda s, v, w: mix(softmax(s, -1), w) @ v if after else softmax(mix(s, w), -1) @ v)
    (site,) = same_as_eager(attend, (Q, K, V, drawn(H, H)))
    assert "talking heads" in str(site.refusal)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_its_reason(name):
    function, more, because = REFUSED[name]
    (site,) = same_as_eager(function, (Q, K, V, *more))
    assert site.refusal is not None and because in str(site.refusal)


def test_active_dropout_is_refused():
    with torch.no_grad():
        run, recorded = compiled(lambda q, k, v: F.dropout(softmax(q @ k.mT, -1), 0.5, training=True) @ v)
        run(Q, K, V)
    assert "dropout is active" in str(recorded.sites[0].refusal)
