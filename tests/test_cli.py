"""The command line as its users meet it: a command, then its exit code, what it prints and what it writes."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import golden
import pytest

import sparsify.cli.presets
from sparsify import cli
from sparsify.errors import Refusal
from sparsify.patterns import PRESETS, Pattern, topk
from sparsify.patterns.presets import preset
from sparsify.spec import schema

doctor_module = importlib.import_module("sparsify.cli.doctor")  # the package's `doctor` is the command
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in this process, in an empty folder beside `specs`; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").symlink_to(ROOT / "examples" / "specs")

    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsify", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return command


@pytest.mark.parametrize(("line", "expected"), golden.cases("cli"), ids=golden.ids)
def test_commands_say_what_they_said(line, expected, accept, run, tmp_path):
    Path(tmp_path, "bad.yaml").write_text("version: 1\nsites:\n  - heads: {windw: 64}\n")
    Path(tmp_path, "two.yaml").write_text("version: 1\nsites:\n  - heads: {0-3: dense, 4-5: {window: 64}}\n")
    Path(tmp_path, "grid.yaml").write_text("version: 1\nsites: [{heads: {natten: {shape: [6, 4], window: 3}}}]\n")
    code, out, err = run(line)
    lines = [f"exit {code}", *out.splitlines(), *(f"! {text}" for text in err.splitlines())]
    golden.check("cli", line, expected, "\n".join(text.rstrip() for text in lines), accept)


def test_a_config_that_transformers_refuses_says_why(run):
    code, out, err = run("explain llama --set num_attention_heads=7 --set hidden_size=64")
    told = " ".join(err.split())
    assert code != 0 and out == "" and "llama: transformers can't make this model" in told
    assert "The hidden size (64) is not a multiple of the number of attention heads (7)" in told


@pytest.mark.parametrize("line", ["shw", "show", "show two.yaml --heads six", "doctor --kernel", "bench --lenght 3"])
def test_a_mistyped_command_line_ends_with_2(line, run):
    code, out, err = run(line)
    assert code == 2 and out == "" and "Usage: sparsify" in err and "Traceback" not in err


def test_show_writes_both_pictures(run, tmp_path):
    code, out, err = run("show specs/mixture.yaml --length 512 --out pictures")
    assert (code, err) == (0, "") and "written to pictures/mixture.png" in out
    assert (tmp_path / "pictures" / "mixture.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "pictures" / "mixture.html").read_text()
    assert "medium" in page and "model.layers.{2-3}.self_attn" in page


@pytest.mark.parametrize("constructor", PRESETS, ids=lambda constructor: constructor.__name__)
def test_show_tells_and_draws_every_preset(constructor, run, tmp_path):
    name, about = constructor.__name__, constructor.about
    code, out, err = run(f"show {name} --no-png")
    text = re.sub(r"\s+", " ", out)
    assert (code, err) == (0, "") and all(len(line) <= 80 for line in out.splitlines())
    for part in (constructor.__doc__.splitlines()[0], about.source, about.cost, about.omits, about.semantics):
        assert re.sub(r"\s+", " ", part) in text
    assert name in (tmp_path / f"{name}.html").read_text() and f" {name} " in run("show --list")[1]


def test_show_draws_what_data_would_choose(run, tmp_path, monkeypatch):
    """Selections are drawn of made-up data: in presets, also of one's own, and in specs, for any heads."""

    @preset(source="nobody", phase="decode", semantics="approx", cost="little", length=60)
    def chosen(keep: int = 4) -> Pattern:
        """The best keys."""
        return topk(keep, unit=1, queries=1, local=0)

    monkeypatch.setitem(sparsify.patterns.PATTERNS, "chosen", chosen)
    monkeypatch.setitem(sys.modules["sparsify.cli.presets"].BY_NAME, "chosen", chosen)
    code, _, err = run("show chosen:keep=15 --queries 30 --heads 3")
    assert (code, err) == (0, "")
    assert "25.0 %" in (tmp_path / "chosen.html").read_text() and (tmp_path / "chosen.png").exists()
    heads = {"0": {"chosen": 6}, "1": {"any": [{"topk": 2}, {"sinks": 3}]}, "rest": "pbs_attn"}
    (tmp_path / "s.json").write_text(json.dumps({"version": 1, "sites": [{"match": "*", "heads": heads}]}))
    code, out, err = run("show s.json --length 60 --queries 6 --no-png")
    assert code == 0 and "note: what selections keep is that of made-up queries and keys" in err and "3 patterns" in out


def test_show_without_matplotlib_says_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = run("show specs/streaming.yaml --length 64")
    message = "a PNG needs matplotlib: pip install 'sparsify[show]' (the HTML page doesn't need it)"
    assert (code, err) == (2, f"sparsify: {message}\n") and (tmp_path / "streaming.html").exists()
    assert run("show specs/streaming.yaml --length 64 --no-png")[0] == 0


def test_schema_prints_the_schema(run):
    code, out, err = run("schema")
    assert (code, err) == (0, "") and json.loads(out) == schema()


