"""Compensation (RazorAttention): one key for all that a head drops, against its formula in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsify
from sparsify.errors import InputError
from sparsify.patterns import causal, compensation, dense, expr, sinks, topk, window
from sparsify.patterns.presets import razor_head
from sparsify.spec import Spec

RAZOR = (sinks(2) | window("N/8 + 3")) & causal()


@pytest.fixture(autouse=True)
def _null_target(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")


def razor(q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray, usable: np.ndarray, scale: float):
    """One head's row (D,) and its sum of weights, by the paper's formula: the means are of what is usable, not kept."""
    weights, values = list(np.exp(k[kept & usable] @ q * scale)), list(v[kept & usable])
    away = usable & ~kept
    if away.any():
        weights.append(away.sum() * np.exp(q @ k[away].mean(0) * scale))
        values.append(v[away].mean(0))
    total = sum(weights)
    return (sum(w * value for w, value in zip(weights, values, strict=True)) / total if weights else 0 * v[0]), total


def expected(q, k, v, kept, usable, scale):
    """The same of all heads: kept bool (B, H, Nk), usable bool (B, Nk)."""
    q, k, v = (t.double().numpy() for t in (q, k, v))
    group, out, lse = q.shape[1] // k.shape[1], np.zeros((*q.shape[:2], 1, v.shape[-1])), np.zeros(q.shape[:3])
    for b, h in np.ndindex(q.shape[:2]):
        row = razor(q[b, h, 0], k[b, h // group], v[b, h // group], kept[b, h].numpy(), usable[b].numpy(), scale)
        out[b, h, 0], lse[b, h, 0] = row[0], np.log(row[1]) if row[1] else -np.inf
    return torch.from_numpy(out), torch.from_numpy(lse)


def inputs(keys: int = 60, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, h, n, 16, generator=g).to(dtype) for h, n in ((6, 1), (2, keys), (2, keys)))


def padding(keys: int) -> torch.Tensor:
    """Padding at the left, none, and a row of the batch that has no key at all."""
    return torch.arange(keys) >= torch.tensor([[17], [0], [keys]])


RULES = {
    "all heads": [RAZOR] * 6,
    "one head": [RAZOR] + [dense()] * 5,
    "groups": [RAZOR] * 3 + [window(5)] * 3,
    "by head": [RAZOR, sinks(7), RAZOR, dense(), RAZOR, expr("k % 3 == h % 2")],
    "everything dropped": [expr("k < 0")] * 6,
}


EACH = [(name, padded, "null") for name in RULES for padded in (False, True)]


@pytest.mark.parametrize(("name", "padded", "target"), [*EACH, ("by head", True, "cpp")])
def test_it_is_the_formula(name, padded, target, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", target)
    (q, k, v), usable = inputs(), padding(60) if padded else torch.ones(3, 60, dtype=torch.bool)
    kept = torch.cat([rule.mask(6, 1, 60)[h, :, :] for h, rule in enumerate(RULES[name])]).expand(3, -1, -1)
    mask = usable[:, None, None] if padded else None
    out, lse = expected(q, k, v, kept, usable, 0.25)
    rules = [rule & compensation() for rule in RULES[name]]
    found = sparsify.attention(q, k, v, rules, mask=mask, return_lse=True)
    torch.testing.assert_close(found[0].double(), out, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(found[1].double(), lse, atol=2e-6, rtol=2e-5)


def test_heads_without_it_are_as_they_were():
    q, k, v = inputs()
    mixed = sparsify.attention(q, k, v, [RAZOR & compensation(), RAZOR] * 3)
    plain = sparsify.attention(q, k, v, RAZOR)
    assert torch.equal(mixed[:, 1::2], plain[:, 1::2]) and not torch.isclose(mixed[:, ::2], plain[:, ::2]).any(-1).all()


def test_padding_is_in_no_mean():
    q, k, v = inputs(200)
    usable = (torch.arange(200) >= 64).expand(3, -1)
    k[:, :, :64], v[:, :, :64] = torch.nan, torch.nan
    kept = window(5).mask(6, 1, 200)[None, :, 0].expand(3, -1, -1)
    found = sparsify.attention(q, k, v, window(5) & compensation(), mask=usable[:, None, None])
    torch.testing.assert_close(found.double(), expected(q, k, v, kept, usable, 0.25)[0], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Sums of thousands of keys are no numbers of 16 bits."""
    q, k, v = inputs(5000, dtype)
    k, v = k + 9, v + 20
    kept = RAZOR.mask(6, 1, 5000)[None, :, 0].expand(3, -1, -1)
    out = expected(q, k, v, kept, torch.ones(3, 5000, dtype=torch.bool), 0.25)[0]
    found = sparsify.attention(q, k, v, RAZOR & compensation())
    torch.testing.assert_close(found.double(), out, atol=0.0, rtol=2 * torch.finfo(dtype).eps)


