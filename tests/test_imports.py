"""Plans of other systems: each format as it is shipped, the masks that it means, and what is wrong in a wrong one."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patterns import by_hand
from test_presets import moa, streaming

import sparsify
from sparsify import cli, imports
from sparsify.errors import InputError, SpecError
from sparsify.patterns import dense
from sparsify.patterns import presets as pre
from sparsify.spec import SiteInfo, load_spec

TRAINED = pre.duo_streaming(sinks=128, recent=256)
OTHER = pre.duo_streaming(sinks=64, recent=256)
DUO = {  # the fields that matter among those of a shipped config.json
    "model_name": "models/Llama", "sink_size": 128, "recent_size": 256, "deploy_sink_size": None,
    "deploy_recent_size": None, "threshold": 0.5, "sparsity": None,
}  # fmt: skip


def sites(layers: int, heads: int, phase: str = "prefill") -> list[SiteInfo]:
    return [
        SiteInfo(f"model.layers.{i}.self_attn", i, "self", True, heads, heads, phase=phase, layers=layers)
        for i in range(layers)
    ]


def write(path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def duo_folder(folder, gates, **fields) -> str:
    """A folder as DuoAttention's training leaves it; gates are written by numpy."""
    folder.mkdir(exist_ok=True)
    np.savetxt(folder / "full_attention_heads.tsv", np.array(gates), delimiter="\t")
    write(folder / "config.json", {name: value for name, value in (DUO | fields).items() if value != "absent"})
    return str(folder)


def minference(layers: int, heads: int, entry) -> list[dict]:
    return [{str(head): entry(layer, head) for head in range(heads)} for layer in range(layers)]


@pytest.fixture
def files(tmp_path):
    """One small file a format, by the format's name."""
    lines = minference(2, 4, lambda layer, head: ["vertical_and_slash", 30, 800, 0.5])
    lines[1]["2"] = ["stream_llm", 100, 800, 26473]
    lines[1]["0"] = ["block_sparse", 8, 1, 0.9]
    scores = {f"{i}-{h}": [0, 0.25 * (h == i), 0.125 * (h == i)] for i in range(2) for h in range(3)}
    return {
        "moa": write(tmp_path / "moa.json", {"alphas": [[0.0, 64.0], [-1024.0, 0.0]], "betas": [[0.5, 0], [1.0, 0.5]]}),
        "duo_attention": duo_folder(tmp_path / "duo", [[0.9, -1e-5], [0.2, 1.0000001]]),
        "minference": write(tmp_path / "minference.json", lines),
        "retrieval_heads": write(tmp_path / "scores.json", scores),
    }


@pytest.mark.parametrize("name", imports.FORMATS)
def test_a_format_is_told_by_its_looks_and_its_spec_comes_back(name, files, tmp_path):
    found = imports.load(files[name])
    assert found.format == name and found == imports.load(files[name], name)
    spec = imports.read(files[name])
    for ending in ("yaml", "json"):
        spec.save(tmp_path / f"out.{ending}", found.comment())
        assert load_spec(tmp_path / f"out.{ending}") == spec == found.spec()
    text = (tmp_path / "out.yaml").read_text()
    assert text.startswith("# Imported by sparsify") and found.path.name in text
    assert imports.FORMATS[name].source in text.replace("\n# ", " ")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_moa_means_the_masks_of_its_run_time(files):
    found = imports.read(files["moa"], max_new=32).resolve(sites(2, 2))
    rules = [[(0, 0.5), (64, 0)], [(-1024, 1), (0, 0.5)]]
    for heads, pairs in zip(found, rules, strict=True):
        for pattern, (alpha, beta) in zip(heads, pairs, strict=True):
            assert torch.equal(pattern.mask(1, 400, 400), by_hand(moa(alpha, beta, 32), 1, 400, 400, None))
            assert pattern == pre.moa_head(alpha, beta, 32)


def test_minference_runs_each_class_as_the_released_kernels_do_and_decodes_densely(files):
    spec = imports.read(files["minference"])
    first, second = spec.resolve(sites(2, 4))
    assert first == (pre.minference_lines(30, 800),) * 4
    assert second == (pre.minference_blocks(), first[0], pre.a_shape(100, 800), first[0])
    assert torch.equal(second[2].mask(1, 950, 950)[0, -1], by_hand(streaming(100, 800), 1, 1, 950, None)[0, 0])
    assert spec.resolve(sites(2, 4, "decode"), complete=False) == [None, None]


