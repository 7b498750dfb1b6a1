"""Candidates for a GPU that isn't here: built ahead of time, and pruned by what they take of a multiprocessor."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.table import Table

from sparsify.bench.tables import new_table, short
from sparsify.codegen.target import Launch
from sparsify.codegen.triton import tuned as home
from sparsify.codegen.triton.resources import CHIPS, Resources, resources_of
from sparsify.errors import BuildError, InputError, nearest
from sparsify.progress import Bar
from sparsify.tuner.children import Child, Failed, Lost
from sparsify.tuner.jobs import Job, jobs_of, read
from sparsify.tuner.order import Order, machine_for
from sparsify.tuner.search import describe
from sparsify.tuner.targets import Values
from sparsify.tuner.trials import PRUNED, Journal, Trial

BUILD_SECONDS = 120.0
SHOWN = 5  # of each kernel's candidates that fit


@dataclass(frozen=True)
class Built:
    """A candidate, built. seconds: as predicted, None where the simulator can't say. why: it is pruned; "" if it fits.

    programs: how many run side by side on a multiprocessor.
    """

    values: Values
    found: Resources | None
    programs: int
    seconds: float | None
    why: str = ""


class Builder:
    """Builds candidates in a child process."""

    def __init__(self, arch: int | str) -> None:
        os.environ.pop("TRITON_INTERPRET", None)
        self.arch = arch

    def open(self, path: Path) -> None:
        """Takes up a job: its first launch, on tensors without memory."""
        self.launch = bare(read(path)[0])

    def build(self, values: Values) -> Resources:
        """What a candidate takes. Raises BuildError."""
        from sparsify.runtime import tuned

        with tuned.forced(values):
            try:
                return resources_of(self.launch, self.arch)
            except Exception as error:
                raise BuildError(f"it doesn't build: {str(error).strip().splitlines()[-1]}") from error


def bare(launch: Launch) -> Launch:
    """The launch on tensors without memory."""
    q, k, v, *loads = (tensor.to("meta") for tensor in (launch.q, launch.k, launch.v, *launch.loads))
    return replace(launch, q=q, k=k, v=v, loads=tuple(loads))


def chip(text: str) -> int | str:
    """`90` or `sm_90` as 90, `gfx942` as it is. Raises InputError."""
    found: int | str = int(text.removeprefix("sm_")) if text.removeprefix("sm_").isdigit() else text
    if found not in CHIPS:
        raise InputError(f"tune: --arch: found '{text}'; {nearest(text, map(str, CHIPS))}")
    return found


def jobs_for(jobs: Sequence[Job], arch: int | str) -> list[Job]:
    """The same kernels of the Triton target, under the chip's keys."""
    named = {id(launch): job.name for job in jobs for launch in job.launches}
    launches = [launch for job in jobs for launch in job.launches]
    return jobs_of(launches, lambda launch: named[id(launch)], lambda launch: home.key(launch, arch))


def prune(
    jobs: Sequence[Job], arch: int | str, budget: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[Built]]:
    """The candidates of each job by its name, those that fit first and by what they are predicted to take.

    Builds while there is time, the most promising first; the default always is. What is pruned goes into the journal: a
    run on such a GPU leaves it out.
    """
    end, found, journal = clock() + budget, {}, Journal.here()
    children = [Child(partial(Builder, arch)) for _ in range(os.cpu_count() or 1)]
    try:
        with tempfile.TemporaryDirectory(prefix="sparsify-tune-") as folder, Bar([1.0] * len(jobs)) as steps:
            for number, job in enumerate(jobs):
                steps.tell(f"{job.name}: building for {arch}")
                share = (end - clock()) / (len(jobs) - number)
                built = _built(job, job.write(Path(folder), number), arch, children, clock() + share, clock)
                journal.forget([job.key])
                for one in built:
                    if one.why:
                        journal.add(Trial(job.key, one.values, one.values, PRUNED, one.why))
                found[job.name] = sorted(built, key=_rank)
                steps.advance()
    finally:
        for child in children:
            child.end()
    return found


def _rank(one: Built) -> tuple[bool, float, int]:
    return bool(one.why), round(one.seconds or 0.0, 6), -one.programs


def _built(
    job: Job, path: Path, arch: int | str, children: Sequence[Child], deadline: float, clock: Callable[[], float]
) -> list[Built]:
    launch = job.launches[0]
    usual, order = home.default(launch, arch), Order(launch, machine_for(launch, arch))
    for child in children:
        child.open(path)
    found: list[Built] = []
    left = [{}, *order(list(_candidates(launch, arch, usual)), {})]
    with ThreadPoolExecutor(len(children)) as pool:
        while left and (not found or clock() < deadline):
            some, left = left[: len(children)], left[len(children) :]
            for values, answer in zip(some, pool.map(_ask, children, some), strict=False):
                found.append(_judged(values, answer, usual, arch, order.seconds(values), found))
    return found


def _candidates(launch: Launch, arch: int | str, usual: Values) -> Iterator[dict[str, int]]:
    """Tiles with every number of stages; what differs from the default."""
    tiles, *others = home.groups(launch, arch)
    stages = next(group for group in others if "num_stages" in group[0])
    for tile, stage in itertools.product(tiles, stages):
        values = {name: value for name, value in {**tile, **stage}.items() if value != usual[name]}
        if values:
            yield values


def _ask(child: Child, values: Values) -> Resources | str:
    try:
        return child.ask("build", values, seconds=BUILD_SECONDS)
    except (Failed, Lost) as error:
        return str(error)


def _judged(
    values: Values, answer: Resources | str, usual: Values, arch: int | str, seconds: float | None, before: list[Built]
) -> Built:
    """Why a candidate is pruned: it doesn't build, doesn't fit, or spills more than the default does."""
    if isinstance(answer, str):
        return Built(values, None, 0, seconds, answer)
    programs, limit = answer.programs({**usual, **values}["num_warps"], arch), CHIPS[arch][1]
    allowed = before[0].found.spills if before and before[0].found else answer.spills
    if answer.shared > limit:
        why = f"{answer.shared} bytes of shared memory are more than the chip's {limit}"
    elif programs == 0:
        why = f"{answer.registers} registers a thread leave room for no program"
    elif answer.spills > allowed:
        why = f"it spills {answer.spills} bytes, the default {allowed}"
    else:
        why = ""
    return Built(values, answer, programs, seconds, why)


def table(found: dict[str, list[Built]], arch: int | str) -> Table:
    """The default and the first candidates that fit, of each kernel."""
    shown = new_table(f"built for {arch}, not timed", "regs", "spills", "KiB", "fit", "ms", first="kernel", gap=2)
    shown.caption = "regs: of a thread; KiB: shared memory; fit: programs side by side; ms: as predicted"
    for name, built in found.items():
        fit = [one for one in built if not one.why]
        shown.add_row(f"{name}: {len(fit)} of {len(built)} fit", style="bold")
        for one in [*(one for one in fit if not one.values), *[one for one in fit if one.values][:SHOWN]]:
            numbers = [] if one.found is None else [one.found.registers, one.found.spills, one.found.shared >> 10]
            predicted = "-" if one.seconds is None else short(one.seconds * 1e3)
            shown.add_row(f"  {describe(one.values)}", *map(str, [*numbers, one.programs]), predicted)
        shown.add_section()
    return shown
