"""Biases: what is added to scores, as sums of terms over positions and loads.

A term is `factor * load * load * ... * integer` where a predicate holds, and 0 elsewhere. That covers ALiBi
(`_0[h] * (k - q)`), T5 and other relative positions (`_0[h, k - q + Nq - 1]`), biases from tables and whole bias
tensors (`_0[b, h, q, k]`), and attention sinks (`_0[h]`). Terms are frozen and hashable, as expressions are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsify import walk
from sparsify.expr import TRUE, Expr, Load, Pred, as_expr
from sparsify.text import parse_expr, parse_pred, to_text


@dataclass(frozen=True)
class Term:
    """factor · Π loads · integer where `where` holds, else 0.

    loads: elements of floating (or other) tensors; the same indices as in predicates: b, h, q (absolute), k and scalars
    known at launch. An element may be -inf: that pair then counts as dropped.
    """

    factor: float = 1.0
    loads: tuple[Load, ...] = ()
    integer: Expr = as_expr(1)
    where: Pred = TRUE


Bias = tuple[Term, ...]


def rewrite(bias: Bias, leaf: Callable[[Expr], Expr | None]) -> Bias:
    """The bias with `leaf(atom)` in place of each variable or load for which it isn't None."""
    return tuple(
        Term(
            term.factor,
            tuple(walk.rewrite(load, leaf) for load in term.loads),
            walk.rewrite(term.integer, leaf),
            walk.rewrite(term.where, leaf),
        )
        for term in bias
    )


def substitute(bias: Bias, values: Mapping[str, Expr | int]) -> Bias:
    """The bias with variables replaced by name."""
    return tuple(
        Term(
            term.factor,
            tuple(walk.substitute(load, values) for load in term.loads),
            walk.substitute(term.integer, values),
            walk.substitute(term.where, values),
        )
        for term in bias
    )


def parts(bias: Bias) -> list[Expr | Pred]:
    """The expressions and predicates in a bias."""
    return [part for term in bias for part in (*term.loads, term.integer, term.where)]


def variables(bias: Bias) -> frozenset[str]:
    """The names of the variables in a bias."""
    return frozenset().union(*map(walk.variables, parts(bias)))


def loads(bias: Bias) -> list[Load]:
    """The distinct loads in a bias, those in indices and predicates included."""
    return list(dict.fromkeys(load for part in parts(bias) for load in walk.loads(part)))


def evaluate(bias: Bias, env: Mapping[str, Any]) -> Any:
    """The bias elementwise in float64 torch tensors: the definition that kernels are tested against.

    `env` is that of `sparsify.walk.evaluate`.
    """
    import torch

    total: Any = torch.zeros((), dtype=torch.float64)
    for term in bias:
        value = torch.as_tensor(walk.evaluate(term.integer, env), dtype=torch.float64) * term.factor
        for load in term.loads:
            value = value * torch.as_tensor(walk.evaluate(load, env)).double()
        if term.where != TRUE:
            value = torch.where(torch.as_tensor(walk.evaluate(term.where, env)), value, 0.0)
        total = total + value
    return total


def to_data(bias: Bias) -> list[dict[str, Any]]:
    """The bias as plain values, for JSON."""
    return [
        {
            "factor": term.factor,
            "loads": [to_text(load) for load in term.loads],
            "integer": to_text(term.integer),
            "where": to_text(term.where),
        }
        for term in bias
    ]


def from_data(data: Iterable[Mapping[str, Any]]) -> Bias:
    """Reads `to_data` back."""
    return tuple(
        Term(
            float(term["factor"]),
            tuple(map(parse_load, term["loads"])),
            parse_expr(term["integer"]),
            parse_pred(term["where"]),
        )
        for term in data
    )


def parse_load(text: str) -> Load:
    """Reads a load such as `_0[b, k]`."""
    load = parse_expr(text)
    assert isinstance(load, Load), text
    return load
