"""`sparsify bench --compare`: what counts as slower, what is said beside it, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.compare import Change, compare, remarks, table
from sparsify.bench.runs import compared
from sparsify.errors import InputError

MACHINE = {"machine": "AMD EPYC", "threads": 2, "torch": "2.13.0"}


def seconds(median: float, spread: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread), "first": 1.0}


def row(pattern: str, ours: float, dense: float = 8.0, right: bool = True, spread: float = 0.02) -> dict[str, Any]:
    shape = {"length": 4096, "head_dim": 64, "dtype": "float32", "heads": 8, "kv_heads": 2}
    timings = {"sparsify": seconds(ours, spread), "dense": seconds(dense)} if right else {}
    return {"pattern": pattern, **shape, "right": right, "seconds": timings}


@pytest.fixture
def files(tmp_path):
    """Writes two files of results."""

    def write(before: Any, after: Any, other: dict[str, Any] | None = None) -> tuple[Path, Path]:
        paths = tmp_path / "a.json", tmp_path / "b.json"
        for path, rows, machine in zip(paths, (before, after), (MACHINE, {**MACHINE, **(other or {})}), strict=True):
            path.write_text(json.dumps({"machine": machine, "results": rows}))
        return paths

    return write


def test_slower_is_beyond_the_spread_of_both(files, capsys) -> None:
    before = [row("causal", 1.0), row("window512", 1.0), row("topk", 1.0, spread=0.2), row("mixture", 1.0)]
    after = [row("causal", 1.2), row("window512", 0.5), row("topk", 1.2), row("mixture", 1.03)]
    found = compare(*files(before, after))
    assert [(c.case.split()[0], c.slower, c.faster, c.fails) for c in found.changes] == [
        ("causal", True, False, True),
        ("topk", False, False, False),
        ("mixture", False, False, False),
        ("window512", False, True, False),
    ]
    assert found.fails and table(found).row_count == 2 and found.changes[0].ratio == pytest.approx(1.2)
    assert not compared(*files(before, after))
    out = capsys.readouterr().out
    assert "slower       1000      1200  1.20x  causal N=4096 D=64 float32 H=8 Hkv=2" in out
    assert "faster" in out and "1 slower (1 by more than 5%), 1 faster, 2 within the spread" in out


def test_every_run_that_is_no_peers_is_ours(files) -> None:
    """Mixtures name their runs together and by head, selections whole, select and attend."""
    before = {"together": 1.0, "head 0": 1.0, "select": 1.0, "dense": 1.0, "memory": 1.0}
    sides = [
        [{"name": "mixture", "seconds": {run: seconds(value * by) for run, value in before.items()}}] for by in (1, 3)
    ]
    found = compare(*files(*sides))
    assert found.fails and set(found.peers) == {"dense", "memory"}
    assert {change.case for change in found.changes} == {"mixture", "mixture, head 0", "mixture, select"}


def test_slower_by_little_is_told_and_tolerated(files) -> None:
    found = compare(*files([row("causal", 1.0, spread=0.01)], [row("causal", 1.04, spread=0.01)]))
    assert found.changes[0].slower and not found.fails
    assert list(remarks(found))[-1] == "1 slower (0 by more than 5%), 0 faster, 0 within the spread"
    assert Change("c", (0.9, 1.0, 1.1), (1.1, 1.2, 1.3)).slower is False


def test_what_got_wrong_fails_and_what_differs_is_said(files, capsys) -> None:
    before = [row("causal", 1.0), row("window512", 1.0), row("full", 1.0, right=False)]
    after = [row("causal", 1.0, right=False), row("window512", 1.0, dense=16.0), row("mixture", 1.0)]
    paths = files(before, after, {"torch": "2.14.0", "isa": "avx512"})
    assert not compared(*paths)
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "torch differs: 2.13.0 before, 2.14.0 after",
        "isa differs: None before, avx512 after",
        "WRONG now, and right before: causal N=4096 D=64 float32 H=8 Hkv=2",
        "1 cases were measured before only: full N=4096",
        "1 cases were measured after only: mixture N=4096",
        "dense took 2.00x the time (geometric mean)",
    ):
        assert part in out
    assert compared(*files(before[1:2], before[1:2]))


def test_models_are_compared_run_by_run(files) -> None:
    def phase(spec: float) -> dict[str, Any]:
        timings = {"inductor": seconds(2.0), "sparsify": seconds(1.0), "spec": seconds(spec)}
        return {
            "model": "llama",
            "phase": "decode",
            "length": 64,
            "dtype": "float32",
            "right": True,
            "seconds": timings,
        }

    found = compare(*files([phase(0.5)], [phase(1.0)]))
    assert [(c.case, c.fails) for c in found.changes] == [
        ("llama decode N=64 float32, spec", True),
        ("llama decode N=64 float32", False),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "{path} can't be read: No such file or directory"),
        ("{", "{path} is no JSON: "),
        ("[]", "{path} holds no results of `sparsify bench --json`: no machine or results"),
        ('{"results": []}', "{path} holds no results of `sparsify bench --json`: no machine or results"),
        (
            '{"machine": {}, "results": [{"seconds": {"sparsify": {"median": 1}}}]}',
            "{path}: results[0] has no seconds with median, low and high",
        ),
        ('{"machine": {}, "results": [3]}', "{path}: results[0] has no seconds with median, low and high"),
        ('{"machine": {}, "results": [{"seconds": 3}]}', "{path}: results[0] has no seconds with median, low and high"),
        ('{"machine": {}, "results": []}', "{other} and {path} have no case in common; their first are"),
    ],
)
def test_files_that_hold_no_results(files, text: str | None, message: str) -> None:
    other, path = files([row("causal", 1.0)], [])
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError) as raised:
        compare(other, path)
    assert str(raised.value).startswith(f"bench: --compare: {message.format(path=path, other=other)}")