def test_scores_make_the_best_heads_dense(files):
    first, second = imports.read(files["retrieval_heads"]).resolve(sites(2, 3))  # heads 0-0 and 1-1 score 0.125
    assert first == (dense(), OTHER, OTHER)
    assert second == (OTHER, dense(), OTHER)
    first, second = imports.read(files["retrieval_heads"], top=1, sinks=2, recent=9).resolve(sites(2, 3))
    assert first == (dense(), *second[:2]) and set(second) == {pre.duo_streaming(sinks=2, recent=9)}
    assert torch.equal(second[0].mask(1, 40, 40), by_hand(streaming(2, 9), 1, 40, 40, None))
    assert imports.load(files["retrieval_heads"], threshold=0.13).counts() == {"streaming": 6}


def test_duo_attention_deploys_the_sizes_of_its_config(files, tmp_path):
    first, second = imports.read(files["duo_attention"]).resolve(sites(2, 2))
    assert first == (dense(), TRAINED) and second == first[::-1]
    folder = duo_folder(tmp_path / "deployed", [[0.9, 0.1]], deploy_sink_size=64, deploy_recent_size=32)
    assert imports.read(folder).resolve(sites(1, 2))[0][1] == pre.duo_streaming(sinks=64, recent=32)
    assert imports.read(folder, recent=9).resolve(sites(1, 2))[0][1] == pre.duo_streaming(sinks=64, recent=9)
    folder = duo_folder(tmp_path / "half", [[0.9, 0.6], [0.7, 0.8]], sparsity=0.5)
    assert imports.load(folder).layers == (("dense", "streaming"), ("streaming", "dense"))
    assert imports.load(folder, threshold=0.65).counts() == {"dense": 3, "streaming": 1}
    assert imports.load(f"{folder}/full_attention_heads.tsv") == imports.load(f"{folder}/config.json", "duo_attention")


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 6), st.one_of(st.floats(0, 1), st.sampled_from([0, 0.25, 0.5, 1])), st.integers()
)
def test_the_share_of_streaming_heads_is_the_released_quantile(layers, heads, sparsity, seed):
    from sparsify.imports.duo_attention import _full

    gates = random.Random(seed).sample(range(10_000), layers * heads)
    rows = np.array(gates).reshape(layers, heads) / 10_000
    threshold = 2 if sparsity >= 1 else -1 if sparsity <= 0 else np.quantile(rows, sparsity)
    found = np.array(_full(rows.tolist(), sparsity, None)[0])
    near = np.isclose(rows, threshold, rtol=0, atol=1e-9)  # on the threshold but for rounding
    assert np.array_equal(found | near, (rows >= threshold) | near)


def test_equal_gates_still_make_as_many_heads_dense(tmp_path):
    folder = duo_folder(tmp_path / "ties", [[0.0, 0.0], [-0.1, 0.0]], sparsity=0.5)
    assert imports.load(folder).layers == (("dense", "dense"), ("streaming", "streaming"))


def test_gates_of_kv_heads_are_those_of_their_query_heads(files):
    first, second = imports.read(files["duo_attention"], query_heads=6).resolve(sites(2, 6))
    assert first == (dense(),) * 3 + (TRAINED,) * 3 and second == first[::-1]
    with pytest.raises(SpecError, match=r"heads 2-5 have no pattern, but 'model.layers.0.self_attn' has heads 0-5"):
        imports.read(files["duo_attention"]).resolve(sites(2, 6))
    assert "gates of KV heads are taken as those of query heads" in imports.load(files["duo_attention"]).comment()


def test_layers_alike_are_one_rule_and_every_head_is_named(tmp_path):
    path = write(tmp_path / "m.json", {"alphas": [[0] * 32] * 40, "betas": [[0.5] * 32] * 39 + [[0.5] * 31 + [1]]})
    spec = imports.read(path)
    assert spec.to_dict()["sites"] == [
        {"match": "*", "layers": "0-38", "heads": {"0-31": "span_0_0.5"}},
        {"match": "*", "layers": "39", "heads": {"0-30": "span_0_0.5", "31": "span_0_1"}},
    ]
    with pytest.raises(SpecError, match="found head 31, but"):
        spec.resolve(sites(40, 16))


