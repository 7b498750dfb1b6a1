"""Symbolic sizes and scalars of a graph as expressions in N (keys), Nq (queries) and scalar loads."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from sparsify.expr import Expr, Load, Var, as_expr, constant, floordiv, maximum, minimum, mod
from sparsify.passes.masks.values import Opaque


class Scalars:
    """Turns ints, SymInts and their nodes into expressions.

    `shape` is (B, H, Q, K); a symbolic K is `N`, a symbolic Q is `Nq`, and a symbol in either is solved for where it
    occurs alone and with coefficient 1 (a cache length is N - Nq). Any other symbol must be the value of a node of the
    graph and becomes a load from it.
    """

    def __init__(self, graph: fx.Graph, shape: tuple[int | torch.SymInt, ...]) -> None:
        self.graph = graph
        self.known: dict[sympy.Symbol, Expr] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.low: dict[str, int] = {"N": 1, "Nq": 1}
        query, key = _sympy(shape[2]), _sympy(shape[3])
        self.solve(query, Var("Nq") if query != key else Var("N"))
        self.solve(key, Var("N"))
        for size, name in ((shape[0], "B"), (shape[1], "H")):
            self.solve(_sympy(size), self._held(_sympy(size)) or Var(name))
        self.fixed = {query: Var("Nq"), key: Var("N")} if query != key else {key: Var("N")}

    def solve(self, value: sympy.Expr, name: Expr) -> None:
        """Learns one symbol from `value == name`, if there is exactly one that isn't known yet and it is alone."""
        symbols = [s for s in value.free_symbols if s not in self.known]
        if len(symbols) != 1:
            return
        symbol = symbols[0]
        rest = sympy.expand(value - symbol)
        if symbol not in rest.free_symbols:
            self.known[symbol] = name - self.convert(rest)

    def read(self, value: Any) -> Expr:
        """An int, a SymInt, or a node that stands for one."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise Opaque(f"a scalar that is not an integer ({value!r})")
        return self.convert(_sympy(value))

    def convert(self, value: sympy.Expr) -> Expr:
        """A sympy expression of the shape environment as an expression."""
        if value.is_Integer:
            return as_expr(int(value))
        if value in getattr(self, "fixed", {}):
            return self.fixed[value]
        if value.is_Symbol:
            return self.known[value] if value in self.known else self._load(value)
        parts = [self.convert(part) for part in value.args]
        match type(value).__name__:
            case "Add":
                return sum(parts[1:], start=parts[0])
            case "Mul" | "Max" | "Min":
                join = {"Mul": lambda a, b: a * b, "Max": maximum, "Min": minimum}[type(value).__name__]
                total = parts[0]
                for part in parts[1:]:
                    total = join(total, part)
                return total
            case "Pow" if constant(parts[1]) in (2, 3):
                return parts[0] * parts[0] * (parts[0] if constant(parts[1]) == 3 else 1)
            case "FloorDiv" | "CleanDiv" if (constant(parts[1]) or 1) > 0:
                return floordiv(*parts)
            case "Mod" | "PythonMod" if (constant(parts[1]) or 1) > 0:
                return mod(*parts)
        raise Opaque(f"a size that is computed as {value}")

    def _load(self, symbol: sympy.Symbol) -> Expr:
        found = self._held(symbol)
        if found is None:
            raise Opaque(f"the size {symbol}, which no node of the graph holds")
        return found

    def _held(self, symbol: sympy.Expr) -> Expr | None:
        """A load from the node of the graph whose value is a symbol."""
        for node in self.graph.nodes:
            found = node.meta.get("val")
            if isinstance(found, torch.SymInt) and symbol.is_Symbol and found.node.expr == symbol:
                self.nodes[node.name] = node
                self.low[node.name] = _lowest(found, symbol)
                return Load(node.name, (as_expr(0),))
        return None


def _lowest(value: torch.SymInt, symbol: sympy.Symbol) -> int:
    """The least value that the shape environment allows (it adds guards for it)."""
    allowed = value.node.shape_env.var_to_range.get(symbol)
    return int(allowed.lower) if allowed is not None and allowed.lower.is_Integer else -(2**62)


def _sympy(value: int | torch.SymInt) -> sympy.Expr:
    return sympy.Integer(value) if isinstance(value, int) else value.node.expr
