"""Mask tensors as loads: a program with a mask is run as one without, whose last two loads are the mask and the offset
that makes rows of it from positions."""

from __future__ import annotations

import dataclasses

from sparsify.bias import Term
from sparsify.codegen.target import Launch
from sparsify.expr import Load, Test, Var, as_expr
from sparsify.program import Program

_FOUND: dict[int, tuple[Program, Program]] = {}  # by identity, as hashing a program walks all of its predicates


def without_mask(program: Program) -> Program:
    """The program with its mask as a load."""
    if program.mask is None:
        return program
    if id(program) not in _FOUND:
        _FOUND[id(program)] = program, _without_mask(program)
    return _FOUND[id(program)][1]


def _without_mask(program: Program) -> Program:
    mask, offset = f"_{program.loads}", f"_{program.loads + 1}"
    load = Load(mask, (Var("b"), Var("h"), Var("q") - Load(offset, (as_expr(0),)), Var("k")))
    keep, bias = program.keep, program.bias
    if program.mask == "bool":
        keep = tuple(part & Test(load) for part in keep)
    else:
        bias = (*bias, Term(loads=(load,)))
    return dataclasses.replace(program, keep=keep, bias=bias, mask=None, loads=program.loads + 2)


def launch_without_mask(launch: Launch) -> Launch:
    """The same launch, of the program without its mask."""
    import torch

    if launch.mask is None:
        return launch
    mask = launch.mask.expand(*launch.q.shape[:3], launch.k.shape[2])
    loads = (*launch.loads, mask, torch.tensor([launch.q_offset]))
    return dataclasses.replace(launch, program=without_mask(launch.program), mask=None, loads=loads)
