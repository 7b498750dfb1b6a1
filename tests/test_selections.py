"""Selections on their way through `sparsify.attention` and the backend: what runs is what the selector chose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import sparsify
from sparsify import patterns as p
from sparsify.bench.memory import peak_bytes
from sparsify.codegen import Launch, target
from sparsify.codegen.cpp import ready as calls
from sparsify.codegen.oracle import oracle
from sparsify.errors import InputError, PatternError, RefusedError, SpecError
from sparsify.patterns import presets as pre
from sparsify.patterns.reuse import Reuse
from sparsify.patterns.select import Choice, Selection
from sparsify.runtime import ready
from sparsify.selection import accumulate
from sparsify.selection.site import Ask
from sparsify.selection.steps import Held, buffers, select_again
from sparsify.spec import Spec
from sparsify.text import parse_pred

TARGETS = ["null", "cpp"]
TOP2 = {"rule": "topk", "value": 2}
QUEST = {"topk": {"keep": 2, "unit": 4, "score": "minmax_bound"}}


def llama() -> nn.Module:
    """One layer of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64, max_position_embeddings=256)
    return transformers.LlamaForCausalLM(config).eval()


class Attend(nn.Module):
    """What is traced in a tenth of a Llama's time."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.scaled_dot_product_attention(9 * self.query(x), x, x, is_causal=True)


def layers(count: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Attend() for _ in range(count)))


@pytest.fixture
def launches(monkeypatch):
    """Every launch, checked against the oracle as it runs."""
    seen: list[Launch] = []
    calls._library()  # puts itself there with the first kernel: before, so that nobody stands there then
    for name in ("by_program", "by_pattern"):
        monkeypatch.setattr(ready, name, ready.nobody)
    for name in TARGETS:
        cls = type(target(name))

        def run(self, launch, inner=cls.run):
            out = inner(self, launch)
            tolerance = 2e-5 if launch.q.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out.double(), oracle(launch), atol=tolerance, rtol=tolerance)
            seen.append(launch)
            return out

        monkeypatch.setattr(cls, "run", run)
    return seen


def drawn(q_len: int, k_len: int, seed: int = 0, batch: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, n, 16, generator=g) for h, n in ((4, q_len), (2, k_len), (2, k_len))]


X = torch.randn(2, 4, 40, 16, generator=torch.Generator().manual_seed(0))
BLOCK = p.topk(1, unit=16, queries=16)
PATTERNS = {
    "blocks": p.topk(2, unit=16, queries=16) & p.causal(),
    "with sinks and a window": (p.sinks(3) | p.window(9) | p.topk(1, unit=32, queries=32, local=0)) & p.causal(),
    "heads for themselves": p.topk(2, unit=8, scope="head", queries=16) & p.causal(),
    "a layer together": p.topk(2, unit=8, scope="layer", score="softmax", queries=64) & p.causal(),
    "top p": p.topp(0.7, unit=16, queries=32, phase="both") & p.causal(),
    "lines": p.select(lines={"verticals": 9, "slashes": 20, "first": 2, "last": 6}, unit={"q": 64, "k": 64},
                      score={"qview": "last(16)", "norm": "softmax"}, heads={"scope": "head"}) & p.causal(),
    "both ways": p.topk(2, unit=16, queries=16),
    "mixed": [p.causal(), BLOCK & p.causal(), p.window(5), BLOCK & p.causal()],
}  # fmt: skip


# A kernel each: what is chosen is the same on every target, and how lists run is tested in test_cpp_lists.py.
BUILT = ("lines", "mixed")
RUN = [pytest.param(name, pattern, marks=pytest.mark.slow if name == "cpp" and pattern not in BUILT else ())
       for pattern in PATTERNS for name in TARGETS]  # fmt: skip


@pytest.mark.parametrize(("name", "pattern"), RUN)
def test_attention_runs_what_was_chosen(pattern, name, launches, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", name)
    for q_len, k_len in ((70, 70), (33, 150)):
        sparsify.attention(*drawn(q_len, k_len), PATTERNS[pattern])
    assert len(launches) == 2 and launches[0].program.loads in (2, 4)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_budget_beyond_the_keys_is_dense(q_len, name, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", name)
    q, k, v = drawn(q_len, 100)
    mask = torch.rand(2, 1, 1, 100, generator=torch.Generator().manual_seed(1)) > 0.3
    seen = p.causal().mask(4, q_len, 100)
    for unit, given in ((1, None), (16, mask), (1, torch.where(mask, 0.5, -torch.inf)))[name == "cpp" :]:
        pattern = p.topk(200, unit=unit, scope="head") & p.causal()
        found = sparsify.attention(q, k, v, pattern, mask=given)
        added = torch.where(seen if given is None or given.is_floating_point() else seen & given, 0.0, -torch.inf)
        added = added + given if given is not None and given.is_floating_point() else added
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True).nan_to_num(0.0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_keys_that_a_mask_drops_are_never_chosen(monkeypatch, launches):
    """The best pages are masked; the budget goes to others."""
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    q, k, v = drawn(1, 64)
    mask = (torch.arange(64) >= 48).expand(2, 1, 1, 64)
    for given in (mask, torch.where(mask, 0.0, -torch.inf)):
        sparsify.attention(q, k, v, p.topk(2, unit=8, score="token", local=0), mask=given)
        index, count = launches[-1].loads[-2:]
        assert torch.equal(count, torch.full((2, 2, 1), 2, dtype=torch.int32))
        assert torch.equal(index[..., :2], torch.tensor([6, 7], dtype=torch.int32).expand(2, 2, 1, 2))


def test_compiled_attention_chooses_alike():
    q, k, v = drawn(70, 70)
    pattern = p.topk(2, unit=16) & p.causal()
    run = torch.compile(lambda *t: sparsify.attention(*t, pattern), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(q, k, v), sparsify.attention(q, k, v, pattern))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda: ~p.topk(2) & p.causal(), "attention: pattern: a selection can't be negated"),
        (lambda: p.topk(2) | p.topk(3), "attention: pattern: a head has two selections"),
        (lambda: p.topk(2, phase="decode"), "attention: pattern: the selection serves decode, and this is prefill"),
        (lambda: p.select(TOP2, learned="gate"), "attention: pattern: a learned selection needs"),
        (lambda: p.select(TOP2, reuse={"every": 3}), "attention: pattern: a choice is shared"),
        (lambda: p.topk(0), "topk.keep: expected an integer >= 1, found 0"),
        (lambda: p.topk(2, score="men"), "topk.score: unknown score 'men'; did you mean 'mean'?"),
        (lambda: p.topp(0.0), "topp.share: expected a number above 0 and at most 1, found 0.0"),
        (lambda: p.select(TOP2, unit={"l": 3}), "unit.l: no such field"),
    ],
)  # fmt: skip
def test_what_is_refused(pattern, message):
    with pytest.raises((InputError, PatternError)) as error:
        sparsify.attention(*drawn(9, 9), pattern())
    assert str(error.value).startswith(message)


def test_a_selection_has_no_mask_by_itself():
    with pytest.raises(InputError, match="known with queries and keys only"):
        p.topk(2).mask(1, 4, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({3: "4-5", 5: "6"}, "reuse.layers: layer 6 is to take the choice of layer 5, which takes that of 3"),
        ({3: 4, 4: 3}, "reuse.layers: the layers 3 -> 4 -> 3 take each other's choice in a cycle"),
        ({5: 4}, "reuse.layers: layer 4 comes before layer 5, whose choice it is to take"),
        ({1: "3-4", 2: 4}, "reuse.layers: layer 4 is to take the choices of 1 and 2; one is allowed"),
        ({"x": 4}, "reuse.layers: expected the number of a layer that chooses, found 'x'"),
        ({1: "b"}, "reuse.layers.1: expected numbers such as"),
    ],
)
def test_reuse_of_layers_is_checked(layers, message):
    with pytest.raises(PatternError) as error:
        Reuse.from_data({"layers": layers})
    assert str(error.value).startswith(message)


def test_specs_say_selections():
    spec = Spec.of({"version": 1, "patterns": {"pages": QUEST | {"sinks": 4}}, "sites": [{"heads": "pages"}]})
    assert Spec.of(spec.to_dict()) == spec
    choice = Choice.parse(spec.patterns["pages"].right.text if isinstance(spec.patterns["pages"].right, Selection)
                          else spec.patterns["pages"].left.text)  # fmt: skip
    assert choice.selector.score.kview == "minmax"
    full = {"select": {"budget": {"rule": "topk", "value": 8}, "unit": {"q": 1, "k": 16}, "dense_layers": "0-1",
                       "reuse": {"layers": {2: "3-12"}, "source": "dense"}}}  # fmt: skip
    spec = Spec.of({"version": 1, "sites": [{"heads": full}]})
    assert Spec.of(spec.to_dict()) == spec
    skipping = {"all": ["causal", {"online": {"share": 1000, "by_length": True}}]}
    spec = Spec.of({"version": 1, "sites": [{"heads": skipping}]})
    assert Spec.of(spec.to_dict()) == spec and "online(share=1000.0, by_length=True)" in str(
        spec.rules[0].groups[0].pattern
    )
    with pytest.raises(SpecError, match=r"heads\.topk: expected an integer >= 1"):
        Spec.of({"version": 1, "sites": [{"heads": {"topk": 0}}]})


def report(heads, **options):
    with torch.no_grad():
        return sparsify.explain(
            layers(1), X, target="null", spec={"version": 1, "sites": [{"heads": heads}]}, **options
        )


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ({"topk": {"keep": 2, "phase": "decode"}}, "the selection serves decode, and this is prefill"),
        ({"select": {"budget": {"rule": "topk", "value": 2}, "learned": "gate"}}, "no module 'gate' was given"),
        ({"any": [{"topk": 2}, {"topk": 3}]}, "a head has two selections"),
        ({"not": {"topk": 2}}, "a selection can't be negated"),
    ],
)
def test_sites_are_refused_with_a_reason(heads, reason):
    found = report(heads)
    assert found.refused and all(site.refusal.reason.startswith(reason) for site in found.refused)


def test_a_refused_site_is_an_error_if_strict():
    with pytest.raises(RefusedError):
        report({"not": {"topk": 2}}, strict=True)


@torch.no_grad()
def test_what_is_native_to_a_model_never_falls_back_to_dense():
    """Without strict, a refusal of an approximation is logged, and one of a native pattern is raised."""
    native = {"select": {"budget": TOP2, "phase": "decode", "semantics": "native"}}
    with pytest.raises(RefusedError, match="2 of 2 attention sites were refused, and their patterns are native"):
        run(native, X, layers(), strict=False)
    approx = {"select": {"budget": TOP2, "phase": "decode"}}
    torch.testing.assert_close(run(approx, X, layers(), strict=False), layers()(X))


def test_a_source_that_is_dense_is_refused():
    spec = {"version": 1, "sites": [
        {"layers": 0, "heads": "dense"},
        {"heads": {"select": {"budget": {"rule": "topk", "value": 2}, "reuse": {"layers": {0: 1}}}}},
    ]}  # fmt: skip
    with torch.no_grad():
        found = sparsify.explain(layers(), X, spec=spec, target="null")
    reason = "layer 1 is to take the choice of layer 0, which makes none in this graph"
    assert [site.refusal.reason for site in found.refused] == [reason]


def run(heads, given, made: nn.Module, **options) -> torch.Tensor:
    """What a model gives."""
    torch._dynamo.reset()
    spec = {"version": 1, "sites": [{"heads": heads}]}
    options = {"spec": spec, "strict": True, "target": "null", "inner": "eager"} | options
    return torch.compile(made, backend="sparsify", options=options)(given)


@torch.no_grad()
def test_layers_share_a_choice(launches):
    """The lists of the source are those of the layers that take its choice."""
    select = {
        "budget": {"rule": "topk", "value": 2},
        "unit": {"q": 8, "k": 8},
        "score": {"qview": "mean", "kview": "mean"},
    }
    run({"select": select | {"reuse": {"layers": {0: "1"}}}}, X, layers())
    first, second = launches
    assert all(torch.equal(a, b) for a, b in zip(first.loads, second.loads, strict=True))
    launches.clear()
    run({"select": select}, X, layers())
    assert not torch.equal(launches[0].loads[-2], launches[1].loads[-2])
    launches.clear()
    run({"select": select | {"reuse": {"layers": {0: "1"}, "source": "dense"}}}, X, layers())
    assert [launch.program.loads for launch in launches] == [0, 2]
    launches.clear()
    run({"select": select | {"dense_layers": "0"}}, X, layers())
    assert [launch.program.loads for launch in launches] == [0, 2]


class Favourite(nn.Module):
    """Scores unit `best` highest, whatever q and k are."""

    def __init__(self, best: int) -> None:
        super().__init__()
        self.best = nn.Parameter(torch.tensor(float(best)), requires_grad=False)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        units, rows = -(-k.shape[2] // 8), -(-q.shape[2] // 8)
        return (-(torch.arange(units) - self.best).abs()).expand(q.shape[0], 1, rows, units)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_modules_score_units(inner, launches):
    select = {"budget": {"rule": "topk", "value": 1}, "unit": {"q": 8, "k": 8}, "learned": "gate"}
    learned = {"gate": [Favourite(1), Favourite(2)]}
    run({"select": select}, torch.randn(2, 4, 40, 16), layers(), learned=learned, inner=inner)
    assert [int(launch.loads[-2][0, 0, 4, 0]) for launch in launches] == [1, 2]


def test_a_choice_holds_for_steps():
    """One kv head, units of 2: the choice of a step is there for `every` steps, and the query's own unit at each."""
    selector = p.topk(1, unit=2, score="token", queries=1).choice.selector
    held = Held(Ask(selector), every=3, cosine=None)
    k = torch.eye(16)[None, None]
    state = buffers(selector, 1, 1, 1, 16, torch.device("cpu"))
    found = []
    for step, wanted in enumerate([0, 4, 2, 5, 5]):  # which unit the query likes best
        q, n = 9 * torch.eye(16)[2 * wanted].view(1, 1, 1, 16), 12 + step
        index, count = select_again(q, k[:, :, :n], [], n - 1, 1.0, held.text(), *state.values())
        found.append(index[0, 0, 0, : int(count)].tolist())
    assert found == [[0, 5], [0, 5, 6], [0, 5, 6], [5, 7], [5, 7]]


