"""How a C++ kernel goes about its work: what may be tuned, the values that may be tried, and what is used by default.

No field changes what a kernel computes, but for the order in which it sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace

from sparsify.codegen.cpp.rows import KEYS
from sparsify.codegen.tuned import check_values
from sparsify.errors import InputError
from sparsify.runtime import Isa

# What each field may be: also what a store from elsewhere may ask for, since it ends up in code.
ALLOWED: dict[str, tuple[int, ...]] = {
    "block_rows": (2, 3, 4, 5, 6, 7, 8, 10, 12, 14),
    "block_vectors": (1, 2, 4),
    "keys": (32, KEYS),
    "blocks": (4, 6, 8, 10, 12, 16, 20, 24, 32, 48),
    "unroll": (1, 2, 4),
    "cache_kib": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    "fetch": (0, 1),
    "items": (1, 2, 4, 8, 16, 32),
    "parts": (1, 2, 4, 8),
    "direct_rows": (0, 4, 8, 16, 24, 32, 48),
    "native": (0, 1),
}


@dataclass(frozen=True)
class Tuning:
    """block_rows, block_vectors: the register block, query rows by vectors of keys or of value columns. blocks: those
    of a query tile, one above another. keys: of a key tile.

    unroll: steps of a product in one turn of its loop. cache_kib: packed key tiles that a thread keeps, at most. fetch:
    whether the next packed tile is fetched while one is met; of lists it always is. items: query tiles that a thread
    takes at a time, at most. parts: into how many parts a thread work is split where query tiles share no keys
    (decoding). direct_rows: up to so many rows, keys are read where they lie, and not packed. native: whether the
    compiler schedules for this processor.
    """

    block_rows: int = 6
    block_vectors: int = 2
    blocks: int = 16
    keys: int = KEYS
    unroll: int = 1
    cache_kib: int = 8192
    fetch: int = 0
    items: int = 8
    parts: int = 1
    direct_rows: int = 24
    native: int = 0

    @classmethod
    def of(cls, isa: Isa, values: Mapping[str, int], boxes: bool = False) -> Tuning:
        """The default of an instruction set, with some values changed; boxes: for a program with a layout of queries.
        Raises InputError for what isn't allowed."""
        check(values)
        rows, vectors = register_block(isa, boxes)
        found = replace(cls(block_rows=rows, block_vectors=vectors), **values)
        if not fits(found.block_vectors, found.keys, isa):
            vectors = found.keys * 4 // isa.vector_bytes
            what = f"found {found.block_vectors}; expected a divisor of the {vectors} that {found.keys} keys are in"
            raise InputError(f"tuned kernel: block_vectors: {what} {isa.name}")
        return found

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return self.block_rows * self.blocks

    def changed(self, isa: Isa, boxes: bool = False) -> dict[str, int]:
        """What differs from the default."""
        usual = asdict(Tuning.of(isa, {}, boxes))
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def flags(self) -> tuple[str, ...]:
        """What the compiler is told beside the instruction set: never to use other instructions."""
        return ("-mtune=native",) if self.native else ()


def check(values: Mapping[str, int]) -> None:
    """Raises InputError for a field that isn't there, or a value that it can't have."""
    check_values(values, ALLOWED)


def register_block(isa: Isa, boxes: bool) -> tuple[int, int]:
    """The register block (rows, vectors) by default: a wide one, but with vectors of 64 bytes a small one where queries
    lie in boxes, as few of their rows keep all of a tile."""
    return (4, 2) if boxes and isa.vector_bytes == 64 else (Tuning.block_rows, isa.registers // 8)


def fits(vectors: int, keys: int, isa: Isa) -> bool:
    """Whether register blocks of so many vectors fill the keys of a tile."""
    return keys * 4 // isa.vector_bytes % vectors == 0


def reads_in_place(head_dim: int, value_dim: int, size: int, how: Tuning, isa: Isa) -> bool:
    """Whether few rows may read keys and values where they lie, as direct.h does: rows of keys and of values are whole
    vectors, and elements of 16 bits, whose `size` is 2 bytes, are read two vectors at a time."""
    whole = head_dim * size % isa.vector_bytes == 0 and value_dim * size % isa.vector_bytes == 0
    return whole and (size == 4 or how.block_vectors % 2 == 0)


def register_blocks(isa: Isa) -> Iterable[tuple[int, int]]:
    """The register blocks (rows, vectors) that fit an instruction set's registers: one for each sum, one for each
    vector of the packed operand, and one for a number."""
    for vectors in ALLOWED["block_vectors"]:
        for rows in ALLOWED["block_rows"]:
            if fits(vectors, KEYS, isa) and rows * vectors + vectors + 1 <= isa.registers:
                yield rows, vectors


def issue(rows: int, vectors: int) -> float:
    """About how many cycles a register block takes a product: two are summed in one, two operands are read in one, and
    a sum is ready for the next product after four."""
    products = rows * vectors
    return max(products / 2, (rows + vectors) / 2, 4) / products


assert set(ALLOWED) == {field.name for field in fields(Tuning)}