def test_equal_keys_are_dense_attention():
    """Where all dropped keys are equal the compensated weight is exactly theirs."""
    q, k, v = inputs()
    kept = RAZOR.mask(1, 1, 60)[0, 0]
    k[:, :, ~kept] = k[:, :, 10:11]
    found = sparsify.attention(q.double().float(), k, v, RAZOR & compensation())
    torch.testing.assert_close(found, sparsify.attention(q, k, v, causal()), atol=2e-6, rtol=2e-5)


def test_keys_after_the_query_are_not_dropped_ones():
    q, k, v = inputs()
    found = sparsify.attention(q, k, v, RAZOR & compensation(), q_offset=40)
    usable = (torch.arange(60) <= 40).expand(3, -1)
    kept = RAZOR.mask(6, 1, 60, 40)[None, :, 0].expand(3, -1, -1)
    torch.testing.assert_close(found.double(), expected(q, k, v, kept, usable, 0.25)[0], atol=2e-6, rtol=2e-5)


def test_it_compiles_to_one_graph_for_all_lengths():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    attend = torch.compile(
        lambda q, k, v: sparsify.attention(q, k, v, razor_head(2, "N/5")), backend=backend, fullgraph=True
    )
    torch._dynamo.reset()
    for keys in (40, 61, 95):
        q, k, v = inputs(keys)
        torch.testing.assert_close(attend(q, k, v), sparsify.attention(q, k, v, razor_head(2, "N/5")))
    assert len(graphs) == 2


BAD = [
    (
        lambda q, k: sparsify.attention(k, k, k, RAZOR & compensation()),
        "compensation serves decode, one query, and this",
    ),
    (
        lambda q, k: sparsify.attention(q, k, k, RAZOR & compensation(), mask=torch.zeros(1, 60)),
        "compensation needs scores without biases, and a mask that is added has none for a mean of keys; give a mask",
    ),
    (
        lambda q, k: sparsify.attention(q, k, k, RAZOR | compensation()),
        "compensation is for all that a head drops: combine it by & with the whole of the pattern",
    ),
    (
        lambda q, k: sparsify.attention(q, k, k, topk(2, 8, queries=1) & compensation()),
        "compensation is for what positions drop, and the head has a selection, too; give it one",
    ),
    (lambda q, k: sparsify.attention(q, k, k, ~compensation()), "a selection can't be negated"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_it_can_not_serve_is_told(call, message):
    q, k, _ = inputs()
    with pytest.raises(InputError) as caught:
        call(q, k)
    assert str(caught.value).startswith(f"attention: pattern: {message}")


def attend(module, q, k, v, attention_mask, scaling=None, **rest):
    """An attention function for transformers: the formula at each decoding step, for the first three heads."""
    if q.shape[2] > 1:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, attention_mask, scaling=scaling, **rest)
    usable = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool)
    if attention_mask is not None:
        usable = attention_mask[:, 0, 0, : k.shape[2]].expand(q.shape[0], -1)
        usable = usable if usable.dtype == torch.bool else usable > -1
    key = torch.arange(k.shape[2])
    last = torch.where(usable, key, -1).amax(-1, keepdim=True)  # the query's own
    kept = ((key < 2) | (last - key < 5)) & (key <= last)
    kept = torch.stack([kept, kept, kept, torch.ones_like(kept)], 1)
    return expected(q, k, v, kept, usable, scaling)[0].to(q.dtype).transpose(1, 2).contiguous(), None


