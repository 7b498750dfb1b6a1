"""What `sparsify bench` runs: each function measures, prints and writes, and says whether all of it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparsify.codegen.target import DTYPES
from sparsify.errors import InputError, nearest
from sparsify.progress import Bar

if TYPE_CHECKING:
    from sparsify.bench.cases import Case
    from sparsify.bench.measure import Result

DEVICES = ("cpu", "cuda", "auto")


@dataclass(frozen=True)
class How:
    """How long each case is measured, where, and the file for results."""

    repeats: int
    seconds: float
    device: str
    json: Path | None

    @property
    def place(self) -> str:
        """cpu or cuda. Raises InputError for another name and for a GPU that isn't there."""
        import torch

        if self.device not in DEVICES:
            raise InputError(f"bench: --device: found '{self.device}'; {nearest(self.device, DEVICES)}")
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise InputError("bench: --device: torch finds no GPU here; leave it out, or give cpu")
        return ("cuda" if there else "cpu") if self.device == "auto" else self.device


def cases(
    whole: bool,
    pattern: list[str] | None,
    length: list[int] | None,
    head_dim: list[int] | None,
    dtype: list[str] | None,
    heads: int | None,
    kv_heads: int | None,
) -> tuple[Case, ...]:
    """The grid, or the cases that the options ask for; without any, windows. Raises InputError."""
    from dataclasses import replace

    from sparsify.bench.cases import DTYPES as USUAL
    from sparsify.bench.cases import HEADS, WINDOWS, grid, whole_grid

    _check_dtypes(dtype)
    if whole:
        return whole_grid(pattern, length, head_dim, dtype, heads, kv_heads)
    heads = heads or HEADS
    shape = (head_dim or [64], dtype or USUAL, heads, kv_heads or heads)
    asked = grid(pattern or ["window512"], length or [4096], *shape)
    if any(option is not None for option in (pattern, length, head_dim, dtype)):
        return asked
    return tuple(replace(case, heads=heads, kv_heads=kv_heads or heads) for case in WINDOWS)


def attention(cases: Sequence[Case], how: How, plot: Path | None) -> bool:
    """Cases on drawn tensors, with the file of results growing by each."""
    from sparsify.bench.cold import cold_caches
    from sparsify.bench.measure import measure
    from sparsify.bench.plot import paths
    from sparsify.bench.report import machine, stem, write_json
    from sparsify.bench.summary import summaries

    place = how.place
    pictures = [] if plot is None else paths(plot, stem(machine(place)["machine"]) + "-speed-up")
    results: list[Result] = []
    with Bar([_weight(case) for case in cases]) as steps, cold_caches(place):
        for case in cases:
            results.append(measure(case, place, how.repeats, how.seconds, steps.tell))
            steps.advance()
            if how.json is not None:
                write_json(results, summaries(results), place, how.json)
    _tell(results, place, how.json)
    _draw(results, place, pictures)
    return all(result.right for result in results)


def _weight(case: Case) -> float:
    """About how many seconds a case takes: to compile, and rounds that are longer than is asked for at long lengths."""
    return 15 + 60 * (case.length / 16384) ** 2 * case.head_dim / 128 * case.heads / 8


def _tell(results: Sequence[Result], place: str, json: Path | None) -> None:
    from sparsify.bench import report
    from sparsify.bench.summary import summaries

    found, console = summaries(results), Console(highlight=False)
    console.print(report.speed_table(results), "", report.cost_table(results), "", sep="\n")
    if len(results) > 1 and found:
        console.print(report.summary_table(found), "", sep="\n")
    for text in report.remarks(results, found):
        console.print(text, markup=False)
    about = report.machine(place)
    console.print(f"{about['machine']} ({about['isa']}), {about['threads']} threads, torch {about['torch']}")
    if json is not None:
        _written(report.write_json(results, found, place, json))


def _draw(results: Sequence[Result], place: str, pictures: Sequence[Path]) -> None:
    if not pictures:
        return
    from sparsify.bench.plot import Plot, draw
    from sparsify.bench.report import machine

    about = machine(place)
    plot = Plot.of(results, f"{about['machine']}, {about['threads']} threads, torch {about['torch']}")
    for path in pictures:
        draw(plot, path)
        _written(path)


