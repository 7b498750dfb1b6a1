"""The kernels that somebody needs: those of the bench's grid, or those of a model with a spec."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.cases import Case
from sparsify.bench.end_to_end import decode_step, model_of, prefill
from sparsify.bench.peers import Inputs, sparsify
from sparsify.codegen.names import program_name
from sparsify.codegen.target import Launch
from sparsify.errors import InputError
from sparsify.models import Wanted
from sparsify.tuner.jobs import Job, jobs_of, recorded, sizes


def of_cases(cases: Sequence[Case], device: str, tell: Callable[[str], None]) -> list[Job]:
    """The kernels of cases, each by the name of its pattern."""
    launches: dict[int, str] = {}
    found: list[Launch] = []
    for case in cases:
        tell(case.name)
        with torch.inference_mode(), recorded(run=False) as some:
            sparsify(Inputs.draw(case, device))()
        found += some
        launches |= {id(launch): case.pattern for launch in some}
    return jobs_of(found, lambda launch: f"{launches[id(launch)]} {sizes(launch)}")


def of_model(name: str, spec: Path | None, wanted: Sequence[Wanted], device: str, run: bool = True) -> list[Job]:
    """The kernels that the backend puts into a model, prefill and decode. Raises InputError where there is none.

    run: whether they run meanwhile; for a GPU that isn't here they can't.
    """
    options: dict[str, Any] = {"inner": "eager"} | ({} if spec is None else {"spec": str(spec)})
    found: list[Launch] = []
    for one in wanted:
        with torch.inference_mode():
            made, args, given = model_of(name, replace(one, command="tune", drawn=True), device)
            found += _launches(made, args, prefill(made, given), options, run)
            if not args and "input_ids" in given and (step := decode_step(made, given, one)):
                found += _launches(made, (), step, options, run)
    if not found:
        raise InputError(f"tune: {name}: the backend rewrites no attention there; see: sparsify explain {name}")
    return jobs_of(found, lambda launch: f"{program_name(launch.program)} {sizes(launch)}")


def _launches(
    made: Any, args: tuple[Any, ...], given: dict[str, Any], options: dict[str, Any], run: bool
) -> list[Launch]:
    """The launches of one call."""
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="sparsify", options=options)
    with recorded(run) as launches:
        compiled(*args, **copy.deepcopy(given))
    return launches
