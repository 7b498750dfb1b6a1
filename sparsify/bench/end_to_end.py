"""`sparsify bench --model`: a whole model's prefill and decode, with Inductor's dense attention and with sparsify."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparsify.bench.cases import check_fits
from sparsify.bench.cold import cold_kernels, compiled_alone, first_call
from sparsify.bench.lossless import is_lossless, relative_error
from sparsify.bench.measure import Timing, interleaved, timing
from sparsify.bench.memory import peak_bytes
from sparsify.bench.tables import SHORT, new_table, short
from sparsify.errors import InputError
from sparsify.explanation import explain
from sparsify.models import Call, Wanted, called, check_size, decoding, from_config, token_bytes

ROWS = 64  # logits of so many last tokens are computed, where the model lets its caller say so; they are compared
WARM = 3  # decode steps before the timing: the first two compile, for one length and for any
NAMES = {"inductor": "inductor", "sparsify": "sparsify", "spec": "with the spec"}


@dataclass(frozen=True)
class Phase:
    """Prefill or decode of a model, measured. Runs: inductor, sparsify (no spec), and spec, where there is one.

    timings: of the runs that are right. error: each run's largest difference from the uncompiled model over its largest
    output. memory: bytes that one call takes beyond weights and inputs. sites: (rewritten, found) of sparsify's runs.
    """

    model: str
    spec: str
    phase: str
    length: int
    dtype: str
    timings: Mapping[str, Timing]
    error: Mapping[str, float]
    memory: Mapping[str, int]
    sites: Mapping[str, tuple[int, int]]

    @property
    def right(self) -> bool:
        """Whether the run without a spec has the model's own outputs, and that with one is finite.

        A wrong run gets no speed.
        """
        return all(run in self.timings for run in self.error)

    def ratio(self, run: str) -> float | None:
        """How many times as fast as Inductor, or None."""
        found = self.timings.get(run)
        return None if found is None else self.timings["inductor"].median / found.median

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        told = {"model": self.model, "spec": self.spec, "phase": self.phase, "length": self.length, "dtype": self.dtype}
        return told | {
            "right": self.right,
            "ratios": {run: self.ratio(run) for run in self.timings},
            "error": dict(self.error),
            "peak_bytes": dict(self.memory),
            "sites": {run: {"rewritten": done, "found": found} for run, (done, found) in self.sites.items()},
            "seconds": {run: found.as_dict() for run, found in self.timings.items()},
        }


def measure(
    name: str, spec: Path | None, wanted: Wanted, device: str, repeats: int, seconds: float, tell: Callable[[str], None]
) -> list[Phase]:
    """Prefill of `wanted.length` tokens, and decode after as many where the model keeps a cache. Raises InputError."""
    tell(f"{name}: making the model")
    wanted = replace(wanted, command="bench", drawn=True)
    with torch.inference_mode(), cold_kernels():
        made, args, given = model_of(name, wanted, device)
        length = given["input_ids"].shape[1] if "input_ids" in given else 0
        common = (name, "" if spec is None else str(spec))
        how = (spec, device, repeats, seconds)
        jobs = {"prefill": (args, prefill(made, given))}
        if not args and "input_ids" in given and (step := decode_step(made, given, wanted)):
            jobs["decode"] = ((), step)
        found = []
        for phase, (positional, inputs) in jobs.items():
            told = {"phase": phase, "length": length, "dtype": _dtype_of(made)}
            tell_phase = _telling(tell, f"{name} {length}: {phase}")
            found.append(Phase(*common, **told, **_measured(made, positional, inputs, *how, tell_phase)))
    return found


def model_of(name: str, wanted: Wanted, device: str) -> Call:
    """A model on a device, and inputs for it. Raises InputError for what can't be made."""
    if ":" in name:
        made, args, given = called(name, wanted)
    else:
        check_size(name, wanted, "its")
        made, args, given = from_config(name, wanted)
    place = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    args = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in args)
    return made.to(device), args, place


def check_memory(name: str, wanted: Wanted) -> None:
    """Raises InputError for a config's model and more tokens than this machine's memory holds of one layer."""
    what = f"tokens, and hidden states, keys and values of one layer of {name} at {wanted.length} tokens"
    check_fits(what, wanted.batch * wanted.length * token_bytes(name, wanted))