def _save(results: Sequence[Any], kind: str, place: str, json: Path | None, **more: Any) -> None:
    """Writes the file of results that is asked for, if one is, and says where."""
    if json is not None:
        from sparsify.bench.report import write_results

        _written(write_results(results, kind, place, json, **more))


def _written(path: Path) -> None:
    Console(highlight=False, soft_wrap=True).print(f"written to {path}", markup=False)


def model(
    name: str, spec: Path | None, fields: list[str] | None, length: list[int] | None, dtype: list[str] | None, how: How
) -> bool:
    """A whole model, at every length and dtype."""
    _check_dtypes(dtype)
    for option, given in (("--length", length), ("--dtype", dtype), ("--set", fields)):
        if given and ":" in name:
            raise InputError(f"bench: {option} does not go with a callable, which makes its model and inputs itself")
    from sparsify.bench import end_to_end
    from sparsify.bench.cold import cold_caches
    from sparsify.models import Wanted, overrides
    from sparsify.options import read_spec

    read_spec(None if spec is None else str(spec))
    made = [
        Wanted(length=n, dtype=kind, overrides=overrides(fields or []), command="bench", drawn=True)
        for kind in dtype or ("float32",)
        for n in length or (2048,)
    ]
    for wanted in made if ":" not in name else ():
        end_to_end.check_memory(name, wanted)
    place, phases = how.place, []
    with Bar([1.0 + wanted.length / 4096 for wanted in made]) as steps, cold_caches(place):
        for wanted in made:
            phases += end_to_end.measure(name, spec, wanted, place, how.repeats, how.seconds, steps.tell)
            steps.advance()
    console = Console(highlight=False)
    console.print(end_to_end.table(phases))
    for text in end_to_end.remarks(phases):
        console.print(text, markup=False)
    _save(phases, "models", place, how.json)
    return all(phase.right for phase in phases)


def lossless(case: list[str] | None, dtype: list[str] | None, how: How) -> bool:
    """Small models without a spec."""
    from sparsify.bench.models import named

    _check_dtypes(dtype)
    jobs = [(one, kind) for one in named(case) for kind in dtype or ("float32",)]
    from sparsify.bench import lossless

    def measured(job: tuple[Any, str], tell: Callable[[str], None]) -> Any:
        found = lossless.measure(*job, how.repeats, how.seconds, tell)
        if how.json is not None:
            lossless.write_json([found], how.json)
        return found

    if how.json is not None:
        lossless.kept(lossless.file_of(how.json))  # what it refuses is refused before anything is measured
    results = _each(jobs, measured)
    console = Console(highlight=False)
    console.print(lossless.table(results))
    for text in filter(None, (result.complaint for result in results)):
        console.print(text, style="red", markup=False)
    if how.json is not None:
        _written(lossless.file_of(how.json))
    return all(result.right for result in results)


def neighborhood(case: list[str] | None, how: How) -> bool:
    """Neighborhoods on drawn tensors, and on those of video and image models."""
    from sparsify.bench.cold import cold_caches
    from sparsify.bench.measure import measure
    from sparsify.bench.sites import named

    def measured(prepare: Callable[[str], Any], tell: Callable[[str], None]) -> Any:
        inputs = prepare("cpu")
        return measure(inputs.case, "cpu", how.repeats, how.seconds, tell, inputs)

    results = _each(named(case), measured, cold_caches())
    _tell(results, "cpu", how.json)
    return all(result.right for result in results)


def selection(case: list[str] | None, dtype: list[str] | None, how: How) -> bool:
    """Selections, and what choosing costs of them."""
    from sparsify.bench import selection

    _check_dtypes(dtype)
    jobs = [(one, kind) for one in selection.named(case) for kind in dtype or ("float32",)]
    results = _each(jobs, lambda job, tell: selection.measure(*job, how.repeats, how.seconds, tell))
    Console().print(selection.table(results))
    _save(results, "selection", "cpu", how.json)
    return all(result.right for result in results)


def decode(case: list[str] | None, dtype: list[str] | None, how: How) -> bool:
    """One query over a long cache."""
    from sparsify.bench import decode

    _check_dtypes(dtype)
    place = how.place
    kinds = dtype or ("float32", "bfloat16") if place == "cpu" else dtype or ("bfloat16",)
    jobs = [(one, kind) for one in decode.named(case) for kind in kinds]
    results = _each(jobs, lambda job, tell: decode.measure(*job, place, how.repeats, how.seconds, tell))
    Console().print(decode.table(results))
    _save(results, "decode", place, how.json)
    return all(result.right for result in results)


