"""Greedy decoding with selections: the tokens of a plain-torch restatement of the rule, with both caches."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS, PAGE, PAGES, TOKENS = 4, 4, 2, 6

QUEST = {"select": {
    "budget": {"rule": "topk", "value": PAGES}, "unit": {"k": PAGE}, "heads": {"scope": "head"},
    "score": {"kview": "minmax", "combine": "upper_bound"}, "force": {"local": 1},
    "phase": "decode", "dense_layers": "0-1",
}}  # fmt: skip
TIDAL = {"select": {
    "budget": {"rule": "topk", "value": TOKENS}, "heads": {"scope": "head"}, "phase": "decode", "dense_layers": "0",
    "reuse": {"layers": {1: 2}, "source": "dense"},
}}  # fmt: skip


def quest(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    """bool (H, N) of one sequence: for each head the best pages by the bound, and the page of the query."""
    if layer < 2:
        return usable.expand(q.shape[0], -1)
    keep = torch.zeros(q.shape[0], len(usable), dtype=torch.bool)
    last = int(usable.nonzero().max())
    for h in range(q.shape[0]):
        bound = {}
        for page in range(last // PAGE):
            at = [t for t in range(page * PAGE, page * PAGE + PAGE) if usable[t]]
            if at:
                low, high = k[h, at].amin(0), k[h, at].amax(0)
                bound[page] = float(torch.maximum(q[h] * low, q[h] * high).sum())
        best = sorted(bound, key=lambda page: (-bound[page], page))[:PAGES]
        for page in (*best, last // PAGE):
            keep[h, page * PAGE : (page + 1) * PAGE] = True
    return keep & usable


def tidal(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    """Layer 0 is dense, layer 1 selects and is dense, 2 takes its tokens, 3 selects for itself."""
    everything = usable.expand(q.shape[0], -1)
    if layer in (1, 3):
        score = (q[:, None] * k).sum(-1).masked_fill(~usable, -torch.inf)
        best = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, : min(TOKENS, int(usable.sum()))]
        state["tokens"] = torch.zeros_like(everything).scatter(-1, best, True)
    return everything if layer < 2 else state["tokens"]


def reference(rule, caches: dict):
    """An attention function for transformers that runs a rule at each decoding step."""

    def attend(module, q, k, v, attention_mask, scaling=None, **rest):
        if q.shape[2] > 1:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, attention_mask, scaling=scaling, **rest)
        group, usable = q.shape[1] // k.shape[1], torch.ones(q.shape[0], k.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            usable = attention_mask[:, 0, 0, : k.shape[2]].expand(q.shape[0], -1)
            usable = usable if usable.dtype == torch.bool else usable > -1
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        keep = torch.stack([rule(module.layer_idx, q[b, :, 0], k[b], usable[b], caches.setdefault(b, {}))
                            for b in range(len(q))])  # fmt: skip
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, :, None], scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return attend


def llama(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=64, max_position_embeddings=128)
    made = transformers.LlamaForCausalLM(config).eval()
    made.set_attn_implementation(attention)
    return made


def generated(made: nn.Module, cache: str | None, padded: bool, steps: int = 14) -> torch.Tensor:
    ids = torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
    made.generation_config.disable_compile = True
    options = {} if cache is None else {"cache_implementation": cache}
    return made.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                         pad_token_id=0, **options)  # fmt: skip


SLOW = pytest.mark.slow
RUNS = [
    pytest.param(quest, QUEST, None, True, id="quest dynamic padded"),
    pytest.param(tidal, TIDAL, "static", False, id="tidal static"),
    pytest.param(quest, QUEST, "static", False, id="quest static", marks=SLOW),
    pytest.param(quest, QUEST, None, False, id="quest dynamic", marks=SLOW),
    pytest.param(tidal, TIDAL, None, True, id="tidal dynamic padded", marks=SLOW),
    pytest.param(tidal, TIDAL, None, False, id="tidal dynamic", marks=SLOW),
]


@pytest.mark.parametrize(("rule", "heads", "cache", "padded"), RUNS)
@torch.no_grad()
def test_tokens_are_those_of_the_rule(rule, heads, cache, padded):
    ALL_ATTENTION_FUNCTIONS.register("reference", reference(rule, {}))
    ALL_MASK_ATTENTION_FUNCTIONS.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    wanted = generated(llama("reference"), cache, padded)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = llama()
    spec = {"version": 1, "sites": [{"phase": "decode", "heads": heads}]}
    options = {"spec": spec, "strict": True, "target": "null", "inner": "eager"}
    made.forward = torch.compile(made.forward, backend="sparsify", options=options)
    assert torch.equal(generated(made, cache, padded), wanted)
    assert not torch.equal(generated(llama(), cache, padded), wanted), "dense attention says the same"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]
