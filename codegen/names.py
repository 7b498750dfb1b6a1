"""Readable names of programs: what kernels, caches and stores of tuned kernels call them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.expr import TRUE, Pred, Sum, Var, constant
from sparsify.patterns.lists import lists

if TYPE_CHECKING:
    from sparsify.program import Program


def program_name(program: Program) -> str:
    """What is kept, and how scores are changed on the way: `causal_window512_bias`."""
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
    return "_".join(parts)


def size_name(head_dim: int, value_dim: int) -> str:
    """`d64`, or `d64v32` where the two differ."""
    return f"d{head_dim}" + (f"v{value_dim}" if value_dim != head_dim else "")


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
