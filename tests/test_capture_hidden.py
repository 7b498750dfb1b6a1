"""Attention inside operators that hide it: flex_attention, torch's fused layers, vmap, checkpoints, regions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from captures import Recorded, compiled, model, traced
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from sparsify.passes.canonical.interpreter import bound
from sparsify.passes.nodes import op

B, H, N, D = 2, 4, 19, 8
Q, K, V = (torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(i)) for i in range(3))
FEW = [t[:, :2].contiguous() for t in (K, V)]
SLOPES = torch.rand(H, generator=torch.Generator().manual_seed(4))
PACKED = torch.arange(N).view(1, N).expand(B, N).div(7, rounding_mode="floor").contiguous()
X = torch.randn(B, N, H * D, generator=torch.Generator().manual_seed(5))


def kinds(capture) -> set[str]:
    return {op(node) or getattr(node.target, "_name", "") for node in capture.graph.nodes}


def window(b, h, q, k):
    return (q >= k) & (q - k < 5)


def documents(b, h, q, k):
    return (q >= k) & (PACKED[b, q] == PACKED[b, k])


def softcap(score, b, h, q, k):
    return 3.0 * torch.tanh(score / 3.0)


def alibi(score, b, h, q, k):
    return score + SLOPES[h] * (k - q)


FLEX = [
    (None, window, True, "window(5)", True),
    (None, documents, False, "causal", False),
    (softcap, window, False, "window(5)", False),
    (alibi, None, True, "", True),
]


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "grouped", "text", "dynamic"),
    [*FLEX, *(pytest.param(*case, not dynamic, marks=pytest.mark.slow) for *case, dynamic in FLEX)],
)
@torch.no_grad()
def test_flex_attention(score_mod, mask_mod, grouped, text, dynamic):
    def function(q, k, v):
        blocks = mask_mod and create_block_mask(mask_mod, B, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, score_mod, blocks, scale=0.3, enable_gqa=grouped)

    given = (Q, *FEW) if grouped else (Q, K, V)
    run, recorded = compiled(function, dynamic=dynamic)
    torch.testing.assert_close(run(*given), function(*given), atol=2e-5, rtol=2e-5)
    (capture,) = recorded.captures
    (site,) = capture.sites
    assert (str(site.refusal), capture.notes) == ("None", [])
    assert site.mask_text.startswith(text) and site.k.meta["val"].shape[1] == (2 if grouped else H)
    assert site.softcap == (3.0 if score_mod is softcap else None)
    assert not kinds(capture) & {"flex_attention", "softmax", "matmul", "index_put_", "sort", "sparsify::either"}


BLOCKS = BlockMask.from_kv_blocks(
    torch.ones(1, 1, 2, dtype=torch.int32),
    torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)[None, None],
    BLOCK_SIZE=16,
    seq_lengths=(N, N),
)


@torch.no_grad()
def test_flex_attention_stays_whole_where_it_is_refused():
    def lse(q, k, v):
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    def rows(q, k, v):
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + PACKED[b].sum() * 0.01)

    def squared(q, k, v):
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * s)

    def blocks_alone(q, k, v):
        return flex_attention(q, k, v, block_mask=BLOCKS)

    for function, reason in (
        (blocks_alone, "the block mask has lists of blocks and no mask_mod"),
        (lse, "the log-sum-exp of flex_attention is used, too"),
        (rows, "score_mod or mask_mod works on more than single elements"),
        (squared, ""),
    ):
        run, recorded = compiled(function)
        torch.testing.assert_close(run(Q, K, V), function(Q, K, V))
        (site,) = recorded.sites
        assert site.refusal is not None and site.refusal.reason.startswith(reason)
        assert "flex_attention" in kinds(recorded.captures[0])
        assert not kinds(recorded.captures[0]) & {"softmax", "sparsify::either"}


def encoder(**options):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(H * D, H, 24, batch_first=True, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


PADDING = torch.zeros(B, N, dtype=torch.bool).index_fill(1, torch.arange(N - 3, N), True)
LATER = torch.ones(N, N, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-3}])
@pytest.mark.parametrize("masks", [{}, {"src_mask": LATER}, {"src_key_padding_mask": PADDING},
                                   {"src_mask": LATER, "src_key_padding_mask": PADDING}])  # fmt: skip
@torch.no_grad()
def test_the_fused_encoder_layer(options, masks):
    layer = encoder(**options)
    capture = traced(lambda x: layer(x, **masks), X)
    (site,) = capture.sites
    assert (str(site.refusal), capture.notes) == ("None", [])
    assert not kinds(capture) & {"_transformer_encoder_layer_fwd", "scaled_dot_product_attention", "sparsify::either"}


@torch.no_grad()
def test_the_fused_layer_stays_whole_where_it_is_refused():
    layer = encoder().double()
    run, recorded = compiled(layer)
    torch.testing.assert_close(run(X.double()), layer(X.double()))
    assert "float64" in str(recorded.sites[0].refusal)
    assert kinds(recorded.captures[0]) >= {"_transformer_encoder_layer_fwd"}
    assert "layer_norm" not in kinds(recorded.captures[0])


@pytest.mark.parametrize("bias", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("padding", [None, PADDING, torch.zeros(B, N).masked_fill(PADDING, -torch.inf)])
@pytest.mark.parametrize("weights", [False, True])
@torch.no_grad()
def test_multi_head_attention(bias, padding, weights):
    """With `need_weights` the graph has baddbmm and softmax; without, SDPA, or torch's fused operator."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(H * D, H, batch_first=True, **bias).eval()
    capture = traced(lambda x: layer(x, x, x, need_weights=weights, key_padding_mask=padding)[0], X)
    assert [str(site.refusal) for site in capture.sites] == ["None"]
    assert not kinds(capture) & {"_native_multi_head_attention", "softmax", "scaled_dot_product_attention"}


