"""Greedy decoding with selections: the tokens of a plain-torch restatement of the rule, with both caches."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DECAY = 0.8
PAGE, PAGES, TOKENS, STEPS = 4, 3, 6, 12
EVERY, COSINE = 3, 0.1

QUEST = {"quest": {"budget": PAGES * PAGE, "page": PAGE}}
TIDAL = {"tidal_decode": {"tokens": TOKENS, "reselect": 4, "layers": 6}}
HELD = {"select": {
    "budget": {"rule": "topk", "value": PAGES}, "unit": {"k": PAGE}, "heads": {"scope": "head"},
    "score": {"kview": "minmax", "combine": "upper_bound"}, "force": {"local": 1}, "reuse": {"every": EVERY},
}}  # fmt: skip
ALIKE = {"token_select": {"tokens": TOKENS, "sinks": 2, "local": 3, "cosine": COSINE}}
SUMMED = {"select": {
    "budget": {"rule": "topk", "value": TOKENS}, "heads": {"scope": "kv_group", "op": "sum"}, "force": {"local": 1},
    "score": {"norm": "accumulated", "decay": DECAY, "history": 64},
}}  # fmt: skip


def best(score: torch.Tensor, count: int, usable: torch.Tensor) -> torch.Tensor:
    """bool of the `count` greatest scores (..., n) that are usable, ties to the lowest."""
    order = torch.sort(score.masked_fill(~usable, -torch.inf), dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(score, dtype=torch.bool)
    return kept.scatter(-1, order[..., : min(count, int(usable.sum()))], True) & usable


def pages(q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """bool (H, N): for each head the best pages by the bound, but that of the query."""
    keep, last = torch.zeros(q.shape[0], len(usable), dtype=torch.bool), int(usable.nonzero().max())
    for h in range(q.shape[0]):
        bound = {}
        for page in range(last // PAGE):
            at = [t for t in range(page * PAGE, page * PAGE + PAGE) if usable[t]]
            if at:
                low, high = k[h, at].amin(0), k[h, at].amax(0)
                bound[page] = float(torch.maximum(q[h] * low, q[h] * high).sum())
        for page in sorted(bound, key=lambda page: (-bound[page], page))[:PAGES]:
            keep[h, page * PAGE : (page + 1) * PAGE] = True
    return keep


def own_page(usable: torch.Tensor) -> torch.Tensor:
    at = torch.arange(len(usable))
    return at // PAGE == at[usable].max() // PAGE


def quest(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    """bool (H, N) of one sequence: the best pages and that of the query; layers 0 and 1 are dense."""
    return usable.expand(q.shape[0], -1) if layer < 2 else (pages(q, k, usable) | own_page(usable)) & usable


def tidal(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    """Layers 0 and 1 are dense, 2 and 4 choose tokens and are dense, 3 and 5 take them."""
    if layer in (2, 4):
        state["tokens"] = best((q[:, None] * k).sum(-1), TOKENS, usable)
    return state["tokens"] if layer in (3, 5) else usable.expand(q.shape[0], -1)


def both(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    """Two heads by quest, two by tidal_decode."""
    return torch.cat([quest(layer, q, k, usable, state)[:2], tidal(layer, q, k, usable, state)[2:]])


def dense(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    return usable.expand(q.shape[0], -1)


def held(layer: int, q: torch.Tensor, k: torch.Tensor, usable: torch.Tensor, state: dict) -> torch.Tensor:
    """Layer 0 chooses pages at every third step; layer 1 chooses tokens when its mean query has turned away; layer 2
    at each step, by all attention that was paid to them so far. A choice is all that was kept then."""
    mine, own = state.setdefault(layer, {"age": EVERY}), q.mean(0)
    if layer == 0:
        if mine["age"] == EVERY:
            mine |= {"age": 0, "kept": pages(q, k, usable) | own_page(usable)}
        mine["age"] += 1
        return (grown(mine["kept"], usable) | own_page(usable)) & usable
    score = (q[:, None] * k).sum(-1) * q.shape[-1] ** -0.5
    if layer == 2:
        weights = torch.softmax(score.masked_fill(~usable, -torch.inf), -1)
        mine["sums"] = weights + (DECAY * grown(mine["sums"], usable) if "sums" in mine else 0)
        last = torch.arange(len(usable)) == usable.nonzero().max()
        groups = mine["sums"].unflatten(0, (-1, 2)).sum(1).repeat_interleave(2, 0)
        return best(groups, TOKENS, usable & ~last) | last
    place = usable.cumsum(0) - 1
    ends = (place < 2) | (place > place.max() - 3)
    if "kept" not in mine or torch.cosine_similarity(own, mine["query"], dim=0) < COSINE:
        weights = torch.softmax(score.masked_fill(~usable | ends, -torch.inf), -1)
        mine |= {"kept": best(weights.sum(0), TOKENS, usable & ~ends) | ends, "query": own}
        state["choices"] = state.get("choices", 0) + 1
    return ((grown(mine["kept"], usable) | ends) & usable).expand(q.shape[0], -1)


def grown(kept: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """What an earlier step kept, among the keys of now."""
    return nn.functional.pad(kept, (0, len(usable) - kept.shape[-1]))


def reference(rule, sequences: dict):
    """An attention function for transformers that runs a rule at each decoding step."""

    def attend(module, q, k, v, attention_mask, scaling=None, **rest):
        if q.shape[2] > 1:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, attention_mask, scaling=scaling, **rest)
        group, usable = q.shape[1] // k.shape[1], torch.ones(q.shape[0], k.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            usable = attention_mask[:, 0, 0, : k.shape[2]].expand(q.shape[0], -1)
            usable = usable if usable.dtype == torch.bool else usable > -1
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        keep = torch.stack([rule(module.layer_idx, q[b, :, 0], k[b], usable[b], sequences.setdefault(b, {}))
                            for b in range(len(q))])  # fmt: skip
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, :, None], scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return attend


def llama(layers: int, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=64, max_position_embeddings=128)
    made = transformers.LlamaForCausalLM(config).eval()
    made.set_attn_implementation(attention)
    return made


def generated(made: nn.Module, cache: str | None, padded: bool) -> torch.Tensor:
    ids = torch.randint(1, 64, (2, 21), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
    made.generation_config.disable_compile = True
    options = {} if cache is None else {"cache_implementation": cache}
    return made.generate(ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
                         pad_token_id=0, **options)  # fmt: skip


def expected(rule, layers: int, cache: str | None, padded: bool) -> tuple[torch.Tensor, dict]:
    """The tokens of a rule, and what it noted of each sequence."""
    sequences: dict = {}
    ALL_ATTENTION_FUNCTIONS.register("reference", reference(rule, sequences))
    ALL_MASK_ATTENTION_FUNCTIONS.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return generated(llama(layers, "reference"), cache, padded), sequences


def decoding(made: nn.Module, sites: list) -> nn.Module:
    """The model with its decoding steps compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"spec": {"version": 1, "sites": sites}, "strict": True, "target": "null", "inner": "eager"}
    plain, fast = made.forward, torch.compile(made.forward, backend="sparsify", options=options, dynamic=True)

    @functools.wraps(plain)  # generate reads the signature
    def forward(*args, **kwargs):
        return (fast if kwargs["input_ids"].shape[1] == 1 else plain)(*args, **kwargs)

    made.forward = forward
    return made


