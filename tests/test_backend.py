"""The backend as torch.compile calls it: options, errors as users see them, refusals, recompilations, Inductor."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from captures import model

import sparsify
from sparsify import backend
from sparsify.errors import InputError, RefusedError, SpecError
from sparsify.options import Options
from sparsify.patterns import window

Q, K, V = (torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
EAGER = {"target": "null", "inner": "eager"}


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def compile_with(function, options, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, backend="sparsify", options=options, fullgraph=True, **kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strikt": True}, "unknown option 'strikt'; did you mean 'strict'?"),
        ({"strict": 1}, "option 'strict': expected True or False, found 1"),
        ({"target": "cuda"}, "option 'target': found 'cuda'; allowed: auto, cpp, null, triton"),
        ({"inner": "inducter"}, "option 'inner': found 'inducter'; did you mean 'inductor'?"),
        ({"inner": None}, "option 'inner': found None"),
        ({"spec": 3}, "option 'spec': expected a path, a dict or a sparsify.Spec, found 3"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError) as caught:
        compile_with(attend, options)(Q, K, V)
    assert str(caught.value).startswith(message)


def test_spec_errors_reach_the_user_as_they_are(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("version: 1\nsites:\n  - match: '*'\n    heads: {windw: 4}\n")
    with pytest.raises(SpecError, match=r"spec.yaml:4:\d+.*windw.*window"):
        compile_with(attend, {"spec": path, **EAGER})(Q, K, V)


class Blocks(torch.nn.Module):
    """Two attention blocks with a graph break in each."""

    def __init__(self, block) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(torch.nn.Module):
    scale = 1

    def forward(self, x):
        torch._dynamo.graph_break()
        return attend(x, x, x) * self.scale


class Forgetful(torch.nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return attend(x, x, x)


def test_addresses_and_rules_survive_graph_breaks(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    blocks, found = Blocks(Block), []

    def record(gm, inputs):
        found.append(backend.captured(gm, inputs, Options.read({"target": "null", "spec": spec})))
        return found[-1].module.forward

    spec = {"version": 1, "sites": [{"match": f"blocks.{i}", "heads": {"window": i + 2}} for i in range(2)]}
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(blocks, backend=record)(Q)
        wanted = sparsify.attention(Q, Q, Q, window(2))
        wanted = sparsify.attention(wanted, wanted, wanted, window(3))
    torch.testing.assert_close(result, wanted)
    assert [site.address for capture in found for site in capture.sites] == ["blocks.0", "blocks.1"]


def test_layers_that_cannot_be_told_apart_are_refused_under_a_spec():
    spec = {"version": 1, "sites": [{"match": "*", "heads": {"window": 2}}]}
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(RefusedError, match="which layer this is can't be told"):
        torch.compile(Blocks(Forgetful), backend="sparsify", options={**EAGER, "spec": spec, "strict": True})(Q)
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(Blocks(Forgetful), backend="sparsify", options={**EAGER, "strict": True})
        torch.testing.assert_close(run(Q), Blocks(Forgetful)(Q))


def test_a_rule_that_fits_no_module_is_an_error():
    spec = {"version": 1, "sites": [{"match": "*", "heads": "dense"}, {"match": "model.layer.*", "heads": "dense"}]}
    with torch.no_grad(), pytest.raises(SpecError, match=r"sites\[1\]: the rule matches no site; the model has 1: "):
        compile_with(model("llama", "sdpa"), {**EAGER, "spec": spec})(torch.zeros(1, 5, dtype=torch.long))


def test_found_by_name_and_right_without_any_option(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    torch._dynamo.reset()
    run = torch.compile(attend, backend="sparsify")
    torch.testing.assert_close(run(Q, K, V), attend(Q, K, V))


@pytest.fixture
def refusals(caplog):
    """Runs a function and gives what it logged; the results must be those of the function itself."""
    caplog.set_level(logging.WARNING, logger="sparsify")
    backend._logged.clear()

    def run(function, *inputs, **kwargs):
        compiled = compile_with(function, EAGER, **kwargs)
        for _ in range(2):
            torch.testing.assert_close(compiled(*inputs), function(*inputs))
        with pytest.raises(RefusedError) as caught:
            compile_with(function, {**EAGER, "strict": True}, **kwargs)(*inputs)
        logged = [record.getMessage() for record in caplog.records if record.name == "sparsify"]
        assert len(logged) == 1
        assert logged[0].partition("stays as it is: ")[2] in str(caught.value)
        return logged[0]

    return run


def test_refused_for_gradients(refusals):
    linear = torch.nn.Linear(8, 8)
    found = refusals(lambda q: attend(linear(q), q, q), Q)
    assert "needs gradients" in found and "torch.no_grad()" in found


class Refused(torch.nn.Module):
    """Attention whose weights are used, too, so that it is refused."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q):
        weights = (q @ q.mT).softmax(-1)
        return weights @ q * self.scale, weights


def test_a_refusal_is_told_once_for_each_compiled_model(caplog):
    caplog.set_level(logging.WARNING, logger="sparsify")
    torch._dynamo.reset()
    for scale, many in ((1, 1), (2, 2)):
        run = torch.compile(Refused(scale), backend="sparsify", options=EAGER, dynamic=False)
        for length in (7, 5, 6):  # each is compiled anew
            run(Q[:, :, :length])
        told = [record.getMessage() for record in caplog.records if record.name == "sparsify"]
        assert len(told) == many and len(set(told)) == 1 and "stays as it is" in told[0]


