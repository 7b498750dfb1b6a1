"""Launches made ready once: a second launch of the same shapes finds its compiled kernel and its numbers here.

Working out a launch's numbers and Triton's own look-up of a compiled kernel take some 0.4 ms, as long as a kernel runs
over a short window.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsify import env
from sparsify.codegen.triton.arguments import Parts, arguments, empty_parts, merge_arguments, tensor_arguments
from sparsify.codegen.triton.kernels import architecture, kernel, merger
from sparsify.codegen.triton.tuning import Shape, tiled
from sparsify.program import Program
from sparsify.runtime import tuned

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch

MOST = 4096  # launches that are remembered: one a shape, and at decode one for every length
ALIGNED = 16  # bytes: what Triton compiles differently for


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what it is launched with: every argument in order, None for the tensors, whose `places`
    are by name."""

    kernel: Any
    grid: tuple[int, int, int]
    values: tuple[Any, ...]
    places: dict[str, int]

    @classmethod
    def first(
        cls, function: Any, grid: tuple[int, int, int], values: dict[str, Any], tensors: Collection[str], **how: int
    ) -> Compiled:
        """Launches a jitted function for the first time."""
        compiled = function[grid](**values, **how)
        names = [parameter.name for parameter in function.params]
        numbers = tuple(None if name in tensors else values[name] for name in names)
        return cls(compiled, grid, numbers, {name: names.index(name) for name in tensors})

    def again(self, tensors: Mapping[str, Any]) -> None:
        """Launches it with other tensors."""
        values = list(self.values)
        for name, tensor in tensors.items():
            values[self.places[name]] = tensor
        self.kernel[self.grid](*values)


@dataclass(frozen=True)
class Ready:
    """A launch's kernel, that which merges splits, if there are any, and the program and shape that it runs as."""

    attend: Compiled
    merge: Compiled | None
    program: Program
    shape: Shape

    @classmethod
    def first(cls, launch: Launch, out: torch.Tensor) -> Ready:
        """Runs a launch for the first time."""
        launch, shape = tiled(launch, architecture(launch.q.device.index))
        parts, merge = empty_parts(launch, shape), None
        tensors, values = tensor_arguments(launch, out, shape, parts), arguments(launch, out, shape, False, parts)
        grid, how = (values["q_tiles"] * values["all_heads"], shape.splits, 1), {"num_warps": shape.num_warps}
        attend = Compiled.first(kernel(launch), grid, values, tensors, num_stages=shape.num_stages, **how)
        if parts is not None:
            values = merge_arguments(launch, out, shape, False, parts)
            merge = Compiled.first(merger(launch), (values["rows"], 1, 1), values, _merged(launch, out, parts))
        return cls(attend, merge, launch.program, shape)

    def again(self, launch: Launch, out: torch.Tensor) -> None:
        """Runs a launch with the same key."""
        launch = launch if launch.program is self.program else replace(launch, program=self.program)
        parts = empty_parts(launch, self.shape)
        self.attend.again(tensor_arguments(launch, out, self.shape, parts))
        if self.merge is not None and parts is not None:
            self.merge.again(_merged(launch, out, parts))


def _merged(launch: Launch, out: torch.Tensor, parts: Parts) -> dict[str, torch.Tensor]:
    values = {"PARTS": parts[0], "STATISTICS": parts[1], "OUT": out}
    return values if launch.lse is None else values | {"LSE": launch.lse}


_READY: dict[tuple, Ready] = {}


def run(launch: Launch, out: torch.Tensor) -> None:
    """Runs a launch on the current device; the scale must be above 0."""
    key = _key(launch)
    found = _READY.get(key)
    if found is not None:
        return found.again(launch, out)
    if len(_READY) >= MOST:
        _READY.clear()
    _READY[key] = Ready.first(launch, out)


def _key(launch: Launch) -> tuple:
    """What the numbers and the compiled kernel follow from. The output's strides follow from the shapes."""
    tensors = [_about(tensor) for tensor in (launch.q, launch.k, launch.v, *launch.loads)]
    made = tuned.token(), env.build_variables()
    return launch.program, *made, launch.q_offset, launch.scale, launch.lse is None, launch.q.device, *tensors


def _about(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNED == 0
