"""Lengths and caches: how often the backend compiles while they grow, and that greedy decoding says the same."""

from __future__ import annotations

import pytest
import torch
import transformers
from captures import compiled, model

EAGER = {"target": "null", "inner": "eager"}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def fresh(**options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return {"backend": "sparsify", "options": EAGER | options}


def near(q, k, v):
    rows = torch.arange(q.shape[2])
    keep = (rows[:, None] >= rows) & (rows[:, None] - rows < 16)
    return (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ v


@torch.no_grad()
def test_lengths_up_to_8192_compile_twice():
    """Once for 1, which Dynamo always makes a graph of its own, and once for all others."""
    run = torch.compile(near, **fresh(target="cpp", strict=True), fullgraph=True)
    for length in (64, 1, 2, 3, 17, 128, 1000, 8192):
        given = [torch.randn(1, 1, length, 8) for _ in range(3)]
        for tensor in given if length > 1 else ():
            torch._dynamo.mark_dynamic(tensor, 2)
        found = run(*given)
        if length <= 1000:
            torch.testing.assert_close(found, near(*given), atol=2e-5, rtol=2e-5)
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "sparsify"])
@torch.no_grad()
def test_lengths_that_dynamo_learns_by_itself(backend):
    """64 and 1 are graphs of their own, then lengths are symbolic: as often as a backend that adds no guard."""
    made, options = model("gemma2", "eager"), fresh()
    run = torch.compile(made, **(options if backend == "sparsify" else {"backend": backend}))
    for length in (64, 1, 2, 16, 33):
        run(torch.ones(2, length, dtype=torch.long), use_cache=False)
    assert graphs() == 3


def generated(made, batch: int, steps: int, cache: str | None) -> torch.Tensor:
    ids = torch.randint(1, 64, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :4] = mask[2, :2] = 0
    made.generation_config.disable_compile = True  # its own; ours is around `forward`
    options = {} if cache is None else {"cache_implementation": cache}
    return made.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                         pad_token_id=0, **options)  # fmt: skip


def check_generation(name: str, how: str, batch: int, steps: int, cache: str | None) -> None:
    wanted = generated(model(name, how), batch, steps, cache)
    made = model(name, how)
    made.forward = torch.compile(made.forward, **fresh(strict=True))
    assert torch.equal(generated(made, batch, steps, cache), wanted)
    assert graphs() <= 3


GENERATED = [("llama", "sdpa", 1, None), pytest.param("llama", "eager", 4, "static", marks=pytest.mark.slow),
             ("mistral", "sdpa", 4, None), ("gemma2", "eager", 1, "static")]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "batch", "cache"), GENERATED)
@torch.no_grad()
def test_generation_recompiles_at_most_twice(name, how, batch, cache):
    """Prefill, one step, and steps of any length; windows roll over in 16 steps."""
    check_generation(name, how, batch, 16, cache)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("name", "how"), [("llama", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gpt2", "sdpa")]
)
@torch.no_grad()
def test_long_generation_recompiles_at_most_twice(name, how, batch, cache):
    check_generation(name, how, batch, 118, cache)  # as long as the tiny models' positions allow


def spec_of(**pattern) -> dict:
    return {"version": 1, "sites": [{"match": "*", "heads": pattern}]}


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
@torch.no_grad()
def test_patterns_over_a_cache_that_rolls(cache):
    """A window means the same wherever the keys begin. Sinks don't: right while nothing was dropped, refused after."""
    made = model("mistral", "sdpa")  # a cache of 6
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(3))
    for pattern in ({"window": 3}, {"sinks": 1, "window": 3}):
        past = transformers.DynamicCache(config=made.config)
        if cache == "static":
            past = transformers.StaticCache(config=made.config, max_cache_len=24)
        run, recorded = compiled(made, spec=spec_of(**pattern))
        parts = [run(part, past_key_values=past).logits for part in ids.split([5, *[1] * 5], 1)]
        refused = {site.refusal.reason for site in recorded.sites if site.refusal is not None}
        if "sinks" in pattern:
            assert refused == {"the spec's pattern depends on absolute positions, and the cache drops its oldest keys"}
        else:
            assert not refused
            whole = compiled(made, spec=spec_of(**pattern))[0](ids, use_cache=False).logits
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_sinks_over_a_cache_that_grows_are_taken():
    made, ids = model("llama", "sdpa"), torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(3))
    run, recorded = compiled(made, spec=spec_of(sinks=1, window=3))
    past = transformers.DynamicCache(config=made.config)
    for part in ids.split([4, *[1] * 8], 1):
        run(part, past_key_values=past)
    assert all(site.refusal is None for site in recorded.sites)
