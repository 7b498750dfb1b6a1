"""`sparsify bench --lossless`: which cases there are, what counts as right, and files that grow case by case."""

from __future__ import annotations

import json

import pytest
import torch

from sparsify.bench.lossless import Lossless, kept, relative_error, write_json
from sparsify.bench.measure import Timing
from sparsify.bench.models import CASES, named
from sparsify.errors import InputError


def result(number: int, error: float, ours: float = 1.0) -> Lossless:
    timings = {"sparsify": Timing(ours, ours, ours, 3.0), "inductor": Timing(2.0, 2.0, 2.0, 3.0)}
    errors = {"sparsify": error, "inductor": 1e-6}
    return Lossless(CASES[number], "float32", timings, errors, {"sparsify": 1, "inductor": 2}, 2, 2)


def test_cases_go_by_name():
    assert named(None) == CASES and named(["bert"])[0].zoo
    with pytest.raises(InputError, match="unknown case 'brt'; did you mean 'bert'"):
        named(["brt"])


def test_a_wrong_case_gets_no_speed():
    assert result(0, 1e-6).ratio == 2.0 and not result(0, 1e-6).complaint
    assert result(0, 1e-2).ratio is None and "WRONG" in result(0, 1e-2).complaint
    assert "0.95x as fast as inductor, and 1x is the least wanted" in result(0, 1e-6, ours=2.1).complaint
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2), None) == float("inf")
    assert relative_error(torch.tensor([1.0, 9.0]), torch.ones(2), torch.tensor([True, False])) == 0.0


def test_a_file_keeps_the_cases_that_were_not_run(tmp_path):
    path = write_json([result(0, 1e-6), result(1, 1e-6)], tmp_path)
    assert write_json([result(1, 1e-2)], tmp_path) == path
    found = {row["case"]: row["ratio"] for row in json.loads(path.read_text())["results"]}
    assert found == {CASES[0].name: 2.0, CASES[1].name: None}


def test_a_file_of_other_results_is_refused(tmp_path):
    other = tmp_path / "other.json"
    for text, message in (
        ("{", "is no JSON"),
        ('{"machine": {}, "results": [{"seconds": {}}]}', "something else than"),
    ):
        other.write_text(text)
        with pytest.raises(InputError, match=message):
            kept(other)
        assert other.read_text() == text