BOTH = {"0-1": QUEST, "rest": TIDAL}
RUNS = [
    pytest.param(both, BOTH, None, True, id="both dynamic padded"),
    pytest.param(both, BOTH, "static", False, id="both static", marks=pytest.mark.slow),
    pytest.param(quest, QUEST, None, False, id="quest dynamic", marks=pytest.mark.slow),
    pytest.param(quest, QUEST, "static", True, id="quest static padded", marks=pytest.mark.slow),
    pytest.param(tidal, TIDAL, None, False, id="tidal_decode dynamic", marks=pytest.mark.slow),
    pytest.param(tidal, TIDAL, "static", True, id="tidal_decode static padded", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("rule", "heads", "cache", "padded"), RUNS)
@torch.no_grad()
def test_tokens_are_those_of_the_rule(rule, heads, cache, padded):
    wanted, _ = expected(rule, 6, cache, padded)
    made = decoding(llama(6), [{"phase": "decode", "heads": heads}])
    assert torch.equal(generated(made, cache, padded), wanted)
    for other in (dense, quest, tidal):
        same = other is rule or not torch.equal(expected(other, 6, cache, padded)[0], wanted)
        assert same, f"{other.__name__} says the same"
    one_graph()


@pytest.mark.slow
@torch.no_grad()
def test_choices_and_sums_that_hold_for_steps():
    wanted, sequences = expected(held, 3, None, False)
    sites = [{"phase": "decode", "layers": layer, "heads": heads} for layer, heads in enumerate((HELD, ALIKE, SUMMED))]
    assert torch.equal(generated(decoding(llama(3), sites), None, False), wanted)
    assert all(1 < state["choices"] < STEPS - 1 for state in sequences.values()), "the bound of the cosine decides"
    assert not torch.equal(generated(llama(3), None, False), wanted), "dense attention says the same"
    one_graph()


def one_graph() -> None:
    """The steps are one graph: none broke, and none was compiled again."""
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
