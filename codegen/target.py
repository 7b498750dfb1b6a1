"""What a target is: something that can run a program, or say why not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparsify.errors import Refusal
from sparsify.program import Program

if TYPE_CHECKING:
    import torch


DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # what kernels compute in, and its short name


@dataclass(frozen=True)
class Launch:
    """One call of a program.

    q: (B, Hq, Nq, D); k: (B, Hkv, Nk, D); v: (B, Hkv, Nk, Dv), of one dtype and device, any strides.
    loads: the tensors that loads `_0`, `_1`, ... name (bool, integer or, in biases, floating).
    q_offset: the absolute position of the first query.
    scale: multiplies q·k.
    lse: where to write the logarithm of each row's sum of weights, contiguous float32 (B, Hq, Nq); None for nowhere.
    """

    program: Program
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    loads: tuple[torch.Tensor, ...]
    q_offset: int
    scale: float
    lse: torch.Tensor | None = None

    def empty_output(self) -> torch.Tensor:
        """An output (B, Hq, Nq, Dv) laid out as (B, Nq, Hq, Dv): what a model's own transpose-and-reshape wants."""
        return empty_output(self.q, self.v)

    def clear(self, out: torch.Tensor) -> torch.Tensor:
        """Fills the output, and the lse, with what rows have that keep nothing: 0 and -inf."""
        if self.lse is not None:
            self.lse.fill_(-math.inf)
        return out.zero_()


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def empty_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The output that every target and the fake kernel return: shape (B, Hq, Nq, Dv), strides of (B, Nq, Hq, Dv)."""
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)


def empty_lse(q: torch.Tensor) -> torch.Tensor:
    """What `Launch.lse` may be."""
    import torch

    return q.new_empty(q.shape[:3], dtype=torch.float32)


class Target(Protocol):
    """A way to run programs. Targets are stateless; built kernels are cached by `sparsify.runtime`."""

    name: str

    def unavailable(self) -> Refusal | None:
        """Why this machine can't use the target at all, or None."""

    def refuse(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
        """Why this program can't run on the target, or None."""

    def source(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
        """The generated source, as text."""

    def run(self, launch: Launch) -> torch.Tensor:
        """Runs the program; returns the output (B, Hq, Nq, Dv), and writes `launch.lse` if there is one.

        The latter is the natural logarithm of the sum of exp(score) over the row's kept keys and its sink, the scores
        as the program makes them. A row that keeps nothing gives 0; where it has no sink either its lse is -inf.
        """

    def remember(self, launch: Launch, key: object) -> None:
        """A call like this one was made, and may be made again: by `key`, the program's text, a pattern, or one a head.

        A target that can then does so without being asked (`sparsify.runtime.ready`), and others do nothing.
        """
