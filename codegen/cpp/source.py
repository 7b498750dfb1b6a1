"""From a program to the text of its kernel: the skeleton `kernel.cpp.jinja` with its holes filled."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import jinja2
from jinja2 import meta

from sparsify.codegen.cpp.biases import print_biases
from sparsify.codegen.cpp.rows import KEYS
from sparsify.codegen.cpp.rules import (
    Names,
    gathers,
    max_bands,
    max_facts,
    max_lists,
    max_row_facts,
    print_layouts,
    print_rules,
    uses_head,
)
from sparsify.codegen.cpp.tuning import Tuning, reads_in_place
from sparsify.codegen.names import program_name, size_name
from sparsify.codegen.target import DTYPES, dtype_name
from sparsify.patterns.layouts.boxes import TILE
from sparsify.patterns.lists import tile_rows
from sparsify.patterns.tiles import BLOCK
from sparsify.runtime import Isa

if TYPE_CHECKING:
    import torch

    from sparsify.program import Program

SKELETON = "kernel.cpp.jinja"
SLOTS = TILE  # of a query tile in a layout of queries: as many as in a key tile, so both can be a box of space

# 2**f for |f| <= 1/2, minimax in relative error with the constant fixed at 1: to 1.0e-4, 2.8e-6 and 9.1e-8.
EXP2 = {
    "bf16": ("1.0f", "0.6932829f", "0.24221095f", "0.055008933f"),
    "fp16": ("1.0f", "0.6931242f", "0.24024099f", "0.055906426f", "0.009582854f"),
    "fp32": ("1.0f", "0.693147f", "0.24022242f", "0.055507336f", "0.009671513f", "0.0013264727f"),
}


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, beside its program: the dtype's short name, the sizes of a head, how it works."""

    io: str
    head_dim: int
    value_dim: int
    tuning: Tuning

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, value_dim: int, tuning: Tuning) -> Shape:
        return cls(DTYPES[dtype_name(dtype)], head_dim, value_dim, tuning)

    def blocks(self, program: Program) -> int:
        """Blocks of a query tile: as many as are asked for, or as hold the slots of a box."""
        return max(self.tuning.blocks, 0 if program.queries is None else -(-SLOTS // self.tuning.block_rows))


def render(program: Program, shape: Shape, isa: Isa) -> tuple[str, str]:
    """(name, source) of the kernel."""
    name, names = kernel_name(program, shape, isa), Names(program, shape.tuning.keys)
    sizes = shape.head_dim, shape.value_dim
    return name, fill(
        SKELETON,
        name=name,
        vector_bytes=isa.vector_bytes,
        packed_bf16=isa.bf16_dot and shape.io == "bf16",
        io=shape.io,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        tuning=shape.tuning,
        reads=reads_in_place(*sizes, 4 if shape.io == "fp32" else 2, shape.tuning, isa),
        blocks=shape.blocks(program),
        max_bands=max_bands(program),
        exp2=EXP2[shape.io],
        softcap=program.softcap is not None,
        use_head=uses_head(program),
        lists=max_lists(program),
        gathers=gathers(program),
        whole=KEYS,
        skips=any(program.skips),
        query_layout=program.queries is not None,
        key_layout=program.keys is not None,
        tile_rows=tile_rows(program.keep, shape.tuning.rows if program.queries is None else SLOTS),
        bias=bool(program.bias),
        sink=program.sink is not None,
        facts=max_facts(program),
        row_facts=max_row_facts(program, names),
        summaries=names.summaries,
        summary_block=BLOCK,
        rules=print_rules(program, names),
        layouts=print_layouts(program, names),
        biases=print_biases(program, names),
    )


def fill(skeleton: str, **values: object) -> str:
    """The skeleton with its holes filled.

    Raises jinja2.UndefinedError for a hole without a value, ValueError for a value without a hole.
    """
    unused = set(values) - _holes(skeleton)
    if unused:
        raise ValueError(f"{skeleton} has no hole for {', '.join(sorted(unused))}")
    return _environment().get_template(skeleton).render(values)


@functools.lru_cache(maxsize=8)
def _holes(skeleton: str) -> frozenset[str]:
    """The names of a skeleton's holes, read once for all kernels."""
    environment = _environment()
    text = environment.loader.get_source(environment, skeleton)[0]  # type: ignore[union-attr]
    return frozenset(meta.find_undeclared_variables(environment.parse(text)))


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    read = lambda name: (files("sparsify.codegen.cpp") / name).read_text()  # noqa: E731
    return jinja2.Environment(loader=jinja2.FunctionLoader(read), undefined=jinja2.StrictUndefined, autoescape=False)


def kernel_name(program: Program, shape: Shape, isa: Isa) -> str:
    """A readable name: what is kept, target and instruction set, dtype, sizes, tile, and what is tuned."""
    size, dot = size_name(shape.head_dim, shape.value_dim), "bf16" if isa.bf16_dot else ""
    tuned = "".join(f"_{name}{value}" for name, value in shape.tuning.changed(isa, program.queries is not None).items())
    tile = f"m{shape.tuning.rows}n{shape.tuning.keys}{tuned}"
    return f"{program_name(program)}__cpp_{isa.name}{dot}__{shape.io}__{size}__{tile}"
