"""`sparsify bench --compare`: what got slower and what faster between two files of results, beyond their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsify.bench.report import read
from sparsify.bench.tables import new_table, short
from sparsify.errors import InputError

TOLERATED = 1.05
# What is measured beside sparsify, by the names that the benches give it; every other run is sparsify's.
THEIRS = ("dense", "full", "cudnn", "mask", "flex", "natten", "inductor", "memory", "read")
NAMELESS = ("sparsify", "whole", "together")  # the runs of ours that are the case itself
WHAT = ("name", "case", "model", "spec", "pattern", "phase", "length", "queries", "keys", "head_dim", "dtype", "heads",
        "kv_heads", "layers")  # fmt: skip
LETTERS = {"length": "N=", "queries": "Nq=", "keys": "N=", "head_dim": "D=", "heads": "H=", "kv_heads": "Hkv=",
           "layers": "layers="}  # fmt: skip

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One run of one case in both files: its seconds, each (low, median, high) by quartiles."""

    case: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        """The later median over the earlier one: above 1 is slower."""
        return self.after[1] / self.before[1]

    @property
    def slower(self) -> bool:
        """Whether the quartiles don't meet, and the later ones are the greater."""
        return self.after[0] > self.before[2]

    @property
    def faster(self) -> bool:
        """Whether the quartiles don't meet, and the later ones are the smaller."""
        return self.after[2] < self.before[0]

    @property
    def fails(self) -> bool:
        """Whether it is slower by more than is tolerated."""
        return self.slower and self.ratio > TOLERATED


@dataclass(frozen=True)
class Comparison:
    """What two files say of the cases that both have.

    only: the cases that one file has alone, before and after. wrong: those that were right before and are no more.
    peers: by peer, the geometric mean of how its time changed, which says whether the machine did. machines: what
    differs of machines and versions, (name, before, after).
    """

    changes: tuple[Change, ...]
    wrong: tuple[str, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    peers: Mapping[str, float]
    machines: tuple[tuple[str, Any, Any], ...]

    @property
    def fails(self) -> bool:
        """Whether something got wrong, or slower by more than is tolerated."""
        return bool(self.wrong) or any(change.fails for change in self.changes)


def compare(before: Path, after: Path) -> Comparison:
    """Reads two files that `sparsify bench --json` wrote. Raises InputError, also where they have no case in common."""
    machines, rows = zip(*(_read(path) for path in (before, after)), strict=True)
    both = [name for name in rows[0] if name in rows[1]]
    if not both:
        cases = " and ".join(f"'{next(iter(found), 'none')}'" for found in rows)
        raise InputError(f"bench: --compare: {before} and {after} have no case in common; their first are {cases}")
    changes, peers = [], {}
    for name in both:
        seconds = [rows[side][name]["seconds"] for side in (0, 1)]
        for run in seconds[0].keys() & seconds[1].keys() if _right(rows[0][name]) and _right(rows[1][name]) else ():
            sides = [_quartiles(found[run]) for found in seconds]
            if run in THEIRS:
                peers.setdefault(run, []).append(sides[1][1] / sides[0][1])
            else:
                changes.append(Change(name if run in NAMELESS else f"{name}, {run}", *sides))
    keys = dict.fromkeys([*machines[0], *machines[1]])
    return Comparison(
        tuple(sorted(changes, key=lambda change: -change.ratio)),
        tuple(name for name in both if _right(rows[0][name]) and not _right(rows[1][name])),
        tuple(tuple(name for name in rows[side] if name not in rows[1 - side]) for side in (0, 1)),
        {run: statistics.geometric_mean(found) for run, found in sorted(peers.items())},
        tuple((k, *(m.get(k) for m in machines)) for k in keys if machines[0].get(k) != machines[1].get(k)),
    )


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Row]]:
    """The machine, and the rows by the name of their case."""
    machine, rows = read(path, "--compare")
    return machine, {_name(row): row for row in rows}


def _quartiles(timing: Row) -> tuple[float, float, float]:
    return timing["low"], timing["median"], timing["high"]


def _right(row: Row) -> bool:
    return bool(row.get("right", True))


def _name(row: Row) -> str:
    return " ".join(f"{LETTERS.get(part, '')}{row[part]}" for part in WHAT if row.get(part) not in (None, ""))


def table(found: Comparison) -> Table:
    """One line for each run that changed beyond its spread, the slowest first."""
    shown = new_table("", "ms before", "ms after", "time", "case", first="change")
    shown.columns[-1].justify, shown.columns[-1].no_wrap = "left", False
    for change in found.changes:
        if change.slower or change.faster:
            style = "red" if change.fails else "green" if change.faster else ""
            times = (short(side[1] * 1e3) for side in (change.before, change.after))
            word = "slower" if change.slower else "faster"
            shown.add_row(word, *times, f"{change.ratio:.2f}x", change.case, style=style)
    return shown


def remarks(found: Comparison) -> Iterator[str]:
    """What is said beside the table."""
    for name, before, after in found.machines:
        yield f"{name} differs: {before} before, {after} after"
    for name in found.wrong:
        yield f"WRONG now, and right before: {name}"
    for side, names in zip(("before", "after"), found.only, strict=True):
        if names:
            yield f"{len(names)} cases were measured {side} only: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
    for run, ratio in found.peers.items():
        yield f"{run} took {ratio:.2f}x the time (geometric mean)"
    slower, faster = (sum(getattr(change, word) for change in found.changes) for word in ("slower", "faster"))
    worst = sum(change.fails for change in found.changes)
    same = len(found.changes) - slower - faster
    yield f"{slower} slower ({worst} by more than {TOLERATED - 1:.0%}), {faster} faster, {same} within the spread"
