"""Walking expressions and predicates: rebuild, substitute, list what is in them, evaluate.

`evaluate` is the definition that tile analysis and kernels are tested against; it shares no code with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sparsify.errors import InputError
from sparsify.expr import (
    And,
    Bound,
    Chosen,
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
    Select,
    Sum,
    Test,
    Var,
    as_expr,
    conjunction,
    disjunction,
    eq,
    floordiv,
    maximum,
    minimum,
    mod,
    negate,
    select,
)  # fmt: skip


def rewrite(node: Any, leaf: Callable[[Expr], Expr | None]) -> Any:
    """The node rebuilt, with `leaf(atom)` in place of each variable, load, bound, quotient and remainder for which it
    isn't None."""
    go = lambda part: rewrite(part, leaf)  # noqa: E731
    match node:
        case Var():
            return leaf(node) or node
        case Load(source, index):
            return leaf(node) or Load(source, tuple(map(go, index)))
        case Bound(load, axis, last, greatest):
            return leaf(node) or Bound(go(load), axis, go(last), greatest)
        case Sum(const, terms):
            return sum((go(atom) * c for c, atom in terms), start=as_expr(const))
        case Mul(left, right):
            return go(left) * go(right)
        case FloorDiv(left, right):
            return leaf(node) or floordiv(go(left), go(right))
        case Mod(left, right):
            return leaf(node) or mod(go(left), go(right))
        case Min(left, right):
            return minimum(go(left), go(right))
        case Max(left, right):
            return maximum(go(left), go(right))
        case Select(condition, then, other):
            return select(go(condition), go(then), go(other))
        case And(parts):
            return conjunction(map(go, parts))
        case Or(parts):
            return disjunction(map(go, parts))
        case Ge(expr):
            return go(expr) >= 0
        case Eq(expr):
            return eq(go(expr), 0)
        case Not(part):
            return negate(go(part))
        case Test(load):
            return Test(go(load))
        case Listed(index, count, unit):
            return Listed(go(index), go(count), unit)
        case Chosen():
            return node
    raise TypeError(f"not an expression or a predicate: {node!r}")


def substitute(node: Any, values: Mapping[str, Expr | int]) -> Any:
    """The node with variables replaced by name."""
    found = {name: as_expr(value) for name, value in values.items()}
    return rewrite(node, lambda leaf: found.get(leaf.name) if isinstance(leaf, Var) else None)


def _leaves(node: Any) -> list[Expr]:
    """The variables, loads and bounds in a node, each before what is in it."""
    seen: dict[Any, None] = {}
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen[current] = None
            queue.extend(reversed(_parts(current)))
    return [leaf for leaf in seen if isinstance(leaf, Var | Load | Bound)]


def _parts(node: Any) -> tuple[Any, ...]:
    match node:
        case Load(_, parts) | And(parts) | Or(parts):
            return parts
        case Sum(_, terms):
            return tuple(atom for _, atom in terms)
        case Bound(load, _, last, _):
            return load, last
        case Var() | Chosen():
            return ()
        case Listed(index, count, _):
            return index, count, Var("k")
    return tuple(getattr(node, name) for name in node.__match_args__)


@functools.lru_cache(maxsize=16384)
def variables(node: Any) -> frozenset[str]:
    """The names of the variables in a node."""
    return frozenset(leaf.name for leaf in _leaves(node) if isinstance(leaf, Var))


def loads(node: Any) -> list[Load]:
    """The distinct loads in a node, in order of appearance."""
    return [leaf for leaf in _leaves(node) if isinstance(leaf, Load)]


def data_bounds(node: Any) -> list[Bound]:
    """The distinct bounds on ranges of loads in a node, in order of appearance."""
    return [leaf for leaf in _leaves(node) if isinstance(leaf, Bound)]


def evaluate(node: Any, env: Mapping[str, Any]) -> Any:
    """The node's value by elementwise evaluation: the definition that everything else is tested against.

    `env` gives an int or a broadcastable integer tensor (torch or numpy) for each variable and, for each load, a
    tensor under its source name. Python ints give a Python int or bool.
    """
    return _evaluated(node, env, {})


