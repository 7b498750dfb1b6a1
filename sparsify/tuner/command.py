"""What `sparsify tune` does: each function prints, and says whether all went well."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from rich.console import Console

from sparsify import env
from sparsify.bench.report import machine, write
from sparsify.bench.runs import How
from sparsify.codegen.target import DTYPES
from sparsify.errors import InputError, nearest
from sparsify.files import check_writable
from sparsify.progress import Bar
from sparsify.runtime import tuned, tunings
from sparsify.tuner.report import remarks, table, to_dict
from sparsify.tuner.run import Run
from sparsify.tuner.search import Limits
from sparsify.tuner.targets import tunable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparsify.runtime.tunings import Tuned
    from sparsify.tuner.jobs import Job

LENGTH, MODEL_LENGTH = 4096, 2048  # tokens that kernels are timed on by default
SKEW = timedelta(days=1)  # by which clocks may differ
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_of(text: str) -> float:
    """`90s`, `5m`, `1h30m`, or a number of seconds. Raises InputError."""
    if text.isdecimal() and int(text):
        return float(text)
    found = DURATION.fullmatch(text)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise InputError(f"tune: --budget: found '{text}'; expected a time above 0, such as 90s, 5m or 1h30m")
    return float(total)


@contextmanager
def targeted(target: str, device: str, arch: str | None) -> Iterator[str]:
    """Where kernels run, cpu or cuda, and that they are the target's; those for a chip of no GPU that is here. Raises
    InputError for a GPU that isn't there, and for a chip that the target doesn't build for."""
    with _for_tune():
        place = How(repeats=0, seconds=0.0, device=device, json=None).place
    if target == "triton" and place == "cpu" and arch is None:
        raise InputError("tune: --target triton: torch finds no GPU here; --arch 90 builds for one ahead of time")
    if arch is not None and target != "triton":
        raise InputError(f"tune: --arch goes with --target triton only, found {target}")
    if arch is not None:
        from sparsify.tuner.ahead import chip

        chip(arch)
        place = "cpu"
    with mock.patch.dict(os.environ, SPARSIFY_TARGET=target):
        yield place


def of_grid(
    pattern: list[str] | None, head_dim: list[int] | None, heads: int | None, kv_heads: int | None,
    length: list[int] | None, dtype: list[str] | None, place: str,
) -> list[Job]:  # fmt: skip
    """The kernels of the grid, or of the part of it that the options ask for."""
    from sparsify.bench.cases import whole_grid
    from sparsify.tuner.sources import of_cases

    _check_dtypes(dtype)
    with _for_tune():
        cases = whole_grid(pattern, length or [LENGTH], head_dim, dtype, heads, kv_heads)
    with Bar([1.0] * len(cases)) as steps:
        return of_cases(cases, place, steps.tell)


def of_model(
    name: str, spec: Path | None, fields: list[str] | None,
    length: list[int] | None, dtype: list[str] | None, place: str, run: bool = True,
) -> list[Job]:  # fmt: skip
    """The kernels of a model at every length and dtype."""
    from sparsify.models import Wanted, overrides
    from sparsify.options import read_spec
    from sparsify.tuner import sources

    for option, given in (("--length", length), ("--dtype", dtype), ("--set", fields)):
        if given and ":" in name:
            raise InputError(f"tune: {option} does not go with a callable, which makes its model and inputs itself")
    _check_dtypes(dtype)
    read_spec(None if spec is None else str(spec))
    made = [
        Wanted(length=n, dtype=kind, overrides=overrides(fields or []), command="tune", drawn=True)
        for kind in dtype or ("float32",)
        for n in length or (MODEL_LENGTH,)
    ]
    with Bar([1.0]) as steps:
        steps.tell(f"{name}: its kernels")
        return sources.of_model(name, spec, made, place, run)


def tune(jobs: Sequence[Job], budget: float, resume: bool, device: str, file: Path | None) -> bool:
    """Tunes, and prints what was won; whether any kernel could be timed."""
    if env.tuned() is None:
        raise InputError("environment variable SPARSIFY_TUNED: found '0', so what is tuned can't be kept")
    if file is not None:
        check_writable(file, "tune: --json")
    run = Run(jobs, budget, resume, Limits())
    outcomes = run.run()
    console = Console(highlight=False)
    console.print(table(outcomes))
    for text in remarks(outcomes, len(jobs), run.interrupted):
        console.print(text, markup=False)
    if env.tuned().exists():  # it is made for the first candidate that was raced
        console.print(f"kept in {env.tuned()}", markup=False, soft_wrap=True)
    if file is not None:
        write({"machine": machine(device)} | to_dict(outcomes), file)
        console.print(f"written to {file}", markup=False, soft_wrap=True)
    return any(one.last is not None for one in outcomes)


def calibrate() -> None:
    """Measures this machine for the simulator, its kernels as they are by default, and keeps it. Raises InputError."""
    from sparsify import cost
    from sparsify.progress import progress

    with progress() as bar, tuned.forced({}):
        task = bar.add_task("", total=None)
        found = cost.calibrate(
            lambda what, done, every: bar.update(task, description=what, completed=done, total=every)
        )
    _say(f"{found.name}: kept in {cost.save(found)}")


def ahead(jobs: Sequence[Job], arch: str, budget: float) -> bool:
    """Builds for a chip that isn't here, and prints what fits it; whether every kernel builds by default."""
    from sparsify.tuner.ahead import chip, jobs_for, prune, table

    found = prune(jobs_for(jobs, chip(arch)), chip(arch), budget)
    console = Console(highlight=False)
    console.print(table(found, chip(arch)))
    pruned = [one for built in found.values() for one in built if one.why]
    _say(
        f"{len(pruned)} candidates are pruned, and not tried when these kernels are tuned on such a GPU with this cache"
    )
    wrong = [f"{name}: {one.why}" for name, built in found.items() for one in built if one.why and not one.values]
    for text in wrong:
        _say(f"the default of {text}")
    return not wrong