@pytest.mark.parametrize("average", [False, True])
@torch.no_grad()
def test_multi_head_attention_that_returns_its_weights(average):
    made = torch.nn.MultiheadAttention(H * D, H, batch_first=True)
    for layer in (made.eval(), copy.deepcopy(made).train()):  # the fused operator and the functional one

        def function(x, layer=layer):
            return layer(x, x, x, average_attn_weights=average)

        run, recorded = compiled(function)
        torch.testing.assert_close(run(X), function(X))
        assert "the attention weights are also used" in str(recorded.sites[0].refusal)
        assert "give it need_weights=False: a kernel" in str(recorded.sites[0].refusal)


class Attend(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(D, D)

    def forward(self, q):
        return F.scaled_dot_product_attention(self.mix(q), q, q, is_causal=True)


def reentrant(attend, q):
    return checkpoint(attend, q, use_reentrant=True)


def saved(attend, q):
    return checkpoint(attend, q, use_reentrant=False)


@torch.compiler.nested_compile_region
def region(attend, q):
    return attend(q)


@pytest.mark.parametrize("wrap", [reentrant, saved, region])
@torch.no_grad()
def test_graphs_that_are_only_called_are_inlined(wrap):
    attend = Attend()
    capture = traced(lambda q: wrap(attend, q) + wrap(attend, q + 1), Q)
    assert [str(site.refusal) for site in capture.sites] == ["None", "None"]


def test_a_checkpoint_that_autograd_follows_stays():
    attend = Attend()

    def function(q):
        return saved(attend, q).sum() + F.scaled_dot_product_attention(q, q, q).sum()

    run, recorded = compiled(function)
    run(Q)
    assert [site.refusal.reason for site in recorded.sites] == [
        "the output needs gradients, and there are no backward kernels yet",
        "tag_activation_checkpoint is in a graph that is trained",
    ]


@torch.no_grad()
def test_attention_in_the_branches_of_a_cond_is_reported():
    def function(q, flag):
        return torch.cond(flag, lambda q: F.scaled_dot_product_attention(q, q, q), lambda q: q * 2, (q,))

    run, recorded = compiled(function)
    for flag in (torch.tensor(True), torch.tensor(False)):
        torch.testing.assert_close(run(Q, flag), function(Q, flag))
    assert [site.refusal.reason for site in recorded.sites] == ["the attention is inside a graph that cond calls"]


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_masks_that_vmap_made(dynamic):
    """What older masks of transformers are made of: a function of one element, under one vmap a dimension."""

    def function(q, k, v):
        rows = torch.vmap(torch.vmap(lambda i, j: (i >= j) & (i - j < 5), (None, 0)), (0, None))
        return F.scaled_dot_product_attention(q, k, v, rows(torch.arange(q.shape[2]), torch.arange(k.shape[2])))

    q, k, v = (t.clone() for t in (Q, K, V))
    for tensor in (q, k, v) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    run, recorded = compiled(function)
    torch.testing.assert_close(run(q, k, v), function(Q, K, V), atol=2e-5, rtol=2e-5)
    assert [site.mask_text for site in recorded.sites] == ["window(5)"]
    assert not recorded.captures[0].notes


@torch.no_grad()
def test_flex_attention_whose_blocks_come_from_another_graph():
    """transformers asks whether the padding is all ones: a graph break between the block mask and the attention."""
    made, other = model("mistral", "flex_attention"), model("mistral", "eager")
    ids = torch.randint(0, 64, (2, N), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch._dynamo.reset()
    recorded = Recorded()
    found = torch.compile(made, backend=recorded)(ids, attention_mask=mask, use_cache=False).logits
    wanted = other(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=1e-5)
    assert [str(site.refusal) for site in recorded.sites] == ["None"]
    assert recorded.sites[0].address.endswith("layers.0.self_attn") and "window(6)" in recorded.sites[0].mask_text


@pytest.mark.parametrize("kept", [0, 5, 9])
def test_arguments_of_fused_operators_are_bound_by_name(kept):
    """However many are given by position."""
    wanted = ("q", "k", "v", 8, 2, "w", "b", "ow", "ob", "mask", True, True, 1)
    names = ["query", "key", "value", "embed_dim", "num_head", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"]
    named = dict(zip(names, wanted[:9], strict=True))
    for target in (torch._native_multi_head_attention, torch.ops.aten._native_multi_head_attention.default):
        rest = {"mask_type": 1} | {name: named[name] for name in reversed(names[kept:])} | {"mask": "mask"}
        assert bound(target, wanted[:kept], rest) == wanted
