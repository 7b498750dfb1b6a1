"""How large positions, indices and offsets can get in a launch: which integer types hold them, what can be negative."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.codegen.slots import slot_count
from sparsify.codegen.triton.expressions import NEVER_NEGATIVE, affine, rank
from sparsify.codegen.triton.listing import predicates, rounds
from sparsify.expr import (
    And,
    Eq,
    Expr,
    FloorDiv,
    Ge,
    Listed,
    Load,
    Max,
    Min,
    Mod,
    Mul,
    Not,
    Or,
    Pred,
    Select,
    Sum,
    Test,
    Var,
)  # fmt: skip
from sparsify.patterns.tiles import bounds
from sparsify.program import Program
from sparsify.walk import evaluate, loads, variables

if TYPE_CHECKING:
    import torch

    from sparsify.codegen.target import Launch

INT32 = 2**31
EXACT = 2**24  # float32 holds every integer up to here
BEYOND = 512  # tiles end past the last position: no tile is larger


def far(launch: Launch, out: torch.Tensor) -> bool:
    """Whether an offset inside a tile can pass 32 bits."""
    inside = (launch.q, launch.k, launch.v, out)
    reach = max(_rows_reach(launch, tensor, tensor is launch.k or tensor is launch.v) for tensor in inside)
    found = wrapped(launch)
    return max([reach, *(_reach(load, launch, found) for load in _pair_loads(launch.program))]) >= INT32


def _rows_reach(launch: Launch, tensor: torch.Tensor, of_keys: bool) -> int:
    """The largest offset of a tile's rows: any row where lists or layouts say which; of queries, also the heads of a
    group, which may share a tile."""
    listed, layout = bool(rounds(launch.program)), launch.program.keys if of_keys else launch.program.queries
    anywhere = layout is not None or (listed and of_keys)
    rows = max(256, tensor.shape[2]) if anywhere else 256
    heads = 0 if of_keys else launch.q.shape[1] // launch.k.shape[1] - 1
    return heads * abs(tensor.stride(1)) + rows * abs(tensor.stride(2)) + 256 * abs(tensor.stride(3))


def _reach(load: Load, launch: Launch, wrapped: frozenset[Expr]) -> int:
    """The largest offset from a load's 64-bit base."""
    tensor, k_len, total = launch.loads[int(load.source[1:])], slots(launch)[1], 0
    for index, length, stride in zip(load.index, tensor.shape, tensor.stride(), strict=True):
        form = None if index in wrapped else affine(index)
        if rank(index) and form is None:
            total += length * abs(stride)
        elif form is not None:
            total += (abs(form.q) * BEYOND + abs(form.k) * (k_len + BEYOND)) * abs(stride)
    return total


@functools.lru_cache(maxsize=1024)
def _pair_loads(program: Program) -> tuple[Load, ...]:
    """The loads that are read at queries or keys."""
    parts = [*predicates(program), *program.parts()[len(program.keep) :]]
    return tuple(dict.fromkeys(load for part in parts for load in loads(part) if rank(load)))


def wrapped(launch: Launch) -> frozenset[Expr]:
    """The indices over queries or keys that can be negative (as far as bounds can tell)."""
    lows = _lows(launch.program)
    if not lows:
        return frozenset()
    batch, heads, q_len, _ = launch.q.shape
    return _wrapped(launch.program, batch, heads, q_len, launch.k.shape[2], launch.q_offset)


@functools.lru_cache(maxsize=4096)
def _wrapped(program: Program, batch: int, heads: int, q_len: int, k_len: int, q_offset: int) -> frozenset[Expr]:
    env = _lengths(program, q_len, k_len)
    q_slots, k_slots = slot_count(program.queries, q_len, env), slot_count(program.keys, k_len, env)
    env |= {"q0": q_offset, "q1": q_offset + q_slots - 1, "k0": 0, "k1": k_slots - 1}
    corners = [env | {"b": b, "h": h, "head": h} for b in {0, batch - 1} for h in {0, heads - 1}]
    lows = _lows(program)
    return frozenset(
        index for index, low in lows.items() if low is None or min(evaluate(low, at) for at in corners) < 0
    )


