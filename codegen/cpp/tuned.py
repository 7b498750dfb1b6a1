"""What the store of tuned kernels says of C++ kernels, and what there is to try for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from sparsify import runtime
from sparsify.codegen.cpp.tuning import ALLOWED, Tuning, check, fits, issue, register_blocks
from sparsify.codegen.target import dtype_name
from sparsify.codegen.tuned import FEW, code_version, kernel_key
from sparsify.errors import BuildError, InputError, Refusal
from sparsify.runtime import tuned
from sparsify.runtime.machine import cpu_model

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch
    from sparsify.program import Program
    from sparsify.runtime.tunings import Tuned

__all__ = ["ahead_key", "check", "default", "groups", "holds", "key", "machine", "software", "tuning"]

SLACK = 1.05  # a register block is tried whose products take no more than so many times as long as the best one's
# What is tried of each field, after tiles; and where queries are few.
MANY_TRIED = {
    "blocks": (6, 8, 12, 16, 24, 32),
    "cache_kib": (512, 1024, 2048, 8192),
    "items": (2, 4, 8, 16, 32),
    "fetch": (1, 0),
    "native": (1, 0),
    "unroll": (2, 1),
}
FEW_TRIED = {"parts": (2, 4, 8, 1), "direct_rows": (48, 8, 0, 24), "native": (1, 0)}


def machine() -> str:
    """The processor and its vectors, as far as they make the same kernel as fast."""
    isa = runtime.machine_isa()
    return f"{cpu_model()}, {isa.name}{' with bf16 dot products' if isa.bf16_dot else ''}"


def software() -> str:
    """What prints and what compiles. Raises BuildError without a compiler."""
    compiler = runtime.find_compiler()
    if isinstance(compiler, Refusal):
        raise BuildError(str(compiler))
    return f"{code_version('sparsify.codegen.cpp')}, {compiler.version}"


def key(launch: Launch) -> tuple[str, str, str, str]:
    """Under which the store has a launch's kernel."""
    sizes = launch.q.shape[3], launch.v.shape[3]
    return machine(), software(), "cpp", kernel_key(launch.program, dtype_name(launch.q.dtype), *sizes, queries(launch))


def ahead_key(launch: Launch) -> tuple[str, str, str, str]:
    """The same: nothing is built for another machine."""
    return key(launch)


def holds(entry: Tuned) -> bool:
    """Whether an entry of a store is for this machine and software."""
    try:
        return (entry.machine, entry.software) == (machine(), software())
    except BuildError:
        return False


def queries(launch: Launch) -> int:
    """How many there are."""
    return launch.q.shape[2]


def tuning(program: Program, dtype: torch.dtype, head_dim: int, value_dim: int, q_len: int) -> Tuning:
    """How a kernel works on this machine: as it was tuned, else as it does by default."""
    kernel = kernel_key(program, dtype_name(dtype), head_dim, value_dim, q_len)
    values, isa = tuned.lookup((machine(), software(), "cpp", kernel)), runtime.machine_isa()
    boxes = program.queries is not None
    try:
        return Tuning.of(isa, values, boxes)
    except InputError:
        if tuned.is_forced():
            raise
        return Tuning.of(isa, {}, boxes)  # `sparsify doctor` says what is wrong with the store


def default(launch: Launch) -> dict[str, int]:
    """Every field as it is by default on this machine."""
    return asdict(Tuning.of(runtime.machine_isa(), {}, launch.program.queries is not None))


def groups(launch: Launch) -> list[list[Mapping[str, int]]]:
    """What to try, group by group: each changes the best that was found in those before it."""
    if queries(launch) <= FEW:
        return [[{name: value} for value in tried] for name, tried in FEW_TRIED.items()]
    blocks = sorted(register_blocks(runtime.machine_isa()), key=lambda block: (issue(*block), -block[0] * block[1]))
    fast = [block for block in blocks if issue(*block) <= SLACK * issue(*blocks[0])]
    usual = default(launch)
    height = usual["block_rows"] * usual["blocks"]
    tiles = [
        {"block_rows": rows, "block_vectors": vectors, "blocks": _nearest(height / rows), "keys": keys}
        for rows, vectors in fast
        for keys in sorted(ALLOWED["keys"], reverse=True)
        if fits(vectors, keys, runtime.machine_isa())
    ]
    rest = [[{name: value} for value in tried] for name, tried in MANY_TRIED.items()]
    return [tiles, *(rest if launch.program.queries is None else rest[1:])]  # a box of queries has its size


def _nearest(blocks: float) -> int:
    return min(ALLOWED["blocks"], key=lambda many: abs(many - blocks))