@pytest.mark.parametrize("keys", [10, 13], ids=["shorter", "longer by one"])
def test_another_sequence_chooses_anew(keys):
    """Whatever its length is: other keys are there than those that the step before saw."""
    selector = p.topk(1, unit=2, score="token", queries=1).choice.selector
    held = Held(Ask(selector), every=3, cosine=None).text()
    k, state = torch.eye(16)[None, None], buffers(selector, 1, 1, 1, 16, torch.device("cpu"))
    select_again(9 * k[:, :, 4:5], k[:, :, :12], [], 11, 1.0, held, *state.values())
    other = k.flip(2)[:, :, :keys]
    index, count = select_again(9 * other[:, :, 6:7], other, [], keys - 1, 1.0, held, *state.values())
    assert index[0, 0, 0, : int(count)].tolist() == [3, (keys - 1) // 2]
    index, count = select_again(9 * other[:, :, :1], k.flip(2)[:, :, : keys + 1], [], keys, 1.0, held, *state.values())
    assert 3 in index[0, 0, 0, : int(count)].tolist(), "the same sequence keeps its choice"


def test_a_choice_holds_while_queries_are_alike():
    selector = p.topk(1, unit=2, score="token", queries=1, local=0).choice.selector
    held = Held(Ask(selector), every=1, cosine=0.9)
    k, state = torch.eye(16)[None, None], buffers(selector, 1, 1, 1, 16, torch.device("cpu"))
    first, near, other = torch.eye(16)[2], torch.eye(16)[2] + 0.3 * torch.eye(16)[8] + 0.0, torch.eye(16)[8]
    found = []
    for step, q in enumerate([first, near, 0.2 * near + other, first]):
        n = 12 + step
        index, count = select_again(q.view(1, 1, 1, 16), k[:, :, :n], [], n - 1, 1.0, held.text(), *state.values())
        found.append(index[0, 0, 0, : int(count)].tolist())
    assert found == [[1], [1], [4], [1]]


def test_attention_is_summed_from_step_to_step():
    """The sums by hand, for each head and row of the batch, behind padding; another sequence begins anew."""
    selector = p.select(
        {"rule": "topk", "value": 3},
        heads={"scope": "head"},
        score={"norm": "accumulated", "decay": 0.8, "history": 30},
    ).choice.selector
    ask = Ask(selector, usable=parse_pred("_0[b, k]")).text()
    state = accumulate.buffers(selector, 2, 4, 2, 16, torch.device("cpu"))
    q, k, _ = drawn(12, 30)
    usable, sums = torch.arange(30) >= torch.tensor([[0], [5]]), torch.zeros(2, 4, 30)
    for step, last in enumerate([*range(9, 18), 12, 13]):
        if step == 9:
            sums.zero_()
        keys, one = k[:, :, : last + 1], q[:, :, step : step + 1]
        index, count = accumulate.select_summed(one, keys, [usable[:, : last + 1]], last, 0.3, ask, *state.values())
        scores = (one @ keys.repeat_interleave(2, 1).mT * 0.3)[:, :, 0]
        sums *= 0.8
        sums[..., : last + 1] += scores.masked_fill(~usable[:, None, : last + 1], -torch.inf).softmax(-1)
        assert torch.equal(index[:, :, 0].long(), sums.topk(3).indices.sort().values) and bool((count == 3).all())
    with pytest.raises(InputError, match=r"^score.history: there is room for 30 keys, found 31$"):
        accumulate.select_summed(one, torch.randn(2, 2, 31, 16), [], 30, 0.3, Ask(selector).text(), *state.values())


def test_sums_over_steps_say_what_they_need():
    score = {"norm": "accumulated"}
    with pytest.raises(InputError, match=r"^attention: pattern: sums over earlier steps are kept by a compiled model"):
        sparsify.attention(*drawn(1, 9), p.select(TOP2, score=score))
    made = llama()
    with torch.no_grad():
        for heads, reason in (
            ({"budget": TOP2, "score": score}, "score.history: sums that go on from step to step need room"),
            ({"budget": TOP2, "score": score | {"history": 64}, "reuse": {"every": 2}},
             "a choice that holds for several steps can't be by sums to which every step adds"),
        ):  # fmt: skip
            found = sparsify.explain(made, torch.ones(2, 1, dtype=torch.long), target="null",
                                     spec={"version": 1, "sites": [{"heads": {"select": heads}}]})  # fmt: skip
            assert len(found.refused) == 1 and all(site.refusal.reason.startswith(reason) for site in found.refused)


LONG = {
    "shares beside what is near": (p.topp(0.1) | p.window(256) | p.sinks(4)) & p.causal(),
    "sorted keys": pre.pbs_attn(0.1) & p.causal(),
    "blocks": p.topk(8) & p.causal(),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "blocks" else ()) for kind in LONG]
)
def test_selections_take_no_memory_for_all_pairs(kind):
    """A byte for each of 16384 x 16384 pairs would be 256 MB."""
    q, k, v = (torch.randn(1, 2, 16384, 16) for _ in "qkv")
    sparsify.attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], LONG[kind])  # builds the kernel
    assert peak_bytes(lambda: sparsify.attention(q, k, v, LONG[kind])) < 100 * 2**20