def export(path: Path) -> None:
    """Writes what the store holds to a file. Raises InputError for a store that is empty or can't be read."""
    entries, why = tuned.held()
    if not entries:
        raise InputError(f"tune: --export: {why or f'nothing is tuned yet (the store is {env.tuned()})'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tunings.write(path, entries.values())
    except OSError as error:
        raise InputError(f"tune: --export: {path} can't be written: {error.strerror or error}") from None
    _say(f"{len(entries)} kernels written to {path}")


def take(path: Path) -> None:
    """Adds a file that `export` wrote to the store. Raises InputError for a wrong one, which then leaves no trace."""
    try:
        entries = tunings.read(path)
    except InputError as error:
        raise InputError(f"tune: --import: {error}") from None
    for one in entries.values():
        _check_entry(one, path)
    here = own(entries.values())
    store = tuned.keep(entries.values())
    _say(f"{len(entries)} kernels of {path} are in {store}; {here} of them are for this machine and software")


def _check_entry(one: Tuned, path: Path) -> None:
    """Raises InputError, which names the kernel, for values that it can't have and for a time that is still to come."""
    try:
        tunable(one.target).check(one.values)
    except InputError as error:
        raise InputError(f"tune: --import: {path}: {one.kernel}: {str(error).removeprefix('tune: ')}") from None
    if datetime.fromisoformat(one.measured) > datetime.now(UTC) + SKEW:
        what = f"measured: found '{one.measured}', which is still to come; nothing that is tuned here would replace it"
        raise InputError(f"tune: --import: {path}: {one.kernel}: {what}")


def own(entries: Iterable[Tuned]) -> int:
    """How many hold for this machine and software."""
    return sum(tunable(one.target).holds(one) for one in entries)


@contextmanager
def _for_tune() -> Iterator[None]:
    """What the bench says of options is said of this command's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"tune: {str(error).removeprefix('bench: ')}") from None


def _check_dtypes(dtype: list[str] | None) -> None:
    for name in dtype or ():
        if name not in DTYPES:
            raise InputError(f"tune: --dtype: found '{name}'; {nearest(name, DTYPES)}")


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)
