"""`sparsify plan` as its users meet it: a folder and text, then a spec, a plan, and what is printed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import cli
from sparsify.planner import Plan
from sparsify.planner.samples import of_hugging_face

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama over bytes with its weights, a text, and candidates that take no time."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 256}
    config = LlamaConfig(**sizes, max_position_embeddings=96, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(path / "llama")
    (path / "bare").mkdir()
    (path / "bare" / "config.json").write_text((path / "llama" / "config.json").read_text())
    (path / "text.txt").write_text("".join(chr(33 + (i * i + 7 * i) % 90) for i in range(2000)))
    (path / "empty.txt").write_text("")
    (path / "few.yaml").write_text("candidates:\n  near: {sinks: 2, window: 12}\n  half: {window: N/2}\n")
    return path


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs a command line in this process, beside the models; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sparsify.planner.memory.keep_freed", lambda: None)  # of the tests' own process

    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsify", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return command


GIVEN = "--data text.txt --lengths 32,48 --candidates few.yaml --samples 1 --rounds 0 --of pairs --no-evidence"


def test_a_folder_and_text_give_a_spec(run, folder):
    code, out, err = run(f"plan llama {GIVEN} --budget 0.8 -o mine.yaml")
    assert code == 0 and err == ""
    assert "what each head of llama gets" in out and "> plan at 0." in out
    assert "mine.yaml: the spec; mine.plan.json: the plan" in out
    found, spec = Plan.load(folder / "mine.plan.json"), sparsify.load_spec(folder / "mine.yaml")
    assert spec == found.spec() and found.front[found.chosen].cost <= 0.8 + 1e-6
    assert not list(folder.glob("*.state"))
    model = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    with torch.no_grad():
        report = sparsify.explain(model, input_ids=torch.zeros(1, 48, dtype=torch.long), use_cache=False, spec=spec)
    assert not report.refused


@pytest.mark.slow
def test_what_was_profiled_is_kept_in_a_folder_that_is_given(run, folder, monkeypatch):
    assert run(f"plan llama {GIVEN} --profile output --budget 0.8 --state kept -o one.yaml")[0] == 0
    kept = sorted((folder / "kept").iterdir())
    monkeypatch.setattr("sparsify.planner.profiles.forward._one", None)  # it would be an error to profile again
    assert run(f"plan llama {GIVEN} --profile output --budget 0.7 --state kept -o two.yaml")[0] == 0
    assert set(kept) < set((folder / "kept").iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"plan llama {GIVEN.replace('text', 'empty')}", "sparsify: plan: data: no text in empty.txt\n"),
        (f"plan llama {GIVEN.replace('text', 'no')}", "sparsify: plan: data: 'no.txt' is no file and no folder\n"),
        (f"plan llama {GIVEN} --budget half", "sparsify: plan: budget: expected a share of the dense cost above 0"),
        (f"plan llama {GIVEN.replace('48', '128')}", "plan: lengths: found 128; the model reads at most 96 tokens\n"),
        (f"plan llama {GIVEN.replace('32,48', 'long')}", "plan: lengths: expected integers such as 1024,2048, found"),
        (f"plan bare {GIVEN}", "sparsify: plan: bare: the folder has no weights (*.safetensors)\n"),
        (f"plan nowhere {GIVEN}", "sparsify: plan: 'nowhere' is no folder with a config.json and weights, and no"),
        (f"plan llama {GIVEN} --budget 0.01", "plan: budget: no choice comes to 0.01 of the dense cost; the nearest"),
    ],
)
def test_wrong_input_is_one_sentence(line, message, run):
    code, out, err = run(line)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and "Traceback" not in out + err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-o taken.yaml", "plan: --out: expected the name of a file, found 'taken.yaml', which is a folder"),
        ("-o held.yaml", "plan: --out: expected the name of a file, found 'held.plan.json', which is a folder"),
        ("-o /dev/null", "plan: --out: expected the name of a file, found '/dev/null', which is no file"),
        ("--state text.txt", "plan: --state: 'text.txt/profile' can't be written: Not a directory"),
        ("-o text.txt/p.yaml", "plan: --out: 'text.txt/p.yaml' can't be written: Not a directory"),
        ("-o /proc/self/p.yaml", "plan: --out: '/proc/self/p.yaml' can't be written: "),
    ],
)
def test_what_can_not_be_written_is_told_before_the_model_is_read(option, message, run, folder):
    if "/proc" in option and not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc")
    for name in ("taken.yaml", "held.plan.json"):
        (folder / name).mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    code, out, err = run(f"plan nowhere {GIVEN} {option}")
    assert (code, out) == (2, "") and err.startswith(f"sparsify: {message}") and len(err.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


def test_the_help_has_room_at_80_columns(run, monkeypatch):
    """Nothing is cut, and what is said of an option has lines of 30 letters at least."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("plan --help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "…" not in out
    for panel in re.split(r"(?m)^╭─+", re.sub(r"[│╰].*[╯]", "", out))[2:]:
        said = [re.split(r" {2,}", line.strip("│ "))[-1] for line in panel.splitlines()[1:]]
        assert max(map(len, said)) >= 30, panel


def test_an_encoder_without_a_tokenizer_is_no_reader_of_bytes(run, folder, capsys):
    BertModel(BertConfig(**SIZES, vocab_size=300, max_position_embeddings=64)).save_pretrained(folder / "bert")
    capsys.readouterr()  # transformers' progress
    code, _, err = run(f"plan bert {GIVEN}")
    assert code == 2 and err == "sparsify: plan: bert: has no tokenizer, and its 300 tokens are no bytes\n"


def test_special_tokens_stand_around_each_piece():
    class Words:
        def __call__(self, text, add_special_tokens=True, **others):
            tokens = [len(word) for word in text.split()]
            return {"input_ids": [101, *tokens, 102] if add_special_tokens else tokens}

    found = of_hugging_face(Words())
    assert (found.first, found.last) == ((101,), (102,)) and list(found.encode("a few words")) == [1, 3, 5]
    assert found.piece(torch.tensor([7, 8]).numpy()).tolist() == [101, 7, 8, 102]
