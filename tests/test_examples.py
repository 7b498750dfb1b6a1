"""The examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_add_a_pattern(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")  # the reference: nothing is compiled
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "add_a_pattern.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("pyramid(16) keeps ")
    assert "pyramid(16) | sinks(4)" in (tmp_path / "out" / "pyramid.html").read_text()


@pytest.mark.slow
def test_learned_gates(monkeypatch, capsys):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    runpy.run_path(str(EXAMPLES / "learned_gates.py"), run_name="__main__")
    assert "three steps, with the history of 3 in a buffer" in capsys.readouterr().out
