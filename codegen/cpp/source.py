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
from sparsify.codegen.target import DTYPES, dtype_name
from sparsify.expr import TRUE, Pred, Sum, Var, constant
from sparsify.patterns.lists import lists, tile_rows
from sparsify.patterns.tiles import BLOCK
from sparsify.runtime import Isa

if TYPE_CHECKING:
    import torch

    from sparsify.program import Program

SKELETON = "kernel.cpp.jinja"
BLOCK_ROWS, BLOCKS = 6, 16  # rows of a register block, and blocks of a query tile
SLOTS = 64  # of a query tile in a layout of queries: as many as in a key tile, so both can be a box of space

# 2**f for |f| <= 1/2, minimax in relative error with the constant fixed at 1: to 1.0e-4, 2.8e-6 and 9.1e-8.
EXP2 = {
    "bf16": ("1.0f", "0.6932829f", "0.24221095f", "0.055008933f"),
    "fp16": ("1.0f", "0.6931242f", "0.24024099f", "0.055906426f", "0.009582854f"),
    "fp32": ("1.0f", "0.693147f", "0.24022242f", "0.055507336f", "0.009671513f", "0.0013264727f"),
}


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, beside its program: the dtype's short name and the sizes of a head."""

    io: str
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, value_dim: int) -> Shape:
        return cls(DTYPES[dtype_name(dtype)], head_dim, value_dim)


def render(program: Program, shape: Shape, isa: Isa) -> tuple[str, str]:
    """(name, source) of the kernel."""
    name, names = kernel_name(program, shape, isa), Names(program)
    return name, fill(
        SKELETON,
        name=name,
        vector_bytes=isa.vector_bytes,
        packed_bf16=isa.bf16_dot and shape.io == "bf16",
        io=shape.io,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        block_rows=BLOCK_ROWS,
        block_vectors=isa.block_vectors,
        blocks=BLOCKS,
        max_bands=max_bands(program),
        exp2=EXP2[shape.io],
        softcap=program.softcap is not None,
        use_head=uses_head(program),
        lists=max_lists(program),
        gathers=gathers(program),
        skips=any(program.skips),
        query_layout=program.queries is not None,
        key_layout=program.keys is not None,
        tile_rows=tile_rows(program.keep, BLOCK_ROWS * BLOCKS if program.queries is None else SLOTS),
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
    environment = _environment()
    text = environment.loader.get_source(environment, skeleton)[0]  # type: ignore[union-attr]
    unused = set(values) - meta.find_undeclared_variables(environment.parse(text))
    if unused:
        raise ValueError(f"{skeleton} has no hole for {', '.join(sorted(unused))}")
    return environment.get_template(skeleton).render(values)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    read = lambda name: (files("sparsify.codegen.cpp") / name).read_text()  # noqa: E731
    return jinja2.Environment(loader=jinja2.FunctionLoader(read), undefined=jinja2.StrictUndefined, autoescape=False)


def kernel_name(program: Program, shape: Shape, isa: Isa) -> str:
    """A readable name: what is kept, target and instruction set, dtype, sizes, tile."""
    rules = [_rule_name(keep) for keep in program.keep]
    parts = rules if len(rules) <= 3 else [*rules[:2], f"{len(rules) - 2}more"]
    if program.bias:
        parts.append("bias")
    if program.sink is not None:
        parts.append("sink")
    if program.softcap is not None:
        parts.append("softcap")
    if program.queries is not None or program.keys is not None:
        parts.append("layout")
    if any(program.skips):
        parts.append("skip")
    size = f"d{shape.head_dim}" + (f"v{shape.value_dim}" if shape.value_dim != shape.head_dim else "")
    dot = "bf16" if isa.bf16_dot else ""
    return f"{'_'.join(parts)}__cpp_{isa.name}{dot}__{shape.io}__{size}__m{BLOCK_ROWS * BLOCKS}n{KEYS}"


def _rule_name(keep: Pred) -> str:
    q, k = Var("q"), Var("k")
    if keep == TRUE:
        return "dense"
    if keep == (k <= q):
        return "causal"
    found = lists(keep)
    if found:
        return f"list{found[0].unit}"
    for part in getattr(keep, "parts", ()):
        expr = getattr(part, "expr", None)
        width = constant(expr + q - k) if isinstance(expr, Sum) else None
        if width is not None and keep == ((k <= q) & part):
            return f"window{width + 1}"
    return "rule"
