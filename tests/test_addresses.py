"""Addresses: how a rule of a spec names sites, which layer a site is, and what an error says there is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captures import Recorded
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsify
from sparsify import patterns as p
from sparsify.errors import RefusedError, SpecError
from sparsify.spec import SiteInfo, Spec, unmatched_rules

X = torch.randn(1, 2, 9, 8)


def info(path: str, layer: int, **fields) -> SiteInfo:
    return SiteInfo(path, layer, **{"kind": "self", "causal": True, "heads": 2, "kv_heads": 2, **fields})


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(-12, 11), st.integers(-12, 11), st.booleans())
def test_layers_count_from_the_start_or_the_end(total, first, last, listed):
    """`a-b` is a to b, both included, with negative numbers as Python's."""
    text = str(first) if first == last else f"{first}-{last}"
    if ((first >= 0) == (last >= 0) and last < first) or first < 0 <= last:
        with pytest.raises(SpecError, match="runs backwards"):
            Spec(sites=[{"layers": text, "heads": "dense"}])
        return
    spec = Spec(sites=[{"layers": [text] if listed else text, "heads": "dense"}])
    found = [spec.rule(info("x", layer, layers=total)) is not None for layer in range(total)]
    plain = [number + total if number < 0 else number for number in (first, last)]
    assert found == [plain[0] <= layer <= plain[1] for layer in range(total)]
    assert Spec.of(spec.to_dict()) == spec
    unknown = [spec.rule(info("x", layer)) is not None for layer in range(total)]
    assert unknown == (found if first >= 0 <= last else [False] * total)


kinds = st.lists(st.sampled_from(["self", "cross", "causal", "bidirectional"]), max_size=2, unique=True)


@settings(max_examples=60)
@given(
    kinds,
    st.sampled_from([None, "prefill", "decode"]),
    st.sampled_from([None, "0", "1-2", [0, 3]]),
    st.sampled_from(["self", "cross"]),
    st.booleans(),
    st.sampled_from(["prefill", "decode"]),
    st.integers(0, 3),
)
def test_kind_phase_and_use_have_all_to_hold(words, phase, uses, kind, causal, now, use):
    rule = {"kind": words or None, "phase": phase, "uses": uses, "heads": "dense"}
    spec = Spec(sites=[{name: value for name, value in rule.items() if value is not None}])
    site = info("a.b", 0, kind=kind, causal=causal, phase=now, use=use)
    named = {"None": range(4), "0": [0], "1-2": [1, 2]}.get(str(uses), uses)
    mine = {kind, "causal" if causal else "bidirectional"}
    assert (spec.rule(site) is not None) == (set(words) <= mine and phase in (None, now) and use in named)
    assert Spec.of(spec.to_dict()) == spec


def test_an_error_lists_what_there_is_nearest_first():
    sites = [info(f"encoder.layers.{i}.self_attn", i, causal=False) for i in range(3)]
    sites += [info(f"decoder.layers.{i}.self_attn", i) for i in range(3)]
    sites += [info(f"decoder.layers.{i}.cross", i, kind="cross", causal=False, phase="decode") for i in (0, 2)]
    sites += [info("shared.attn", 0, use=use) for use in range(4)]
    spec = Spec(sites=[{"match": "decoder.layer.*.cross", "heads": "dense"}])
    assert unmatched_rules(spec, sites) == [
        "spec: sites[0]: the rule matches no site; the model has 12: "
        "decoder.layers.0,2.cross (cross, bidirectional, decode), decoder.layers.0-2.self_attn (self, causal), "
        "encoder.layers.0-2.self_attn (self, bidirectional), shared.attn (self, causal) used 4 times"
    ]
    (message,) = unmatched_rules(Spec(sites=[{"match": "*self_attn", "kind": "cross", "heads": "dense"}]), sites)
    assert "matches no site" in message
    many = [info(f"{name}.attn", 0) for name in "abcdefgh"]
    assert unmatched_rules(spec, many)[0].endswith(", and 2 more like these")


def test_a_rule_for_a_phase_that_is_not_run_is_no_mistake():
    spec = Spec(sites=[{"phase": "decode", "heads": {"window": 4}}, {"heads": "dense"}])
    assert unmatched_rules(spec, [info("a", 0)]) == []
    assert spec.resolve([info("a", 0), info("a", 0, phase="decode")]) == [(p.dense(),) * 2, (p.window(4),) * 2]


class Attend(torch.nn.Module):
    def forward(self, x, context=None):
        keys = x if context is None else context
        return F.scaled_dot_product_attention(x, keys, keys, is_causal=context is None)