@pytest.mark.parametrize("command", [function.__name__.strip("_") for function in cli.COMMANDS])
def test_every_command_explains_itself_at_80_columns(run, command):
    code, out, err = run(f"{command} --help")
    assert (code, err) == (0, "") and f"Usage: sparsify {command}" in out
    assert all(len(line) <= 80 for line in out.splitlines()) and "\x1b" not in out
    assert f" {command} " in run("--help")[1]


def test_doctor_reports_each_check(run):
    code, out, err = run("doctor --json")
    found = {finding["name"]: finding for finding in json.loads(out)}
    names = [
        "python", "torch", "processor", "compiler", "cache", "tuned kernels", "triton", "gpu", "target cpp",
        "target triton",
    ]  # fmt: skip
    assert list(found) == names and err == ""
    assert code == (0 if found["target cpp"]["ok"] or found["target triton"]["ok"] else 1)
    assert "torch" in run("doctor")[1]


def test_doctor_says_why_not(run, monkeypatch):
    broken = {"SPARSIFY_CXX": "/no/such/c++", "SPARSIFY_ISA": "avx9", "SPARSIFY_CACHE_DIR": "/dev/null/x"}
    for name, value in broken.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, _ = run("doctor")
    text = re.sub(r"\s+", " ", out)
    assert code in (0, 1) and code == (0 if "ok target triton" in text else 1)
    for part in (
        "no processor environment variable SPARSIFY_ISA: found 'avx9'; did you mean 'avx2'?",
        "no compiler the C++ compiler '/no/such/c++' was not found set SPARSIFY_CXX to a compiler on the path",
        "no cache /dev/null/x can't be written set SPARSIFY_CACHE_DIR to a folder that can be",
        "no target cpp the C++ compiler '/no/such/c++' was not found",
    ):
        assert part in text


def test_doctor_tells_a_wrong_kernel(monkeypatch):
    class Wrong:
        def unavailable(self):
            return None

        def run(self, launch):
            return launch.empty_output().zero_()

    monkeypatch.setattr("sparsify.codegen.target", lambda name: Wrong())
    found = doctor_module._target("cpp", "cpu")
    assert found.ok is False and found.found.startswith("a small kernel is wrong by ")
    monkeypatch.setattr(
        "sparsify.codegen.target", lambda name: SimpleNamespace(unavailable=lambda: Refusal("no", hint="h"))
    )
    assert doctor_module._target("cpp", "cpu") == doctor_module.Finding("target cpp", False, "no", "h")


def test_doctor_prints_the_table_of_kernels(run, monkeypatch):
    resources = pytest.importorskip("sparsify.codegen.triton.resources")
    taken = resources.Resources(168, 0, 49152, "wgmma+tma"), resources.Resources(255, 64, 65536)
    rows = [resources.Row("causal__bfloat16__d64__m128n64w4s3", "sm_90", taken[0])]
    rows += [resources.Row("expr__float32__d128__m64n32w4s2", "gfx942", taken[1])]
    monkeypatch.setattr(resources, "kernel_resources", lambda progress: rows)
    code, out, err = run("doctor --kernels")
    titles = ["kernel", "chip", "registers", "spills", "shared", "matrix"]
    assert (code, err) == (0, "") and out.splitlines()[0].split() == titles
    first = ["causal__bfloat16__d64__m128n64w4s3", "sm_90", "168", "0", "49152", "wgmma+tma"]
    assert out.splitlines()[1].split() == first
    assert json.loads(run("doctor --kernels --json")[1])[1]["spills"] == 64


def test_it_runs_as_a_module_and_as_a_script():
    for command in ([sys.executable, "-m", "sparsify"], [str(Path(sys.executable).with_name("sparsify"))]):
        done = subprocess.run([*command, "show", "/no/spec.yaml"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "sparsify: /no/spec.yaml: there is no such file\n"


def test_the_help_needs_no_torch():
    code = "import sys, sparsify.cli; assert not {'torch', 'matplotlib', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def llama(tmp_path):
    """A folder with a small model's config.json, and no weights."""
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    return tmp_path / "model"


def test_explain_reads_a_folder_with_a_config(run, llama):
    code, out, err = run("explain model --spec specs/streaming.yaml --length 40 --json")
    report = json.loads(out)
    assert (code, err) == (0, "") and [site["address"] for site in report["sites"]] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert all(site["patterns"] == ["sinks(4) | window(1024)"] * 4 and not site["refusal"] for site in report["sites"])


# What these show is in the others, too: a causal model, a spec on a window, a model of eager attention, padding.
SLOW = (
    "explain llama --length 40",
    "explain mistral --attn eager --length 320 --spec specs/streaming.yaml --target null",
    "explain gpt2 --attn eager --length 96 --target null",
    "explain mistral --length 320 --padding --batch 2 --target null",
)
EXPLAINED = [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in golden.cases("explain")]


@pytest.mark.parametrize(("line", "expected"), EXPLAINED, ids=golden.ids)
def test_explain_says_what_it_said(line, expected, accept, run, tmp_path, monkeypatch):
    """Five model types, with what differs by version and machine left out: line numbers and seconds."""
    monkeypatch.setenv("SPARSIFY_CROSSOVER", "1")
    for name, fields in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name, **fields}))
    code, out, err = run(line)
    shown = re.sub(r"(\.py):\d+", r"\1:LINE", re.sub(r"\d+\.\d+ s$", "T s", out.rstrip()))
    assert (code, err) == (0, "") and all(len(text) <= 80 for text in out.splitlines())
    golden.check("explain", line, expected, "\n".join(text.rstrip() for text in shown.splitlines()), accept)


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 16},
    "bert": SMALL,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 64},
    "gemma3_text": SMALL
    | {
        "head_dim": 16,
        "sliding_window": 16,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
    },
}


