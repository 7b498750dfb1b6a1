"""The zoo: what is found, what is left alone, and that what is rewritten gives the model's numbers."""

from __future__ import annotations

import pytest

from tests.zoo import numerics, record
from tests.zoo.entry import Entry, Variant, variants
from tests.zoo.registry import HELD_OUT, SURVEYED, available
from tests.zoo.table import markdown, total
from tests.zoo.walk import Result, walked

SHARE = 0.97
SPREAD = 1.0  # of the fast ones, none of which is known to be missed; Llama and its kin are in test_capture_models.py
FAST = (
    "gpt_oss eager padded",
    "big_bird_full eager padded",
    "modernbert sdpa padded",
    "t5 eager padded",
    "swin eager plain",
    "diffusers AutoencoderKL eager plain",
    "flex_attention(direct) flex_attention documents",
    "gpt-fast-style gqa decode static",
    "nn.MultiheadAttention(need_weights=False) own causal padded",
)
COMPARED = (
    "mistral_w32 eager padded dynamic",
    "layoutlm sdpa padded",
    "nanoGPT-style eager plain",
    "nn.TransformerEncoder own padded",
    "timm vit (in its style) eager plain dynamic",
)
NAMED = {str(variant): variant for entry in SURVEYED for variant in variants(entry)}


def check(result: Result) -> None:
    """Nothing that is no attention is taken for one, and no pass fails on what Dynamo can capture."""
    assert not result.false, result.missed
    assert result.failed_in != "sparsify", result.error


def check_share(results: list[Result], least: float = SHARE) -> None:
    assert total(results).share >= least, "\n".join(
        f"{result.name}: {result.found} of {result.expected - result.outside}\n  {result.missed}"
        for result in results
        if result.found + result.outside < result.expected
    )


def needed(entry: Entry) -> None:
    if not available(entry):
        pytest.skip(f"{entry.package} is not installed")


def test_a_spread_of_the_zoo_is_caught():
    results = [walked(NAMED[name]) for name in FAST if available(NAMED[name].entry)]
    for result in results:
        check(result)
    check_share(results, SPREAD)


@pytest.mark.parametrize("name", COMPARED)
def test_rewritten_models_give_their_own_numbers(name):
    needed(NAMED[name].entry)
    apart = numerics.difference(NAMED[name])
    assert apart.fine, apart


def test_the_count_of_softmaxes_knows_what_is_attention():
    """The denominator is the real model's: layers and kinds of attention, known here from its architecture."""
    known = {"albert sdpa padded": 2, "bart sdpa plain": 6, "fnet eager plain": 0, "mixtral eager plain": 2}
    for name, sites in known.items():
        assert walked(NAMED[name]).expected == sites


def test_the_table_of_the_readme_is_that_of_the_recorded_walk():
    """After a new walk: `python -m tests.zoo --write`."""
    kept = record.load()
    block = markdown([r for r in kept if not r.held_out], [r for r in kept if r.held_out])
    text = record.README.read_text()
    assert record.readme_with(block, text) == text
    assert {result.entry for result in kept if not result.held_out} == {entry.name for entry in SURVEYED}


WALKED: list[Result] = []


@pytest.mark.slow
@pytest.mark.parametrize("entry", SURVEYED, ids=lambda entry: entry.name)
def test_every_variant_of_the_zoo(entry):
    needed(entry)
    results = [walked(variant) for variant in variants(entry)]
    WALKED.extend(results)
    for result in results:
        check(result)


@pytest.mark.slow
def test_nearly_all_sites_of_the_zoo_are_found():
    check_share(WALKED)


@pytest.mark.slow
@pytest.mark.parametrize("entry", HELD_OUT, ids=lambda entry: entry.name)
def test_held_out_models_have_no_false_match(entry):
    needed(entry)
    for variant in variants(entry):
        if not variant.dynamic:
            check(walked(variant))


@pytest.mark.slow
@pytest.mark.parametrize("entry", SURVEYED, ids=lambda entry: entry.name)
def test_every_model_gives_its_own_numbers(entry):
    needed(entry)
    last: Variant = [variant for variant in variants(entry) if not variant.dynamic][-1]
    apart = numerics.difference(last)
    assert apart.fine, apart
