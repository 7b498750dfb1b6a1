"""Specs: what each form means, what comes back, and every error as its user reads it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import golden
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed

from sparsify import patterns as p
from sparsify.errors import SpecError
from sparsify.expr import eq
from sparsify.patterns.pattern import K
from sparsify.spec import SiteInfo, Spec, load_spec, schema, unmatched_rules
from sparsify.spec.reader import read_text

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "specs").glob("*.yaml"))
FILE = jsonschema.Draft202012Validator(schema())
HEAD = "version: 1\nsites:\n  - heads: "


def site(layer: int, heads: int = 4, kind: str = "self", causal: bool = True) -> SiteInfo:
    name = "self_attn" if kind == "self" else "cross_attn"
    return SiteInfo(f"model.layers.{layer}.{name}", layer, kind, causal, heads, heads)


FORMS = [
    ("dense", p.dense()),
    ("causal", p.causal()),
    ({"window": 8}, p.window(8)),
    ({"window": "N/8 + 2"}, p.window("N/8 + 2")),
    ({"window": {"size": 8, "ahead": 3}}, p.window(8, ahead=3)),
    ({"sinks": 4, "window": 8}, p.sinks(4) | p.window(8)),
    ({"column_stride": {"every": 8, "block": 64, "offset": "head"}}, p.column_stride(8, 64, "head")),
    ({"global_tokens": [3, 1]}, p.global_tokens([1, 3])),
    ({"global_tokens": "0-76"}, p.global_tokens(range(77))),
    (
        {"neighborhood": {"shape": [30, 48, 80], "window": [18, 24, 24], "stride": [16, 8, 8]}},
        p.neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8)),
    ),
    (
        {"neighborhood": {"shape": [4, 6], "window": 3, "causal": [True, False], "start": 2}, "global_tokens": [0, 1]},
        p.neighborhood([4, 6], 3, causal=[True, False], start=2) | p.global_tokens([0, 1]),
    ),
    ({"expr": "k <= q and (q-k) % 7 < 2"}, p.expr("k <= q and (q-k) % 7 < 2")),
    ({"all": ["causal", {"dilated": 3}, {"window": 9}]}, p.causal() & p.dilated(3) & p.window(9)),
    ({"any": [{"dilated": 3}, {"dilated": 5}]}, p.dilated(3) | p.dilated(5)),
    ({"not": {"same_block": 4}}, ~p.same_block(4)),
    ({"window": 100, "block": 64}, p.block_window(64, 2)),
    ({"window": "N/8 + 512", "block": 64}, p.block_window(64, "ceil((N/8 + 512) / 64)")),
    ({"sinks": 65, "window": 64, "block": 64}, p.sinks(128) | p.block_window(64, 1)),
    ({"sinks": "N/9", "block": 8}, p.sinks("8 * ceil((N/9) / 8)")),
    ({"column_stride": {"every": 8, "offset": "head"}, "block": 16}, p.column_stride(8, 16, "head")),
    (p.window(3), p.window(3)),
]


@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=[str(form) for form, _ in FORMS])
def test_a_form_is_its_pattern(form, pattern):
    spec = Spec(patterns={"it": form}, sites=[{"heads": "it"}, {"heads": form}])
    assert spec.patterns["it"] == pattern and spec.rules[1].groups[0].pattern == pattern
    assert spec.patterns["it"].keep() == pattern.keep()


def test_a_neighborhood_comes_back_as_it_was_written():
    form = {"neighborhood": {"shape": [30, 48, 80], "window": [18, 24, 24], "stride": [16, 8, 8], "border": "wrap"}}
    document = {"version": 1, "patterns": {"video": form}, "sites": [{"match": "*", "heads": "video"}]}
    assert Spec.of(document).to_dict() == document
    jsonschema.validate(document, schema())


def test_block_granularity_keeps_what_moa_keeps():
    spec = Spec(patterns={"moa": {"sinks": 2, "window": "N/4 + 3", "block": 4}}, sites=[{"heads": "moa"}])
    for n in (1, 7, 8, 33):
        mask = spec.patterns["moa"].mask(1, n, n)[0]
        blocks = -(-(n // 4 + 3) // 4) if n % 4 == 0 else -(-(n + 12) // 16)  # ceil((N/4 + 3) / 4), exactly
        expected = [[k < 4 or 0 <= q // 4 - k // 4 < blocks for k in range(n)] for q in range(n)]
        assert mask.tolist() == expected, n


def test_names_refer_to_each_other_in_any_order():
    spec = Spec(patterns={"a": {"any": ["b", {"sinks": 1}]}, "b": {"window": 4}}, sites=[{"heads": "a"}])
    assert spec.patterns["a"] == p.window(4) | p.sinks(1)


def test_the_first_rule_that_matches_gives_each_head_its_pattern():
    spec = Spec(
        patterns={"near": {"window": 8}},
        sites=[
            {"match": "model.layers.[0-1].*", "heads": "dense"},
            {"kind": "cross", "heads": {"0": "near", "rest": "causal"}},
            {"kind": "bidirectional", "heads": {"sinks": 2}},
            {"layers": [3, "5-6"], "heads": {"0-1,3": "near", 2: "dense"}},
        ],
    )
    sites = [site(1), site(2, kind="cross"), site(3), site(4, causal=False), site(4), site(6)]
    near, dense, causal = p.window(8), p.dense(), p.causal()
    mixed = (near, near, dense, near)
    expected = [(dense,) * 4, (near, causal, causal, causal), mixed, (p.sinks(2),) * 4, None, mixed]
    assert spec.resolve(sites) == expected
    assert spec.resolve([SiteInfo("x", None, "self", True, 4, 4)], complete=False) == [None]


def test_rules_that_no_site_uses_are_errors():
    rules = [
        {"match": "*.self_attn", "heads": "dense"},
        {"layers": "0-1", "heads": {"window": 4}},
        {"match": "x.*", "heads": "dense"},
    ]
    spec, sites = Spec(sites=rules), [site(layer) for layer in range(6)]
    names = "model.layers.0-5.self_attn (self, causal)"
    shadowed = "spec: sites[1]: the rule is never used: earlier rules (sites[0]) take every site that it matches"
    assert unmatched_rules(spec, sites) == [
        shadowed,
        f"spec: sites[2]: the rule matches no site; the model has 6: {names}",
    ]
    with pytest.raises(SpecError) as caught:
        spec.resolve(sites)
    assert str(caught.value) == shadowed
    assert spec.resolve(sites, complete=False) == [(p.dense(),) * 4] * 6
    assert unmatched_rules(spec, [])[0] == "spec: sites[0]: the rule matches no site; the model has none"


FIT = "'model.layers.0.self_attn' has heads 0-3"
HEADS = [
    ({"0-2": "dense"}, f"head 3 has no pattern, but {FIT}; name them too, or add a group 'rest'"),
    ({"1,3": "dense"}, f"heads 0,2 have no pattern, but {FIT}; name them too, or add a group 'rest'"),
    ({"0-7": "dense"}, f"found head 7, but {FIT}"),
]


@pytest.mark.parametrize(("heads", "message"), HEADS)
def test_heads_that_do_not_fit_the_site(heads, message):
    with pytest.raises(SpecError) as caught:
        Spec(sites=[{"heads": heads}]).resolve([site(0)])
    assert str(caught.value) == f"spec: sites[0].heads: {message}"


@pytest.mark.parametrize(("text", "message"), golden.cases("spec_errors"), ids=golden.ids)
def test_errors_as_a_user_reads_them(text, message, accept):
    golden.check("spec_errors", text, message, refused(text), accept)


def refused(text: str) -> str:
    """The error for a spec of this text."""
    with pytest.raises(SpecError) as caught:
        Spec.read(text, "s.yaml")
    return str(caught.value)


UNPRINTABLE = [
    (
        "version: 1\n\tsites: []",
        "2:1: not valid YAML: found character '\\t' that cannot start any token, while scanning",
    ),
    ("version: 1\nsites: \x07", "2:8: character '\\x07' is not allowed"),
    (HEAD + "[" * 100_000, "3:42: nested deeper than the 32 levels allowed"),
    (HEAD + "{not: " * 100_000, "3:192: nested deeper than the 32 levels allowed"),
]


@pytest.mark.parametrize(("text", "message"), UNPRINTABLE, ids=["tab", "control", "lists", "mappings"])
def test_text_that_no_file_should_hold(text, message):
    assert refused(text).startswith(f"s.yaml:{message}")


FILES = [
    (None, ": there is no such file"),
    (b"", ": the file is empty; a spec needs 'version', 'sites' and usually 'patterns'"),
    (b"# only a comment\n", ": the file is empty; a spec needs 'version', 'sites' and usually 'patterns'"),
    (b"version: 1\nsites: [{heads: \xff}]", ":2:17: byte 0xff is not UTF-8 text"),
    (b"\x80\x02}q\x00.", ":1:1: byte 0x80 is not UTF-8 text"),
    (b"a" * 2_000_000, ": a spec of 2000000 bytes is longer than the 524288 allowed"),
]


@pytest.mark.parametrize(("data", "message"), FILES, ids=[message for _, message in FILES])
def test_files_that_can_not_be_read(data, message, tmp_path):
    file = tmp_path / "s.yaml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert str(caught.value) == f"{file}{message}"


def test_a_directory_and_other_things_that_are_no_spec(tmp_path):
    mixed = {"version": 1, "sites": [{"heads": {"window": 4, 5: "dense"}}]}
    numbers = 'expected numbers such as 5, "0-3" or "0-3,7"'
    for value, message in [
        (tmp_path, f"{tmp_path}: expected a YAML or JSON file, found a directory"),
        ("no\x00file", "no\x00file: can't be read: embedded null byte"),
        (3, "spec: expected a path, a dictionary or a Spec, found 3"),
        (mixed, f"spec: sites[0].heads.window: {numbers}, found 'window'"),
    ]:
        with pytest.raises(SpecError) as caught:
            Spec.of(value)
        assert str(caught.value) == message


def test_patterns_that_grow_without_end_are_refused():
    doubling = {f"p{i}": {"any": [f"p{i + 1}", f"p{i + 1}"]} for i in range(40)} | {"p40": "dense"}
    with pytest.raises(SpecError, match=r"a pattern of 256 parts is larger than the 200 allowed"):
        Spec(patterns=doubling, sites=[{"heads": "p0"}])
    nested: dict = {"window": 1}
    for _ in range(500):
        nested = {"not": nested}
    with pytest.raises(SpecError, match="nested too deeply"):
        Spec(sites=[{"heads": nested}])


def test_a_users_own_pattern_goes_by_name(tmp_path):
    class Mine(p.Pattern):
        def keep(self):
            return p.causal().keep()

    rules = [{"heads": {0: "mine", "rest": {"all": ["mine", {"window": 4}]}}}]
    spec = Spec(patterns={"mine": Mine()}, sites=rules)
    (tmp_path / "s.yaml").write_text("version: 1\nsites: [{heads: {0: mine, rest: {all: [mine, {window: 4}]}}}]")
    assert load_spec(tmp_path / "s.yaml", patterns={"mine": Mine()}) == spec
    assert spec.resolve([site(0, heads=2)]) == [(Mine(), Mine() & p.window(4))]
    assert Spec.of(spec.to_dict()) == spec
    with pytest.raises(SpecError, match=r"mine\(\) is a pattern of your own class, which a file can't hold"):
        spec.save(tmp_path / "out.yaml")
    with pytest.raises(SpecError, match=r"load_spec: patterns\['mine'\]: expected a Pattern, found 'dense'"):
        load_spec(tmp_path / "s.yaml", patterns={"mine": "dense"})


def test_yaml_scalars_are_read_as_yaml_12():
    text = "[1, -2, +3, 0.5, 1e3, .inf, yes, 0-3, 'x', \"1\", null, ~, true, False, 1_000, 0x1f, , 12:30]"
    plain = [1, -2, 3, 0.5, 1000.0, float("inf"), "yes", "0-3", "x", "1", None, None, True, False, "1_000", "0x1f"]
    assert read_text(text.replace(" ,", ""), "t")[0] == [*plain, "12:30"]


def test_json_is_read_with_positions(tmp_path):
    file = tmp_path / "s.json"
    file.write_text('{\n  "version": 1,\n  "sites": [\n    {"heads": {"window": 0}}\n  ]\n}\n')
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert str(caught.value) == f"{file}:4:26: sites[0].heads.window: expected an integer >= 1, found 0"


@settings(max_examples=30)
@given(pattern=composed(), heads=st.sampled_from(["p", {"0-3": "p", "rest": "dense"}, None]))
def test_any_composition_comes_back_equal(pattern, heads, tmp_path_factory):
    rule = {
        "match": "a*",
        "heads": pattern[0] if heads is None else heads,
        "layers": "1,3-4",
        "kind": ["self", "causal"],
        "phase": "prefill",
        "uses": "0-2",
    }
    spec = Spec(patterns={"p": pattern[0]}, sites=[rule])
    again = Spec.of(spec.to_dict())
    assert again == spec and hash(again) == hash(spec) and pickle.loads(pickle.dumps(spec)) == spec
    assert again.to_dict() == spec.to_dict() == json.loads(json.dumps(spec.to_dict()))
    FILE.validate(spec.to_dict())
    folder = tmp_path_factory.mktemp("specs")
    for name in ("s.yaml", "new/s.json"):
        spec.save(folder / name)
        assert load_spec(folder / name) == spec


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(),
    st.sampled_from(["dense", "N/8", "head", "a", "k<q", "0-3"]),
)
WORDS = [*p.PATTERNS, "all", "any", "not", "block", "every", "size", "a", "0-3", "rest"]
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150)
@given(anything)
def test_anything_else_is_one_spec_error(form):
    try:
        spec = Spec(patterns={"a": form}, sites=[{"heads": form}])
    except SpecError as error:
        assert "\n" not in str(error) and str(error).startswith("spec: ")
    else:
        assert Spec.of(spec.to_dict()) == spec


@settings(max_examples=100)
@given(st.text(alphabet="ab:{}[]-,'\"\n\t #*&!|>%1. ", max_size=60))
def test_any_text_is_read_or_refused_with_a_position(text):
    try:
        value, source = read_text(text, "t")
    except SpecError as error:
        assert str(error).startswith("t:")
    else:
        assert source.values[()][0] >= 1 and isinstance(value, dict | list | str | int | float | None)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_the_example_specs_load_and_fit_the_schema(path):
    spec = load_spec(path)
    assert Spec.of(spec.to_dict()) == spec and spec.rules
    jsonschema.validate(read_text(path.read_text(), path.name)[0], schema())
    jsonschema.validate(spec.to_dict(), schema())


def test_the_schema_refuses_what_the_reader_refuses():
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    for form in (
        {"wndow": 3},
        {"window": {"size": 3, "ahed": 1}},
        {"window": True},
        {"window": 4, "not": "dense"},
        3,
        {},
    ):
        assert not validator.is_valid({"version": 1, "sites": [{"heads": form}]}), form
    assert not validator.is_valid({"version": 2, "sites": [{"heads": "dense"}]})
    assert validator.is_valid({"version": 1, "sites": [{"heads": {"0-3": "dense", "rest": {"window": 4}}}]})


def test_every_constructor_has_its_fields_in_the_schema():
    forms = json.dumps(schema()["$defs"]["Pattern"])
    assert all(f'"{name}"' in forms for name in p.PATTERNS)


def test_a_constructor_in_patterns_is_all_that_a_spec_needs(monkeypatch):
    @dataclass(frozen=True)
    class Every(p.Pattern):
        step: int
        since: int = 0

        def keep(self):
            return eq((K + self.since) % self.step, 0)

    def every(step: int, since: int = 0) -> p.Pattern:
        """Every n-th key."""
        return Every(step, since)

    monkeypatch.setitem(p.PATTERNS, "every", every)
    rule = {"match": "*", "heads": {"every": {"step": 3, "since": 1}, "sinks": 2}}
    document = {"version": 1, "patterns": {}, "sites": [rule]}
    assert Spec.of(document).rules[0].groups[0].pattern == Every(3, 1) | p.sinks(2)
    assert Spec.of(document).to_dict() == document
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(document) and not validator.is_valid({**document, "sites": [{"heads": {"every": "3"}}]})
    with pytest.raises(SpecError, match=r"unknown field 'sinse' of every; did you mean 'since'\?"):
        Spec(sites=[{"heads": {"every": {"step": 3, "sinse": 1}}}])


def test_reading_a_spec_needs_no_torch():
    code = f"import sys, sparsify; sparsify.load_spec({str(EXAMPLES[0])!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