def _evaluated(node: Any, env: Mapping[str, Any], known: dict[Any, int]) -> Any:
    """`known` has the numbers of what was evaluated before, since tile rules say many things twice; no tensors."""
    found = known.get(node)
    if found is None:
        found = _value(node, env, lambda part: _evaluated(part, env, known))
        if isinstance(found, int):
            known[node] = found
    return found


def _value(node: Any, env: Mapping[str, Any], go: Callable[[Any], Any]) -> Any:
    match node:
        case Var(name):
            return env[name]
        case Load(source, index):
            return _widened(env[source][tuple(map(go, index))])
        case Bound(load, axis, last, greatest):
            return _bound(env[load.source], [go(part) for part in load.index], axis, go(last), greatest)
        case Sum(const, terms):
            return sum((c * go(atom) for c, atom in terms), start=const)
        case Mul(left, right):
            return go(left) * go(right)
        case FloorDiv(left, right):
            return go(left) // go(right)
        case Mod(left, right):
            return go(left) % go(right)
        case Min(left, right):
            return _where(go(left) <= go(right), go(left), go(right))
        case Max(left, right):
            return _where(go(left) >= go(right), go(left), go(right))
        case Select(condition, then, other):
            return _where(go(condition), go(then), go(other))
        case And(parts):
            return _fold(map(go, parts), True, lambda a, b: a & b)
        case Or(parts):
            return _fold(map(go, parts), False, lambda a, b: a | b)
        case Ge(expr):
            return go(expr) >= 0
        case Eq(expr):
            return go(expr) == 0
        case Not(part):
            value = go(part)
            return not value if isinstance(value, bool) else ~value
        case Test(load):
            value = go(load)
            return value if isinstance(value, bool) else value != 0
        case Chosen():
            raise InputError("what a selection keeps is known with queries and keys only, so it has no mask by itself")
        case Listed(index, count, unit):
            places = [go(part) for part in index.index[:-1]]
            return _listed(env[index.source], env[count.source], places, go(Var("k")) // unit)
    raise TypeError(f"not an expression or a predicate: {node!r}")


def _listed(index: Any, count: Any, places: list[Any], unit: Any) -> Any:
    """Whether a unit is in the list at these places, by a table of all lists and units (torch tensors only)."""
    import torch

    unit = torch.as_tensor(unit)
    used = torch.arange(index.shape[-1]) < count.cpu()[..., None]
    units = 1 + int(max([unit.max(), *index.cpu()[used]], default=0)) if unit.numel() else 1
    table = torch.zeros(*index.shape[:-1], units + 1, dtype=torch.bool)
    table.scatter_(-1, torch.where(used, index.cpu().long(), units), True)
    return table.to(index.device)[(*places, unit.to(index.device))]


def _bound(source: Any, index: list[int], axis: int, last: int, greatest: bool) -> int:
    size, first = source.shape[axis], index[axis]
    run = slice(0, size) if first < 0 else slice(min(first, size - 1), min(last, size - 1) + 1)
    found = source[(*index[:axis], run, *index[axis + 1 :])]
    return int(found.max() if greatest else found.min())


def _widened(value: Any) -> Any:
    """Integers of a tensor as int64, in which expressions are computed: a uint8 difference must not wrap around."""
    if str(getattr(value, "dtype", "")).removeprefix("torch.") not in ("uint8", "int8", "int16", "int32"):
        return value
    return value.long() if hasattr(value, "numpy") else value.astype("int64")


def _fold(values: Iterable[Any], start: bool, join: Callable[[Any, Any], Any]) -> Any:
    result: Any = start
    for value in values:
        result = value if isinstance(result, bool) and result == start else join(result, value)
    return result


def _where(condition: Any, then: Any, other: Any) -> Any:
    if isinstance(condition, bool):
        return then if condition else other
    if hasattr(condition, "numpy"):
        import torch

        return torch.where(condition, then, other)
    import numpy

    return numpy.where(condition, then, other)