def test_not_refused_where_the_gradient_is_cut():
    linear = torch.nn.Linear(8, 8)

    def function(q):
        with torch.no_grad():
            kept = attend(linear(q), q, q)
        return linear(kept), attend(linear(q).detach(), q, q)

    run = compile_with(function, {**EAGER, "strict": True})
    (found, other), (wanted, same) = run(Q), function(Q)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(other, same)
    assert found.requires_grad and not other.requires_grad


@pytest.mark.parametrize("train", [True, False])
def test_dropout_is_refused_when_active(train):
    def sdpa(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if train else 0.0)

    def eager(q):
        return F.dropout((q @ q.mT).softmax(-1), 0.5, training=train) @ q

    for function in (sdpa, eager):
        run = compile_with(function, {**EAGER, "strict": True})
        if train:
            with pytest.raises(RefusedError, match=r"dropout is active.*call model.eval\(\)"):
                run(Q)
        else:
            torch.testing.assert_close(run(Q), function(Q))


def test_refused_when_the_weights_are_used(refusals):
    def function(q):
        weights = (q @ q.mT).softmax(-1)
        return weights @ q, weights

    assert "the attention weights are also used by" in refusals(function, Q)


def test_refused_for_what_stands_between_scores_and_softmax(refusals):
    assert "the scores pass through relu" in refusals(lambda q: (q @ q.mT).relu().softmax(-1) @ q, Q)
    backend._logged.clear()


def test_refused_for_a_fill_that_is_no_mask(refusals):
    assert "filled with 1e-09" in refusals(
        lambda q, m: (q @ q.mT).masked_fill(m, 1e-9).softmax(-1) @ q, Q, torch.ones(7, 7, dtype=torch.bool).tril()
    )


def test_refused_for_its_dtype(refusals):
    assert "q is torch.float64" in refusals(attend, *(t.double() for t in (Q, K, V)))


def test_refused_without_a_compiler(monkeypatch, caplog):
    monkeypatch.setenv("SPARSIFY_CXX", "/nowhere/c++")
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", "/nowhere/cache")
    from sparsify import codegen

    refusal = codegen.target("cpp").unavailable()
    if refusal is None:
        pytest.skip("this target does not look for its compiler through SPARSIFY_CXX")
    with pytest.raises(RefusedError, match="/nowhere/c"):
        compile_with(attend, {"target": "cpp", "inner": "eager", "strict": True})(Q, K, V)
    torch.testing.assert_close(compile_with(attend, {"target": "cpp", "inner": "eager"})(Q, K, V), attend(Q, K, V))


def test_a_softmax_that_is_no_attention_is_left_alone():
    router = torch.nn.Linear(8, 4).requires_grad_(False)

    def function(q):
        return torch.einsum("bhne,ed->bhnd", router(q).softmax(-1), router.weight), q.softmax(-1) * q

    run = compile_with(function, {**EAGER, "strict": True})
    for found, wanted in zip(run(Q), function(Q), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_no_recompilation_is_added(dynamic):
    made = model("llama", "eager")
    counts = []
    for options in ({"backend": "eager"}, {"backend": "sparsify", "options": EAGER}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(made, dynamic=dynamic, **options)
        for length in (9, 12, 12, 17):
            run(torch.zeros(2, length, dtype=torch.long), use_cache=False)
        counters = torch._dynamo.utils.counters
        counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert counts[0] == counts[1]


class Layer(torch.nn.Module):
    """Attention between what Inductor fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = torch.nn.LayerNorm(32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.gelu(attend(q, k, v).transpose(1, 2).flatten(2)))


def check_inductor(made, match, given, logits=lambda output: output, **kwargs):
    spec = {"version": 1, "sites": [{"match": match, "heads": {"0-1": "dense", "rest": {"window": 5}}}]}
    wanted = logits(compile_with(made, {**EAGER, "spec": spec})(given, **kwargs))
    run = compile_with(made, {"target": "null", "spec": spec, "strict": True}, dynamic=True)
    torch.testing.assert_close(logits(run(given, **kwargs)), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - logits(made(given, **kwargs))).abs().max() > 1e-3


@torch.no_grad()
def test_inductor_compiles_the_rest():
    torch.manual_seed(0)
    check_inductor(Layer(), "*", torch.randn(2, 11, 32))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_the_rest_of_a_model():
    ids = torch.randint(0, 64, (2, 11))
    check_inductor(model("llama", "sdpa"), "model.layers.*", ids, lambda output: output.logits, use_cache=False)


@pytest.fixture
def failing(monkeypatch):
    """A pass that fails half way, as a user would have it."""
    from sparsify.passes import splice

    def fail(_):
        raise KeyError("half way")

    monkeypatch.setattr(splice, "forget_strides", fail)
    monkeypatch.setenv("SPARSIFY_NET", "1")
    backend._logged.clear()


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_pass_that_fails_leaves_the_graph_as_it_was(failing, caplog, inner):
    caplog.set_level(logging.WARNING, logger="sparsify")
    run = compile_with(attend, EAGER | {"inner": inner})
    torch.testing.assert_close(run(Q, K, V), attend(Q, K, V))
    first = next(record.getMessage() for record in caplog.records if record.name == "sparsify")
    text = "Splice failed (KeyError: 'half way'); the graph stays as it is"
    assert first == f"{text}: a mistake in sparsify, please report it"
    report = sparsify.explain(attend, Q, K, V)
    assert text in report.graphs[0].notes[-1] and len(report.refused) == 1 and not report.rewritten


def test_a_pass_that_fails_is_an_error_under_strict_and_without_the_net(failing, monkeypatch):
    with pytest.raises(RefusedError, match="Splice failed"):
        compile_with(attend, EAGER | {"strict": True})(Q, K, V)
    monkeypatch.setenv("SPARSIFY_NET", "0")
    with pytest.raises(Exception, match="Splice failed"):
        compile_with(attend, EAGER)(Q, K, V)
