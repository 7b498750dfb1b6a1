"""Which candidates to try, and in which order: as the cost simulator predicts, the fastest first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparsify import cost
from sparsify.codegen.target import Launch, dtype_name
from sparsify.cost.machine import Machine
from sparsify.cost.nest import Shape
from sparsify.cost.positions import Positions
from sparsify.cost.site import Site, site_over_slots
from sparsify.cost.time import site_cost
from sparsify.errors import SparsifyError
from sparsify.patterns.lists import lists
from sparsify.tuner.targets import Values

# A candidate is left out that is predicted to take more than so many times as long as the best of its group: where the
# machine's rates are measured, and where they are public figures, which don't tell small tiles from large ones.
WORTH, UNMEASURED = 1.25, 2.0


class Order:
    """Of one launch's candidates: the fastest first, where the machine's rates are measured.

    Where the simulator says nothing (of lists, which only data fill) candidates stay as they are; register blocks and
    warps are none of its business, so it doesn't tell candidates apart that differ in these alone.
    """

    def __init__(self, launch: Launch, machine: Machine | None) -> None:
        self.machine, self.site = machine, None if machine is None else _site(launch)

    def __call__(self, group: Sequence[Values], best: Values) -> list[Values]:
        """The candidates worth trying, each taken as a change of the best so far."""
        times = [self.seconds({**best, **step}) for step in group]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return list(group)
        measured = self.machine is not None and self.machine.measured
        order = sorted(range(len(group)), key=lambda i: times[i]) if measured else range(len(group))
        return [group[i] for i in order if times[i] <= (WORTH if measured else UNMEASURED) * min(known)]

    @functools.cached_property
    def _seen(self) -> dict[tuple[tuple[str, int], ...], float | None]:
        return {}

    def seconds(self, values: Values) -> float | None:
        """What a launch takes as predicted; None where nobody knows."""
        changed = tuple(sorted(values.items()))
        if self.site is None or self.machine is None:
            return None
        if changed not in self._seen:
            try:
                self._seen[changed] = site_cost(replace(self.site, tuned=changed), self.machine).seconds
            except (SparsifyError, ValueError, KeyError, TypeError):
                self._seen[changed] = None
        return self._seen[changed]


def machine_for(launch: Launch, arch: int | str | None = None) -> Machine | None:
    """The machine that a launch's target runs on, as the simulator knows it, or None: of a GPU the one of its name,
    else the first of its architecture.

    arch: what is built for where there is no GPU.
    """
    if launch.program.target == "cpp":
        return cost.machine()
    name = ""
    if launch.q.is_cuda:
        from sparsify.codegen.triton.kernels import architecture

        arch, name = architecture(launch.q.device.index), torch.cuda.get_device_name(launch.q.device).lower()
    known = (cost.machine(one) for one in cost.names())
    found = [one for one in known if one.target == "triton" and one.arch == str(arch)]
    return next((one for one in found if one.name in name), found[0] if found else None)


def _site(launch: Launch) -> Site | None:
    """A launch as the simulator's site. Tiles that depend on data count as partial ones."""
    program, (batch, heads, q_len, head_dim) = launch.program, launch.q.shape
    kv_heads, k_len = launch.k.shape[1:3]
    if any(lists(keep) for keep in program.keep):
        return None
    env = {"N": k_len, "Nq": q_len} | dict(zip(program.sizes(), program.size_values(k_len), strict=True))
    shape = Shape(heads, kv_heads, q_len, k_len, head_dim, dtype_name(launch.q.dtype), batch)
    tokens = Positions(q_len, k_len, launch.q_offset, q_len, k_len)
    rules = tuple(map(program.rule_of, range(heads)))
    return site_over_slots(shape, rules, tokens, (program.queries, program.keys), env)