MOA = '{"alphas": [[0, 0]], "betas": [[0.5, 0.5]]}'
LINES = '[{"0": ["vertical_and_slash", 30, 800, 0.5]}]'
WRONG = [
    ("", "line 1, column 1: not valid JSON: Expecting value"),
    ('{"alphas": [[0],', "line 1, column 17: not valid JSON: Expecting value"),
    ("[" * 100_000, "nested too deeply"),
    ("3", "the file is in no known format; known are MoA: a JSON object with"),
    ('{"a": 1}', "the file is in no known format; known are MoA: a JSON object with"),
    ('{"alphas": [[0]]}', "the field 'betas' is missing"),
    (MOA.replace("betas", "beta"), "beta: unknown field; allowed: alphas, betas"),
    (MOA.replace("[[0, 0]]", "[]"), "alphas: expected a list with a list for each layer, found an empty list"),
    (MOA.replace("[[0, 0]]", "[[0, 0], [0, 0]]"), "betas: expected 2 entries, found 1"),
    (MOA.replace("[0, 0]", "0"), "alphas[0]: expected a list with a number for each head, found 0"),
    (MOA.replace("[0, 0]", "[0, 0, 0]"), "betas[0]: expected 3 entries, found 2"),
    (MOA.replace("[0, 0]", '[0, "0"]'), "alphas[0][1]: expected a number from -1073741824 to 1073741824, found '0'"),
    (MOA.replace("[0.5, 0.5]", "[0.5, 1.5]"), "betas[0][1]: expected a number from 0 to 1, found 1.5"),
    (MOA.replace("[0.5, 0.5]", "[0.5, true]"), "betas[0][1]: expected a number from 0 to 1, found True"),
    (MOA.replace("[0.5, 0.5]", "[0.5, NaN]"), "expected finite numbers, found NaN"),
    ('{"alphas": 1, "alphas": 2}', "the key 'alphas' is given twice"),
    ("[]", "expected a list with an object for each layer, found an empty list"),
    ("[3]", "[0]: expected an object with an entry for each head, found 3"),
    (LINES.replace('"0"', '"x"'), '[0]: expected head numbers such as "0" as keys, found \'x\''),
    (LINES.replace('"0"', '"1"'), "[0]: head 0 is missing, though head 1 is there"),
    (LINES.replace('"0"', '"999999999"'), "[0]: head 0 is missing, though head 999999999 is there"),
    (LINES.replace('"0"', f'"{"9" * 5000}"'), '[0]: expected head numbers such as "0" as keys, found '),
    (LINES.replace("_and_", "_"), "[0].0[0]: unknown class 'vertical_slash'; did you mean 'vertical_and_slash'?"),
    (LINES.replace("30", "0.5"), "[0].0[1]: expected an integer, found 0.5"),
    (LINES.replace("800", "[0.9, 4096]"), "[0].0[2]: expected a number from 0 to 1073741824, found [0.9, 4096]"),
    (LINES.replace(", 0.5", ""), "[0].0: expected 4 entries, found 3"),
    ('{"0-0": [0.1], "1-x": [0.1]}', "1-x: expected a key such as '3-17', a layer and a head"),
    ('{"0-0": [0.1], "0-1": []}', "0-1: expected a list of scores, one a sample, found an empty list"),
    ('{"0-0": [0.1], "0-1": [-1]}', "0-1[0]: expected a number of at least 0, found -1"),
    (f'{{"0-0": [1{"0" * 400}]}}', "0-0[0]: expected a number of at least 0, found 1"),
    ('{"0-0": [0.1], "1-1": [0.1]}', "head '0-1' is missing, expected 2 heads in each layer"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "what"), WRONG)
def test_a_wrong_file_is_one_sentence_that_names_the_place(text, what, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError) as caught:
        imports.read(tmp_path / "plan.json")
    assert str(caught.value).startswith(f"{tmp_path / 'plan.json'}: {what}") and "\n" not in str(caught.value)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**40),
    st.floats(-2, 2**40),
    st.sampled_from(["vertical_and_slash", "0", ""]),
)
keys = st.sampled_from(["alphas", "betas", "0", "1", "0-0", "0-1", "1-0", "x"])
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=4) | st.dictionaries(keys, t, max_size=4), max_leaves=20
)  # fmt: skip
heads = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1, max_size=3)
likely = st.one_of(
    trees,
    st.fixed_dictionaries({"alphas": heads | trees, "betas": heads | trees}),
    st.lists(
        st.dictionaries(keys, st.tuples(st.sampled_from(["stream_llm", "x"]), leaves, leaves, leaves), max_size=2)
    ),
    st.dictionaries(keys, st.lists(leaves, max_size=3), max_size=4),
)