def mixture(
    length: list[int] | None, head_dim: list[int] | None, dtype: list[str] | None, kv_heads: int | None, how: How
) -> bool:
    """Unlike heads in one call, and each alone."""
    from sparsify.bench import mixture
    from sparsify.bench.cases import grid
    from sparsify.bench.peers import Inputs

    _check_dtypes(dtype)
    shape = (head_dim or [64, 128], dtype or ["float32"], mixture.HEADS, kv_heads or mixture.HEADS)
    jobs = grid(["mixture"], length or [4096], *shape)

    def measured(case: Case, tell: Callable[[str], None]) -> Any:
        return mixture.measure(Inputs.draw(case, "cpu"), how.repeats, how.seconds, tell)

    results = _each(jobs, measured)
    Console().print(mixture.table(results))
    _save(results, "mixture", "cpu", how.json)
    return all(result.right for result in results)


def overhead(how: How) -> bool:
    """What sparsify takes beside computing. Fails where a longer sequence builds anything again."""
    from sparsify.bench import overhead

    with Bar([1.0]) as steps:
        found = overhead.measure(steps.tell)
        steps.advance()
    for table in overhead.tables(found):
        Console().print(table, "", sep="\n")
    _save([found], "overhead", "cpu", how.json)
    return all(grown.later == 0 for grown in found.growth)


def simulate(count: int, seed: int | None, dtype: list[str] | None, how: How) -> bool:
    """Predictions beside measurements, of drawn patterns and shapes."""
    import secrets

    from sparsify import cost
    from sparsify.bench import draws, simulate
    from sparsify.bench.cases import DTYPES as USUAL
    from sparsify.runtime import tuned

    _check_dtypes(dtype)
    seed, kinds, given = secrets.randbelow(10**6) if seed is None else seed, tuple(dtype or USUAL), cost.machine()
    jobs = [*draws.draw(seed, count, kinds), *draws.draw_crossings(seed, max(1, count // 8), kinds)]
    with tuned.forced({}):
        simulate.build(jobs)
        found = _each(jobs, lambda job, tell: simulate.measured(job, given, tell))
    results, crossed = (
        [one for one in found if isinstance(one, kind)] for kind in (simulate.Predicted, simulate.Crossed)
    )
    accuracy, console = simulate.Accuracy.of(results, crossed), Console(highlight=False)
    console.print(simulate.table(results), "", simulate.crossover_table(crossed), "", sep="\n")
    console.print(f"{given}; seed {seed}", str(accuracy), sep="\n", markup=False, soft_wrap=True)
    about = {"simulated": given.model_dump(mode="json"), "seed": seed, "accuracy": asdict(accuracy)}
    _save(results, "simulate", "cpu", how.json, **about, crossovers=[one.as_dict() for one in crossed])
    return accuracy.holds


def _each(jobs: Sequence[Any], measured: Callable[..., Any], around: Any = None) -> list[Any]:
    """What is measured of each job, with progress."""
    results = []
    with Bar([1.0] * len(jobs)) as steps, around or nullcontext():
        for job in jobs:
            results.append(measured(job, steps.tell))
            steps.advance()
    return results


def preparation() -> bool:
    """What a mask costs before the first tile."""
    from sparsify.bench.prepare import measure_preparation

    for row in measure_preparation(length=131072, heads=32, flex_length=2048):
        print(
            f"{row.what:9} N={row.length:<7} {row.heads} heads, mixture: "
            f"{row.seconds * 1e3:8.1f} ms, {row.peak_bytes / 2**20:7.0f} MB"
        )
    return True


def compared(before: Path, after: Path) -> bool:
    """What got slower and faster from one file to another."""
    from sparsify.bench.compare import compare, remarks, table

    found, console = compare(before, after), Console(highlight=False)
    shown = table(found)
    if shown.row_count:
        console.print(shown)
    for text in remarks(found):
        console.print(text, markup=False)
    return not found.fails


def _check_dtypes(dtype: list[str] | None) -> None:
    for name in dtype or ():
        if name not in DTYPES:
            raise InputError(f"bench: unknown dtype '{name}'; {nearest(name, DTYPES)}")