def prefill(made: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one call on all tokens, which keeps nothing and gives the logits of the last ones only."""
    known = signature(made.forward).parameters
    wanted = {"logits_to_keep": ROWS, "use_cache": False} if "input_ids" in given else {}
    return dict(given) | {key: value for key, value in wanted.items() if key in known}


def decode_step(made: Any, given: Mapping[str, Any], wanted: Wanted) -> dict[str, Any] | None:
    """The inputs of a step with a cache; None for a model that keeps none."""
    try:
        return decoding(made, dict(given), wanted)
    except InputError:
        return None


def _telling(tell: Callable[[str], None], what: str) -> Callable[[str], None]:
    return lambda text: tell(f"{what}: {text}")


def _dtype_of(made: Any) -> str:
    return str(next(p.dtype for p in made.parameters() if p.is_floating_point())).removeprefix("torch.")


def _measured(
    made: Any, args: tuple[Any, ...], given: dict[str, Any], spec: Path | None, device: str, repeats: int,
    seconds: float, tell: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The fields of a Phase that are measured."""
    backends: dict[str, dict[str, Any]] = {"inductor": {"backend": "inductor"}, "sparsify": {"backend": "sparsify"}}
    if spec is not None:
        backends["spec"] = {"backend": "sparsify", "options": {"spec": str(spec)}}
    tell("the uncompiled model")
    truth = made(*args, **copy.deepcopy(given))[0]
    runs, errors, first, sites = {}, {}, {}, {}
    for name, how in backends.items():
        if name != "inductor":
            report = explain(made, *args, **_options(how), **copy.deepcopy(given))
            sites[name] = (len(report.rewritten), len(report.sites))
        tell(f"compiling, {NAMES[name]}")
        runs[name] = _run(made, args, given, how)
        out, first[name] = first_call(runs[name], device)
        errors[name] = relative_error(out, truth)
    for run in list(runs.values()) * (WARM - 1):
        run()
    tell("timing")
    samples = interleaved(runs, device, repeats, seconds)
    timings = {name: timing(samples[name], first[name]) for name in runs}
    memory = {name: peak_bytes(run, device) for name, run in runs.items()}
    wrong = {"sparsify": not is_lossless(errors, _dtype_of(made)), "spec": math.isinf(errors.get("spec", 0))}
    timings = {name: found for name, found in timings.items() if not wrong.get(name)}
    return {"timings": timings, "error": errors, "memory": memory, "sites": sites}


def _options(how: Mapping[str, Any]) -> dict[str, Any]:
    return how.get("options", {})


def _run(made: Any, args: tuple[Any, ...], given: dict[str, Any], how: dict[str, Any]) -> Callable[[], Any]:
    """A call of the model under a backend, with a cache of its own that each decode step makes longer."""
    run, mine = compiled_alone(made, **how), copy.deepcopy(given)
    return lambda: run(*args, **mine)[0]


def table(phases: Sequence[Phase]) -> Table:
    """One line a run: seconds of a prefill or tokens a second of decoding, the ratio to Inductor, the first call,
    memory, and sites rewritten."""
    columns = ("run", "prefill s", "tokens/s", "ratio", "first s", "MB", "sites")
    found = new_table("end to end (medians of interleaved repeats)", *columns, first="", gap=1)
    found.columns[1].justify = "left"
    for phase in phases:
        for number, run in enumerate(phase.memory):
            where = f"{phase.phase} {phase.length or ''} {SHORT[phase.dtype]}" if number == 0 else ""
            rewritten, sites = phase.sites.get(run, (0, 0))
            shown = f"{rewritten}/{sites}" if run in phase.sites else ""
            found.add_row(where, NAMES[run], *_speed(phase, run), short(phase.memory[run] / 2**20), shown)
        found.add_section()
    return found


def _speed(phase: Phase, run: str) -> list[str]:
    """prefill s, tokens/s, ratio, first s."""
    timing = phase.timings.get(run)
    if timing is None:
        return ["WRONG", f"{phase.error[run]:.0e}", "", ""]
    ratio = "" if run == "inductor" else f"{phase.ratio(run):.2f}x"
    speed = ["", short(1 / timing.median)] if phase.phase == "decode" else [f"{timing.median:.3f}", ""]
    return [*speed, ratio, short(timing.first)]


def remarks(phases: Sequence[Phase]) -> list[str]:
    """Sentences below the table."""
    found = []
    for phase in phases:
        where = f"{phase.phase} {phase.length or ''}".strip()
        if "sparsify" not in phase.timings:
            error, theirs = phase.error["sparsify"], phase.error["inductor"]
            found.append(f"{where}: WRONG: without a spec the error is {error:.1e}, Inductor's {theirs:.1e}")
        if "spec" in phase.error and "spec" not in phase.timings:
            found.append(f"{where}: WRONG: the outputs with the spec are not finite")
        if phase.sites.get("spec", (1, 1))[0] == 0:
            found.append(f"{where}: the spec changed no site: sparsify explain {phase.model} --spec {phase.spec}")
    return found