@settings(max_examples=200)
@given(value=likely)
def test_any_json_is_a_plan_or_one_sentence(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "plan.json"
    path.write_text(json.dumps(value))
    try:
        found = imports.load(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    count = len(found.layers)
    model = [sites(count, len(heads))[layer] for layer, heads in enumerate(found.layers)]  # layers may differ in heads
    assert len(found.spec().resolve(model, complete=False)) == count


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("config.json", "[]", "config.json: expected an object with 'sink_size' and 'recent_size', found []"),
        ("config.json", '{"sink_size": 4}', "config.json: the field 'recent_size' is missing"),
        ("config.json", '{"sink_size": 4, "recent_size": 0}', "recent_size: expected a number of at least 1, found 0"),
        ("config.json", '{"sink_size": 4.5, "recent_size": 1}', "expected an integer of at least 0, found 4.5"),
        ("config.json", '{"sink_size": 4, "recent_size": 8, "sparsity": 2}', "sparsity: expected a number from"),
        ("full_attention_heads.tsv", "", "expected a row of numbers for each layer, found an empty file"),
        ("full_attention_heads.tsv", "1\t0\n1\n", "line 2: expected 2 numbers as above, found 1"),
        ("full_attention_heads.tsv", "1\t0\n1\tx\n", "line 2, number 2: expected a number, found 'x'"),
        ("full_attention_heads.tsv", "1\tnan\n", "line 1, number 2: expected a number, found 'nan'"),
        ("full_attention_heads.tsv", b"1\t\xff\n", "line 1: byte 0xff is not UTF-8 text"),
        ("full_attention_heads.tsv", None, "duo: the folder is in no known format; known are MoA: a JSON object with"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_one_sentence_that_names_file_and_place(file, text, what, tmp_path):
    path = tmp_path / "duo" / file
    duo_folder(tmp_path / "duo", [[0.9, 0.1]])
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=re.escape(what)):
        imports.read(tmp_path / "duo")


def test_a_folder_without_gates_is_not_taken_for_a_broken_plan(files, tmp_path):
    known = (
        "in no known format; known are MoA: .*; DuoAttention: a folder with full_attention_heads.tsv and config.json"
    )
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(InputError, match=f"model: the folder is {known}"):
        imports.load(folder)
    write(folder / "config.json", {"model_type": "llama", "hidden_size": 64})
    for path, what in ((folder, "folder"), (folder / "config.json", "file")):
        with pytest.raises(InputError, match=f"{path}: the {what} is {known}"):
            imports.load(path)
        with pytest.raises(InputError, match=r"model/config.json: the field 'sink_size' is missing$"):
            imports.load(path, "duo_attention")
    shutil.copy(files["moa"], folder / "config.json")
    assert imports.load(folder / "config.json").format == "moa", "a name says less than what is in the file"
    with pytest.raises(InputError, match=r"none/config.json: there is no such file$"):
        imports.load(tmp_path / "none" / "config.json")


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("moa", {"format": "mao"}, "import: unknown format 'mao'; did you mean 'moa'?"),
        ("moa", {"format": "minference"}, "the file is not in the format minference; expected MInference: a JSON list"),
        ("moa", {"top": 3}, "import: 'top' is no option of moa; allowed: max_new"),
        ("moa", {"max_new": 1.5}, "import: max_new: expected an integer of at least 0, found 1.5"),
        ("moa", {"query_heads": 4}, "layer 0 is planned for 2 query heads, but the model has 4 query heads"),
        ("moa", {"query_heads": "4"}, "import: query_heads: expected an integer of at least 1, found '4'"),
        ("moa", {"query_heads": {0: 2.5}}, "import: query_heads: expected an integer of at least 1, found 2.5"),
        ("moa", {"query_heads": 0}, "import: query_heads: expected an integer of at least 1, found 0"),
        ("minference", {"sinks": 3}, "import: 'sinks' is no option of minference; it has none"),
        ("duo_attention", {"sparsity": 1.5}, "import: sparsity: expected a number from 0 to 1, found 1.5"),
        ("duo_attention", {"sparsity": 0.5, "threshold": 0.5}, "sparsity and threshold both say which heads are dense"),
        ("duo_attention", {"query_heads": 5}, "layer 0 is planned for 2 KV heads, but the model has 5 query heads"),
        ("retrieval_heads", {"top": 1, "threshold": 0.5}, "import: top and threshold both say which heads are dense"),
        ("retrieval_heads", {"top": 7}, "import: top: the file has 6 heads, found 7"),
    ],
)
def test_a_wrong_option_is_one_sentence(name, options, what, files):
    with pytest.raises(InputError, match=re.escape(what)):
        imports.read(files[name], **options)