class Other(torch.nn.Module):
    def forward(self, x):
        return x * 2


class Stage(torch.nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(Attend(), Other()) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Nested(torch.nn.Module):
    """Stages of blocks, as in Swin; the attention is `stages.S.blocks.B.0`."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList([Stage(2), Stage(3)])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


class TwoStacks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Attend() for _ in range(2))})
        self.decoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Attend() for _ in range(3))})

    def forward(self, x):
        context = x
        for layer in self.encoder["layers"]:
            context = layer(context)
        for layer in self.decoder["layers"]:
            x = layer(x, context[:, :, :7])
        return x


class Shared(torch.nn.Module):
    """One layer, used four times."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.groups = torch.nn.ModuleList([torch.nn.ModuleList([Attend()])])
        self.broken = broken

    def forward(self, x):
        for _ in range(4):
            x = self.groups[0][0](x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


@torch.no_grad()
def sites_of(module, **options):
    torch._dynamo.reset()
    recorded = Recorded(options)
    torch.compile(module, backend=recorded)(X)
    return recorded.sites


def test_which_layer_a_site_is():
    nested = sites_of(Nested())
    assert [site.address for site in nested[:3]] == [
        "stages.0.blocks.0.0",
        "stages.0.blocks.1.0",
        "stages.1.blocks.0.0",
    ]
    assert [(site.layer, site.layers, site.use) for site in nested] == [(i, 5, 0) for i in range(5)]
    stacks = sites_of(TwoStacks())
    assert [(site.layer, site.layers) for site in stacks] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [(site.layer, site.layers, site.use) for site in sites_of(Shared())] == [(0, 1, use) for use in range(4)]
    plain = sites_of(lambda x: F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, x, x), x, x))
    assert [(site.address, site.layer, site.use) for site in plain] == [("", 0, 0), ("", 1, 1)]


def windows(module, *rules) -> list[tuple[str, ...]]:
    spec = {"version": 1, "sites": [{**rule, "heads": {"window": i + 1}} for i, rule in enumerate(rules)]}
    return [str((site.patterns or ("none",))[0]) for site in sites_of(module, spec=spec)]


def test_a_spec_finds_them():
    assert windows(Nested(), {"layers": "-2--1"}, {"match": "stages.0.*"}) == [
        "window(2)", "window(2)", "none", "window(1)", "window(1)",
    ]  # fmt: skip
    found = windows(TwoStacks(), {"match": "decoder.*", "kind": "cross", "layers": -1}, {"kind": ["self", "causal"]})
    assert found == ["window(2)", "window(2)", "none", "none", "window(1)"]
    assert windows(Shared(), {"uses": "1-2"}, {"match": "groups.0.0"}) == [f"window({i})" for i in (2, 1, 1, 2)]


def test_the_model_itself_is_told_as_what_a_rule_can_match():
    sites = [info("", 0), info("", 1, use=1), info("layers.0", 0)]
    spec = Spec(sites=[{"match": "model.*", "heads": "dense"}])
    assert unmatched_rules(spec, sites) == [
        "spec: sites[0]: the rule matches no site; the model has 3: "
        "layers.0 (self, causal), (the model itself, matched by '*') (self, causal) used 2 times"
    ]
    with pytest.raises(SpecError, match=r"sites\[0\].heads: found head 5, but the model itself has heads 0-1$"):
        Spec(sites=[{"match": "*", "heads": {"5": "dense"}}]).resolve(sites)
    compiled = torch.compile(Attend(), backend="sparsify", options={"spec": spec, "inner": "eager"})
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(SpecError, match=r"the model has 1: \(the model itself, matched by '\*'\) \("):
        compiled(X)
    assert windows(Attend(), {"match": "*"}) == ["window(1)"]


def test_uses_that_share_a_compiled_function_are_refused():
    spec = {"version": 1, "sites": [{"match": "groups.*", "uses": 1, "heads": {"window": 4}}]}

    class Breaking(Attend):
        def forward(self, x, context=None):
            torch._dynamo.graph_break()
            return super().forward(x, context)

    module = Shared()
    module.groups[0][0] = Breaking()
    torch._dynamo.reset()
    options = {"target": "null", "inner": "eager", "strict": True, "spec": spec}
    with torch.no_grad(), pytest.raises(RefusedError, match="which use of its module this is can't be told"):
        torch.compile(module, backend="sparsify", options=options)(X)


@torch.no_grad()
def test_the_report_folds_uses(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    torch._dynamo.reset()
    assert "groups.0.0 (4 sites)" in str(sparsify.explain(Shared(), X))