@functools.lru_cache(maxsize=1024)
def _lows(program: Program) -> dict[Expr, Expr | None]:
    """The least value of each index over queries or keys, or None where it isn't known or not at a corner."""
    indices = dict.fromkeys(i for load in _pair_loads(program) for i in load.index if rank(i))
    return {index: _low(index) for index in indices if index not in NEVER_NEGATIVE}


def slots(launch: Launch) -> tuple[int, int]:
    """How many slots of queries and of keys there are: those of the tensors without layouts."""
    program, q_len, k_len = launch.program, launch.q.shape[2], launch.k.shape[2]
    env = _lengths(program, q_len, k_len)
    return slot_count(program.queries, q_len, env), slot_count(program.keys, k_len, env)


def _lengths(program: Program, q_len: int, k_len: int) -> dict[str, int]:
    return {"N": k_len, "Nq": q_len} | dict(zip(program.sizes(), program.size_values(k_len), strict=True))


def _low(index: Expr) -> Expr | None:
    found = bounds(index)
    if found is None or loads(found[0]):
        return None
    low = found[0]
    atoms = [atom for _, atom in low.terms] if isinstance(low, Sum) else [low]
    inside = any(variables(atom) & {"b", "h", "head"} for atom in atoms if not isinstance(atom, Var))
    return None if inside else low


def large(launch: Launch) -> bool:
    """Whether some part of a predicate, a bias or an index can pass 32 bits; 64-bit loads widen by themselves."""
    limits = _limits(launch, 0)
    return any(_magnitude(part, limits) >= INT32 for part in launch.program.parts())


def exact(launch: Launch) -> bool:
    """Whether float32 holds the integers of the terms, all parts included."""
    limits, terms = _limits(launch, 63), (*launch.program.bias, *(launch.program.sink or ()))
    return all(_magnitude(term.integer, limits) < EXACT for term in terms)


def _limits(launch: Launch, wide: int) -> tuple[tuple[str, int], ...]:
    """What variables and loads are limited to, in powers of two so that few differ; `wide`: bits of 64-bit loads."""
    import torch

    batch, heads, q_len, _ = launch.q.shape
    k_len, program, (q_slots, k_slots) = launch.k.shape[2], launch.program, slots(launch)
    limits = {"b": batch, "h": heads, "head": heads, "N": k_len, "Nq": q_len, "k": k_slots + BEYOND}
    limits["q"] = max(k_slots, abs(launch.q_offset) + q_slots) + BEYOND
    limits |= dict(zip(program.sizes(), program.size_values(k_len), strict=True))
    narrow = (torch.bool, torch.uint8, torch.int8, torch.int16)
    bits = [16 if load.dtype in narrow else 31 if load.dtype == torch.int32 else wide for load in launch.loads]
    found = {name: 1 << abs(n).bit_length() for name, n in limits.items()}
    return tuple((found | {f"_{i}": 2**b for i, b in enumerate(bits)}).items())


@functools.lru_cache(maxsize=4096)
def _magnitude(part: Expr | Pred, limits: tuple[tuple[str, int], ...]) -> int:
    return magnitude(part, dict(limits))


def magnitude(node: Expr | Pred, limits: Mapping[str, int]) -> int:
    """The largest absolute value that any part of an expression can take, given those of its variables and loads."""
    inner = functools.partial(magnitude, limits=limits)
    match node:
        case Var(name):
            return limits[name]
        case Load(source, index):
            return max([limits[source], *map(inner, index)])
        case Sum(const, terms):
            return abs(const) + sum(abs(c) * inner(atom) for c, atom in terms)
        case Mul(left, right):
            return inner(left) * inner(right)
        case FloorDiv(left, right) | Mod(left, right) | Min(left, right) | Max(left, right):
            # the printed floor_div and floor_mod also multiply back: never above the left side plus the right
            return inner(left) + inner(right)
        case Select(condition, then, other):
            return max(inner(condition), inner(then), inner(other))
        case And(parts) | Or(parts):
            return max(map(inner, parts), default=0)
        case Ge(part) | Eq(part) | Not(part):
            return inner(part)
        case Test(load):
            return inner(load)
        case Listed(index, count, _):  # what is in a list counts keys, which have their own limit
            return max(map(inner, (*index.index, *count.index)))
    raise TypeError(f"not an expression or a predicate: {node!r}")