@pytest.mark.parametrize(
    ("heads", "what"),
    [
        ({}, "the plan is for layers, but no attention of llama has a layer's number"),
        ({0: 2}, "the plan is for 2 layers, but llama has 1"),
        ({1: 2}, "layer 0 is planned, but has no attention in llama"),
        ({0: 2, 1: 3}, "layer 1 is planned for 2 query heads, but llama has 3 query heads there"),
    ],
)
def test_a_plan_for_another_model_says_how_it_differs(heads, what, files):
    with pytest.raises(InputError, match=f"moa.json: {re.escape(what)}$"):
        imports.load(files["moa"]).for_heads(heads, "llama")


def test_gates_for_other_kv_heads_are_an_error(files):
    found = imports.load(files["duo_attention"])
    assert found.for_heads({0: 8, 1: 8}, "llama", {0: 2}).layers[0] == ("dense",) * 4 + ("streaming",) * 4
    with pytest.raises(InputError, match=r"tsv: layer 1 is planned for 2 KV heads, but has 4 in llama$"):
        found.for_heads({0: 8, 1: 8}, "llama", {0: 2, 1: 4})


def run(monkeypatch, capsys, line: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["sparsify", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
        raise SystemExit(0)
    torch._dynamo.reset()  # it takes a length that it has seen with two values as a symbol, in other tests, too
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


LLAMA = "--model llama --set num_hidden_layers=2 --set num_attention_heads=4 --set hidden_size=64"


def test_the_command_writes_a_spec_that_the_backend_takes(monkeypatch, capsys, files, tmp_path):
    out = tmp_path / "spec.yaml"
    code, said, err = run(
        monkeypatch, capsys, f"import {files['duo_attention']} {LLAMA} --set num_key_value_heads=2 -o {out}"
    )
    assert (code, err) == (0, "") and "duo_attention, 2 layers x 4 heads" in said and "50.0%" in said
    code, said, _ = run(monkeypatch, capsys, f"explain llama --spec {out} -n 300 --json {LLAMA.partition('llama')[2]}")
    found = [site["patterns"] for site in json.loads(said)["sites"]]
    streaming_head = "duo_streaming(sinks=128)"
    assert found == [["dense()"] * 2 + [streaming_head] * 2, [streaming_head] * 2 + ["dense()"] * 2]


def test_an_imported_spec_computes_what_its_rule_keeps(files):
    q, k, v = (torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    first, _ = imports.read(files["moa"], max_new=0).resolve(sites(2, 2))
    mask = torch.cat([by_hand(moa(a, b, 0), 1, 300, 300, None) for a, b in ((0, 0.5), (64, 0))])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(sparsify.attention(q, k, v, first), expected, rtol=1e-5, atol=1e-5)


def test_the_command_prints_without_out_and_writes_nothing_when_it_refuses(monkeypatch, capsys, files, tmp_path):
    code, said, err = run(monkeypatch, capsys, f"import {files['moa']}")
    assert code == 0 and err == "" and said.startswith("# Imported by sparsify")
    (tmp_path / "printed.yaml").write_text(said)
    assert load_spec(tmp_path / "printed.yaml") == imports.read(files["moa"])
    before = sorted(tmp_path.iterdir())
    for line, what in (
        (f"{files['moa']} {LLAMA} -o {tmp_path}/no.yaml", "layer 0 is planned for 2 query heads, but llama has 4"),
        (f"{files['moa']} --top 3 -o {tmp_path}/no.yaml", "import: 'top' is no option of moa; allowed: max_new"),
        (f"{files['moa']} -o {files['moa']}/no.yaml", "import: --out: "),
        (f"{tmp_path}/none.json -o {tmp_path}/no.yaml", "none.json: there is no such file"),
        (f"{files['moa']} --model llama --query-heads 2", "--query-heads and --model both say how many heads"),
        (f"{files['moa']} --query-heads 4", "layer 0 is planned for 2 query heads, but the model has 4 query heads"),
        (f"{files['moa']} --set hidden_size=64", "import: --set goes with --model only"),
        (f"{files['moa']} -o {files['moa']}", "is the plan itself, which would be lost; give another file"),
    ):  # fmt: skip
        code, said, err = run(monkeypatch, capsys, f"import {line}")
        assert (code, said) == (2, "") and what in err and err.startswith("sparsify: ") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    code, _, err = run(monkeypatch, capsys, f"import {files['duo_attention']} -o {tmp_path}/new/yes.yaml")
    assert code == 0 and "gates of KV heads are taken as those of query heads" in err
