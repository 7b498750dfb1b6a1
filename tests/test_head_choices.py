"""What heads may choose, and the borders of selections: unions, empty tensors, offsets, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import sparsify
from sparsify import patterns as p
from sparsify.errors import InputError, PatternError, RefusedError
from sparsify.patterns import presets as pre
from sparsify.program import Skip
from sparsify.spec import Spec

EAGER = {"inner": "eager", "crossover": False}
MEANS = {"qview": "mean", "kview": "mean"}
TOP = p.select(budget={"rule": "topk", "value": 2}, unit={"q": 8, "k": 4}, score=MEANS, force={"local": 1})


def drawn(q_len: int, k_len: int | None = None) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    k_len = q_len if k_len is None else k_len
    return tuple(torch.randn(1, h, n, 8, generator=g) for h, n in ((4, q_len), (2, k_len), (2, k_len)))


def weights(q: torch.Tensor, k: torch.Tensor, pattern: p.Pattern) -> torch.Tensor:
    """The attention itself: that of values which tell keys apart."""
    return sparsify.attention(q, k, torch.eye(k.shape[2]).expand(1, 2, -1, -1), pattern)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def test_a_selection_is_causal_wherever_causal_stands():
    q, k, v = drawn(75)
    one = sparsify.attention(q, k, v, p.causal() & (TOP | p.sinks(3)))
    other = sparsify.attention(q, k, v, (p.causal() & TOP) | (p.causal() & p.sinks(3)))
    assert torch.equal(one, other)
    free = sparsify.attention(q, k, v, TOP | p.causal())
    assert not torch.allclose(free, sparsify.attention(q, k, v, p.causal()))


def test_sorted_keys_beside_keys_that_all_queries_see():
    q, k, v = drawn(75)
    sorted_ = pre.pbs_attn(0.4, 8, 16, 10)
    keep = weights(q, k, sorted_) > 0
    keep[..., :2] = True
    found = sparsify.attention(q, k, v, sorted_ | p.sinks(2))
    torch.testing.assert_close(found, dense(q, k, v, keep), atol=2e-5, rtol=2e-5)


def test_what_is_skipped_online_is_never_the_best():
    """Where N is below the share that it divides, and with a list beside it."""
    assert Skip(1000.0, by_length=True).below(500) == 0 and Skip(0.5).below(500) == -1
    q, k, v = drawn(60)  # the keys of one tile
    torch.testing.assert_close(
        sparsify.attention(q, k, v, pre.blasst()), sparsify.attention(q, k, v, p.causal()), atol=2e-5, rtol=2e-5
    )
    kept, (q, k, v) = p.causal() & TOP, drawn(75)
    assert torch.equal(sparsify.attention(q, k, v, kept & p.online(1e-9)), sparsify.attention(q, k, v, kept))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (p.online(0.9) | p.window(64), "online leaves out of all that a head keeps, so combine it by & (all), not in"),
        (p.online(0.9) & p.online(0.5), "a head has two budgets `online`; give it one"),
        (TOP & p.topk(3), "a head has two selections, which could choose a key twice; give it one"),
        (~TOP, "a selection can't be negated: a kernel only goes where a list leads"),
    ],
)
def test_what_a_head_cannot_have_is_told(pattern, message):
    q, k, v = drawn(16)
    with pytest.raises(InputError) as caught:
        sparsify.attention(q, k, v, pattern)
    assert str(caught.value).startswith(f"attention: pattern: {message}")
    spec = Spec(patterns={"mine": pattern}, sites=[{"match": "*", "heads": "mine"}])
    run = torch.compile(
        F.scaled_dot_product_attention, backend="sparsify", options={"spec": spec, "strict": True, **EAGER}
    )
    with pytest.raises(RefusedError) as caught:
        run(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 9), (4, 0), (0, 0)])
def test_nothing_to_attend_is_0(q_len, k_len):
    for pattern in (TOP, p.causal() & TOP, p.window(3)):
        found = sparsify.attention(*drawn(q_len, k_len), pattern)
        assert found.shape == (1, 4, q_len, 8) and not found.any()


def test_masks_without_dimensions_and_offsets_serve_selections():
    q, k, v = drawn(20, 75)
    pattern = p.causal() & TOP
    plain = sparsify.attention(q, k, v, pattern)
    assert torch.equal(sparsify.attention(q, k, v, pattern, mask=torch.tensor(True)), plain)
    assert torch.equal(sparsify.attention(q, k, v, pattern, q_offset=55), plain)
    early = sparsify.attention(q, k, v, pattern, q_offset=30)
    torch.testing.assert_close(early, sparsify.attention(q, k[:, :, :50], v[:, :, :50], pattern), atol=2e-5, rtol=2e-5)


def test_a_mask_that_needs_gradients_is_refused():
    mask = torch.zeros(16, 16, requires_grad=True)
    with pytest.raises(InputError, match="gradients are not supported yet"):
        sparsify.attention(*drawn(16), p.causal(), mask=mask)


def test_a_share_of_little_is_still_one_unit():
    q, k, _ = drawn(40)
    tiny = p.select(budget={"rule": "ratio", "value": 1e-12}, unit={"q": 1, "k": 8}, score={"kview": "mean"})
    assert ((weights(q, k, tiny) > 0).sum(-1) == 8).all()


def test_diagonals_of_units_are_kept_where_rows_begin_inside_a_unit():
    """FlexPrefill's first diagonal holds every query's own key, whatever Nk - Nq is."""
    q, k, _ = drawn(64, 80)
    kept = weights(q, k, p.causal() & pre.flex_prefill(0.3, 0.0, 32, 32)) > 0
    assert kept[..., range(64), range(16, 80)].all()


@pytest.mark.parametrize("target", ["null", "cpp"])
def test_not_even_a_nan_is_read_of_what_nobody_keeps(target, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", target)
    q, k, v = drawn(16)
    clean = sparsify.attention(q, k, v, p.causal() & ~p.sinks(3))
    v[:, :, :3] = torch.nan
    assert torch.equal(sparsify.attention(q, k, v, p.causal() & ~p.sinks(3)), clean)


def test_tokens_in_none_of_several_grids_are_named():
    near, far = p.neighborhood([8, 8], 3), p.neighborhood([4, 8], 3, start=64)
    both = p.neighborhood([8, 8], 3, dilation=2) | near
    assert both.fits(96) == (
        'neighborhood.shape: 8 x 8 is 64 tokens, but there are 96 keys; give the others to global_tokens: "64-95"'
    )
    assert (near | far).fits(96) == (both | p.global_tokens(0)).fits(96) == both.fits(64) == ""
    assert (
        pre.swin([7, 7]).fits(50).startswith("swin.shape: 7 x 7 is 49 tokens, but there are 50 keys; give the others")
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: p.topk(0), "topk.keep: expected an integer >= 1, found 0"),
        (lambda: p.topk(1, unit=0), "topk.unit: expected an integer >= 1, found 0"),
        (lambda: p.topk(1, queries=0), "topk.queries: expected an integer >= 1, found 0"),
        (lambda: p.topk(1, scope="hed"), "topk.scope: 'hed' is not known (did you mean 'head'?)"),
        (lambda: p.topk(1, sinks=-1), "topk.sinks: expected an integer >= 0, found -1"),
        (lambda: p.topp(0), "topp.share: expected a number above 0 and at most 1, found 0"),
        (lambda: p.online(2), "online.share: expected a number above 0 and at most 1, found 2"),
        (lambda: p.select({"rule": "topk", "value": 1}, reuse=[]), "reuse: expected a mapping such as"),
        (
            lambda: p.select({"rule": "topk", "value": 3}, dense_layers="0-1", reuse={"layers": {1: "2-5"}}),
            "reuse.layers: layer 1 is to choose for others, and dense_layers keeps it from choosing",
        ),
    ],
)
def test_errors_name_the_fields_that_were_given(build, message):
    with pytest.raises(PatternError) as caught:
        build()
    assert str(caught.value).startswith(message)


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def compiled(spec, **options):
    torch._dynamo.reset()
    return torch.compile(attend, backend="sparsify", options={"spec": spec, **EAGER, **options})


def rules(heads, **fields):
    return {"version": 1, "sites": [{"match": "*", "heads": heads, **fields}]}


def test_a_grid_of_other_tokens_is_an_error_without_strict():
    wrong = rules({"neighborhood": {"shape": [5, 7], "window": 3}})
    with pytest.raises(RefusedError, match="their tokens are not those of the spec's grids") as caught:
        compiled(wrong)(torch.randn(1, 2, 40, 8))
    assert "5 x 7 is 35 tokens, but there are 40 keys" in str(caught.value)
    told = sparsify.explain(attend, torch.randn(1, 2, 40, 8), spec=wrong)
    assert told.sites[0].notes == ("torch.compile raises this refusal: their tokens are not those of the spec's grids",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "option 'learned': the spec asks for the module 'gate'; none was given"),
        ({"gatee": nn.Linear(1, 1)}, "option 'learned': the spec asks for the module 'gate'; did you mean 'gatee'?"),
        ({"gate": "x"}, "option 'learned': gate: expected a torch module, or a list or a mapping by layer of them"),
        ({"gate": []}, "option 'learned': gate: expected a torch module, or a list or a mapping by layer of them"),
    ],
)
def test_modules_that_are_missing_or_none_are_told(given, message):
    spec = rules({"select": {"budget": {"rule": "topk", "value": 2}, "learned": "gate"}})
    with pytest.raises(InputError) as caught:
        compiled(spec, learned=given)(torch.randn(1, 2, 40, 8))
    assert str(caught.value).startswith(message)


def tiny() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)).eval()


@torch.no_grad()
def test_a_phase_holds_for_the_layers_that_a_preset_keeps_dense():
    found = sparsify.explain(tiny(), torch.ones(1, 20, dtype=torch.long), spec=rules("quest"))
    assert [site.refusal.reason for site in found.sites] == ["the selection serves decode, and this is prefill"] * 2


@torch.no_grad()
def test_a_rule_for_the_other_phase_is_no_mistake():
    """A prefill takes the rule without a phase, though a step of decoding would not."""
    spec = {
        "version": 1,
        "sites": [{"match": "*", "phase": "prefill", "heads": "dense"}, {"match": "*", "heads": {"window": 4}}],
    }
    sparsify.explain(tiny(), torch.ones(1, 20, dtype=torch.long), spec=spec)
    spec["sites"][0].pop("phase")
    with pytest.raises(sparsify.SpecError, match=r"earlier rules \(sites\[0\]\) take every site"):
        sparsify.explain(tiny(), torch.ones(1, 20, dtype=torch.long), spec=spec)


class Gate(nn.Module):
    """Scores of so many rows and units, or an error."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q.new_ones(self.shape) if self.shape else q @ k


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (Gate(1, 2, 1, 5), None),
        (Gate(1, 2, 2, 5), "the module 'gate' gives (1, 2, 2, 5), not scores (batch 1, heads 1, 2, rows 1, units 5)"),
        (Gate(2, 2, 1, 5), "the module 'gate' gives (2, 2, 1, 5), not scores (batch 1, heads 1, 2, rows 1, units 5)"),
        (Gate(1, 3, 1, 5), "the module 'gate' gives (1, 3, 1, 5), not scores (batch 1, heads 1, 2, rows 1, units 5)"),
        (Gate(5), "the module 'gate' gives (5,), not scores (batch 1, heads 1, 2, rows 1, units 5)"),
        (Gate(), "the module 'gate' fails for q (1, 2, 40, 8) and k (1, 2, 40, 8): "),
    ],
)
def test_what_a_module_gives_has_to_fit(gate, reason):
    unit = {"q": 64, "k": 8}
    spec = rules({"select": {"budget": {"rule": "topk", "value": 2}, "unit": unit, "learned": "gate"}})
    (site,) = sparsify.explain(attend, torch.randn(1, 2, 40, 8), spec=spec, learned={"gate": gate}).sites
    assert (site.refusal is None) if reason is None else site.refusal.reason.startswith(reason)


