"""What a run of the tuner won: a line a kernel, default against tuned, and the geometric mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from sparsify.bench.tables import new_table, short
from sparsify.tuner.run import Outcome
from sparsify.tuner.search import describe
from sparsify.tuner.trials import RIGHT


def table(outcomes: Sequence[Outcome]) -> Table:
    """One line a kernel: milliseconds by default and tuned, how many times as fast, the spread, what was tried."""
    found = new_table("default against tuned", "default", "tuned", "faster", "±", "tried", first="kernel", gap=2)
    found.add_column("what differs")
    for one in outcomes:
        last, tried = one.last, str(one.tried)
        if last is None:
            found.add_row(one.job.name, "-", "-", "-", "-", tried, one.why)
            continue
        times = [short(seconds * 1e3) for seconds in (last.default, last.seconds)]
        spread = f"{(last.high - last.low) / 2 / last.ratio:.1%}" if last.values else ""
        found.add_row(one.job.name, *times, f"{1 / last.ratio:.3f}x", spread, tried, describe(last.values))
    return found


def gain(outcomes: Sequence[Outcome]) -> float | None:
    """How many times as fast tuned kernels are, in geometric mean, those that keep the default included."""
    ratios = [one.last.ratio for one in outcomes if one.last is not None]
    return math.exp(-sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def remarks(outcomes: Sequence[Outcome], jobs: int, interrupted: bool) -> Iterator[str]:
    """Sentences below the table."""
    mean, done = gain(outcomes), [one.last for one in outcomes if one.last is not None]
    if mean is not None:
        kept = sum(not one.last.values for one in outcomes if one.last is not None and one.tried)
        stays = f"; of {kept} the default is the best that was found" if kept else ""
        yield f"{len(done)} kernels: {mean:.3f} times as fast as by default, in geometric mean{stays}"
    if untried := sum(one.last is not None and not one.tried for one in outcomes):
        yield f"of {untried} no candidate was tried in the time: give a longer --budget"
    for state, what in (("wrong", "had wrong numbers"), ("failed", "failed"), ("lost", "crashed or hung")):
        some = [trial for one in outcomes for trial in one.trials if trial.state == state]
        if some:
            first = f"{describe(some[0].values)}: {some[0].why}".splitlines()[0]
            yield f"{len(some)} candidates {what}, and can't win (the first: {first})"
    if interrupted or len(outcomes) < jobs:
        why = "interrupted" if interrupted else "the time is over"
        yield f"{why}: {len(outcomes)} of {jobs} kernels; --resume goes on from here"


def to_dict(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Plain data for JSON."""
    rows = []
    for one in outcomes:
        last, raced = one.last, [trial for trial in one.trials if trial.state == RIGHT and not trial.last]
        told = {"name": one.job.name, "kernel": one.job.key[3], "tried": one.tried, "raced": len(raced)}
        if last is not None:
            told |= {"values": dict(last.values), "default_seconds": last.default, "seconds": last.seconds}
            told |= {"ratio": last.ratio, "low": last.low, "high": last.high}
        rows.append(told | ({"why": one.why} if one.why else {}))
    return {"results": rows, "faster": gain(outcomes)}