def llama(attention: str = "sdpa") -> nn.Module:
    """Weights large enough that heads tell keys apart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).eval()
    made.generation_config.disable_compile = True
    made.set_attn_implementation(attention)
    return made


def generated(made: nn.Module, cache: str | None, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the logits of each step."""
    ids = torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, : 6 * padded] = 0
    options = {} if cache is None else {"cache_implementation": cache}
    steps = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = made.generate(
        ids, attention_mask=mask, **steps, **options, return_dict_in_generate=True, output_logits=True
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize(  # a cache that grows is test_it_compiles_to_one_graph_for_all_lengths', too
    ("cache", "padded"), [("static", True), pytest.param(None, True, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_model_decodes_by_the_rule(cache, padded):
    ALL_ATTENTION_FUNCTIONS.register("razor", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("razor", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    (wanted, logits), dense_logits = generated(llama("razor"), cache, padded), generated(llama(), cache, padded)[1]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = llama()
    heads = {"0-2": {"razor_head": {"sinks": 2, "recent": 5}}, "3": "dense"}
    options = {"spec": {"version": 1, "sites": [{"phase": "decode", "heads": heads}]}, "strict": True}
    made.forward = torch.compile(
        made.forward, backend="sparsify", options=options | {"target": "null", "inner": "eager"}
    )
    tokens, found = generated(made, cache, padded)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(dense_logits, logits, atol=1e-2, rtol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


class Attention(nn.Module):
    """One query over given keys, with a cap or a bias."""

    def __init__(self, cap: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.cap, self.bias = cap, bias

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT * 0.25
        scores = torch.tanh(scores / 5) * 5 if self.cap else scores
        scores = scores + 0.1 * torch.arange(k.shape[2]) if self.bias else scores
        return torch.softmax(scores, -1) @ v


COMPENSATED = {"version": 1, "sites": [{"kind": "cross", "heads": {"razor_head": {"sinks": 2, "recent": 9}}}]}
REFUSED = [
    (Attention(cap=True), 1, "the model caps its scores, and the score of a mean of keys stands for theirs without a"),
    (Attention(bias=True), 1, "the model adds biases to its scores, and a mean of keys has no position to have one"),
    (Attention(), 4, "compensation serves decode, and this is prefill"),
]


@pytest.mark.parametrize(("model", "queries", "reason"), REFUSED, ids=["cap", "bias", "prefill"])
def test_sites_that_it_can_not_serve_are_refused(model, queries, reason):
    q, k = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 40, 16)
    with torch.no_grad():
        report = sparsify.explain(model, q, k, k, spec=COMPENSATED, target="null")
    (site,) = report.sites
    assert site.refusal.reason.startswith(reason)
    assert site.refusal.hint == ("give the spec's rule `phase: decode`" if queries > 1 else "")


def test_inductor_fuses_it():
    q, k, v = inputs(50)
    k, v = (t.repeat_interleave(3, 1) for t in (k, v))
    with torch.no_grad():
        torch._dynamo.reset()
        run = torch.compile(Attention(), backend="sparsify", options={"spec": COMPENSATED, "strict": True})
        found = run(q, k, v)
    kept = ((sinks(2) | window(9)) & causal()).mask(6, 1, 50)[None, :, 0].expand(3, -1, -1)
    usable = torch.ones(3, 50, dtype=torch.bool)
    torch.testing.assert_close(found.double(), expected(q, k, v, kept, usable, 0.25)[0], atol=2e-6, rtol=2e-5)


def test_a_spec_says_it():
    document = {"version": 1, "sites": [{"heads": {"all": [{"sinks": 4}, "compensation"]}}]}
    spec = Spec.of(document)
    assert spec.rules[0].groups[0].pattern == sinks(4) & compensation()
    assert Spec.of(spec.to_dict()) == spec and str(compensation()) == "compensation()"
    assert razor_head(4, 9, compensation=False).keep() == ((sinks(4) | window(9)) & causal()).keep()
    assert razor_head(4, 9).pattern == (sinks(4) | window(9)) & causal() & compensation()
