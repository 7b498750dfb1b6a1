"""expr: any rule, written as an expression over h, q, k and N."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from sparsify.errors import PatternError
from sparsify.expr import Pred, constant
from sparsify.patterns.pattern import Pattern
from sparsify.sizes import LIMIT
from sparsify.text import parse_expr, parse_pred
from sparsify.walk import variables

MAX_LENGTH, MAX_DEPTH, MAX_COPIES = 4000, 40, 6


@dataclass(frozen=True)
class Expression(Pattern):
    """A predicate given as text."""

    text: str

    def keep(self) -> Pred:
        return parse_pred(self.text, sources=())

    def __str__(self) -> str:
        return f"expr({self.text!r})"


def expr(text: str) -> Pattern:
    """A rule such as `expr("k <= q and (q - k) % 7 < 2")`: comparisons, and / or / not, + - * // %, min, max, abs.

    The text is read through a whitelist and never run. A divisor must be positive: a number, or `max(..., 1)`. Raises
    PatternError naming whatever is not allowed.
    """
    if isinstance(text, str) and len(text) > MAX_LENGTH:
        raise PatternError(f"an expression of {len(text)} characters is longer than the {MAX_LENGTH} allowed")
    try:
        _check_size(text)
        names = variables(parse_pred(text, sources=()))
        _check_divisors(text)
    except (RecursionError, MemoryError):
        raise PatternError(f"expression '{text}': nested too deeply") from None
    for name in sorted(names & {"b", "Nq"}):
        raise PatternError(f"expression '{text}': a pattern can't depend on {name} (only on h, q, k and N)")
    return Expression(text)


def _check_size(text: str) -> None:
    """Refuses what would take long to read: depth, and the operations that copy their operands, inside each other."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, AttributeError):
        return  # the reader says what is wrong
    nodes: list[tuple[ast.AST, int, int]] = [(tree, 0, 0)]
    while nodes:
        node, depth, copies = nodes.pop()
        copies += isinstance(node, ast.Call) or (isinstance(node, ast.Compare) and len(node.ops) > 1)
        if depth > MAX_DEPTH or copies > MAX_COPIES:
            raise PatternError(f"expression '{text}': nested too deeply")
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value > LIMIT:
            raise PatternError(f"expression '{text}': {str(node.value)[:30]} is beyond 2**40")
        nodes += [(part, depth + 1, copies) for part in ast.iter_child_nodes(node)]


def _check_divisors(text: str) -> None:
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.FloorDiv | ast.Mod):
            continue
        args = (
            node.right.args
            if isinstance(node.right, ast.Call) and ast.unparse(node.right.func) == "max"
            else [node.right]
        )
        values = [constant(parse_expr(ast.unparse(arg), sources=())) for arg in args]
        if not any(value is not None and value > 0 for value in values):
            found = ast.unparse(node.right)
            raise PatternError(f"expression '{text}': the divisor '{found}' may be 0 or less; write max({found}, 1)")
