"""The demo's reader: small, trained, GQA, long context; it reads, and its shipped spec fits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import sparsify
from examples import demo
from examples.reader import corpus, evaluate


def test_the_model_is_small_and_long():
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert config["max_position_embeddings"] >= 4096
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert sum(path.stat().st_size for path in demo.MODEL.iterdir()) <= 12 * 2**20


def test_the_held_out_modules_are_here_and_held_out():
    files = corpus.held_out_files()
    assert len(files) >= 10 and all(path.is_file() for path in files)
    trained_on = {path.name for part in corpus.training_files() for path in part}
    assert not trained_on & {path.name for path in files}


def test_it_reads_and_the_mixture_keeps_what_matters():
    """At a short length, so that the test is quick: the compiled mixture agrees with masks computed by PyTorch."""
    tokens = next(evaluate.held_out_windows(700, 1))
    with torch.inference_mode():
        model = demo.load()
        dense = evaluate.bits(demo.forward(model)(tokens), tokens).mean().item()
        report = sparsify.explain(model, input_ids=tokens, use_cache=False, spec=demo.SPEC)
        layers = demo.layers_of(report)
        compiled = torch.compile(
            demo.load(), backend="sparsify", options={"spec": str(demo.SPEC), "strict": True, "inner": "eager"}
        )
        sparse = demo.forward(compiled)(tokens)
        plain = demo.forward(demo.attend.use(demo.load(), "reader_masked", demo.attend.masked(layers, 700)))(tokens)
    assert dense < 2.2  # an untrained reader takes 8 bits for a byte
    assert len(report.rewritten) == len(report.sites) == 6 and not report.refused
    assert 0.01 < demo.kept_share(layers, 4096) < 0.6
    torch.testing.assert_close(sparse, plain, atol=2e-3, rtol=1e-3)


def test_the_uniform_rule_keeps_as_many_pairs():
    for share in (0.05, 0.3, 0.9):
        rule = demo.uniform_window(share, 1000)
        assert demo.kept_share([(rule,)], 1000) == pytest.approx(share, abs=0.003)


def test_recall_documents_repeat_and_ask_far_back():
    (tokens, where), (again, _) = (next(evaluate.recall_documents(2048, 1)) for _ in range(2))
    assert torch.equal(tokens, again) and tokens.shape == (1, 2048)
    assert where.sum() > 40 and where[: 2048 * 3 // 4 - 16].sum() == 0
    assert Path(demo.SPEC).is_file()