def test_kept_gives_the_pairs_of_any_pattern():
    q, k, v = drawn(20, 75)
    mask = torch.rand(1, 1, 1, 75) > 0.2
    mixed = [p.causal() & TOP, p.window(9), p.causal() & TOP, p.dense()]
    for pattern in (p.causal() & (TOP | p.sinks(3)), mixed):
        for given in (mask, torch.where(mask, 0.5, -torch.inf)):
            keep = sparsify.kept(q, k, pattern, mask=given)
            assert keep.shape == (1, 4, 20, 75) and keep.dtype == torch.bool and not (keep & ~mask).any()
            added = torch.zeros(()) if given.dtype == torch.bool else given
            expected = dense(q, k, v, added.masked_fill(~keep, -torch.inf))
            found = sparsify.attention(q, k, v, pattern, mask=given)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    near = p.neighborhood([5, 15], 3)
    assert torch.equal(sparsify.kept(*drawn(75)[:2], near)[0], near.mask(4, 75, 75))
    assert sparsify.kept(*drawn(75)[:2], pre.pbs_attn(0.4, 8, 16, 10)).sum() > 0
    with pytest.raises(InputError, match="attention: mask: expected a shape"):
        sparsify.kept(q, k, near, mask=torch.ones(3, 3, dtype=torch.bool))