def test_explain_prints_a_table_and_is_strict_if_asked(run, tmp_path, monkeypatch):
    Path(tmp_path, "mine.py").write_text(
        "import torch\n"
        "def model(q):\n"
        "    keep = (q.sum(-1) > 0)[..., None]\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep, dropout_p=0.5)\n"
        "def make():\n"
        "    return model, (torch.randn(1, 2, 9, 16),)\n"
    )
    code, out, _ = run("explain mine:make")
    assert code == 0 and "0 of 1 attention sites rewritten" in out and "dropout" in out
    assert run("explain mine:make --strict")[0] == 1


def test_explain_takes_factories_of_any_kind(run, tmp_path):
    Path(tmp_path, "factories.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, q, twice=False):\n"
        "        q = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
        "        return torch.nn.functional.scaled_dot_product_attention(q, q, q) if twice else q\n"
        "Q = torch.randn(1, 2, 9, 16)\n"
        "def one():\n    return Model(), Q\n"
        "def two():\n    return Model(), {'q': Q, 'twice': True}\n"
        "def three():\n    return Model(), (Q,), {'twice': True}\n"
        "def none():\n    return Model()\n"
        "def hugging():\n"
        "    import transformers\n"
        "    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)\n"
        "    return transformers.GPT2LMHeadModel(config).eval()\n"
    )
    for name, sites in (("one", 1), ("two", 2), ("three", 2), ("hugging", 1)):
        code, out, err = run(f"explain factories:{name} --json --length 20 --target null")
        assert (code, err, len(json.loads(out)["sites"])) == (0, "", sites), name
    message = "sparsify: explain: factories:none() must return (model, inputs), found Model\n"
    assert run("explain factories:none") == (2, "", message)


def test_explain_tells_what_is_wrong(run, llama, monkeypatch):
    code, out, err = run("explain model --spec specs/documents.yaml --length 8")
    assert (code, out) == (2, "") and err.startswith(
        "sparsify: specs/documents.yaml:11:5: sites[0]: the rule matches no"
    )
    for line, message in (
        ("lama", "'lama' is no config.json, no folder with one, no package.module:callable and no model type of"),
        ("model --set hidden_size", "--set: expected NAME=VALUE, such as num_hidden_layers=4, found 'hidden_size'"),
        ("llama --set hiden_size=64", "unknown field 'hiden_size' of llama's config; did you mean 'hidden_size'"),
        ("model --set num_layers=1", "--set: unknown field 'num_layers' of llama's config; did you mean 'num_"),
        ("gpt2 --set hidden_sise=64", "unknown field 'hidden_sise' of gpt2's config; did you mean 'hidden_size'?"),
        ("none/config.json", "sparsify: explain: there is no file 'none/config.json'; give a config.json, a folder"),
        ("config.json", "sparsify: explain: there is no file 'config.json'; give a config.json, a folder with one"),
        ("specs", "sparsify: explain: the folder 'specs' has no config.json\n"),
        ("wav2vec2", "Wav2Vec2Model reads input_values; give it as package.module:callable"),
        ("model --attn fast", "model: transformers can't make this model: "),
        ("bert --decode --set num_hidden_layers=1", "BertForMaskedLM keeps no cache, so it has no decode step"),
    ):
        code, out, err = run(f"explain {line}")
        assert (code, out) == (2, "") and message in err, (line, err)
    (llama / "config.json").write_text("{")
    assert run("explain model")[2].startswith("sparsify: explain: model: transformers can't make this model: ")
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = "sparsify: explain: a Hugging Face model needs transformers: pip install 'sparsify[demo]'\n"
    assert run("explain model") == (2, "", message)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--device cudaa", "sparsify: plan: device: the model can't be moved to 'cudaa': "),
        ("--candidates ./none.yaml", "sparsify: plan: candidates: there is no file './none.yaml'"),
    ],
)
def test_plan_names_what_is_not_there(run, tmp_path, monkeypatch, option, says):
    (tmp_path / "made.py").write_text("import torch\ndef model():\n    return torch.nn.Linear(2, 2), {}\n")
    (tmp_path / "text.txt").write_text("some text")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = run(f"plan made:model --data text.txt {option}")
    assert code == 2 and says in " ".join(err.split())
    assert not list(tmp_path.glob("plan*"))
