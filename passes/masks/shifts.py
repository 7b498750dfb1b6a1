"""Which few positions an element depends on: b, h, q or k alone, or q and k only through k - q."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from sparsify.expr import Expr, Load, Pred, Var, as_expr, constant
from sparsify.passes.masks.box import Box
from sparsify.passes.masks.values import Pieces, Tree
from sparsify.walk import loads, rewrite, variables

DISTANCE = "d"  # k - q


class Shifts:
    """Looks through loads that stand for elementwise operations (`trees`) at what their operands depend on."""

    def __init__(self, box: Box, trees: dict[Load, Tree]) -> None:
        self.box, self.trees = box, trees
        self._variables: dict[Any, frozenset[str]] = {}
        self._moves: dict[Any, bool] = {}

    def grid(self, element: Any) -> tuple[str, ...] | None:
        """The few variables that tell an element: some of b, h, and one of q, k and d = k - q. None: it takes more."""
        used = {name for name in self.variables(element) if not self._single(name)}
        if not used <= set("bhqk"):
            return None
        if used >= {"q", "k"}:
            if self.moves(element):
                return None
            used = used - {"q", "k"} | {DISTANCE}
        return tuple(name for name in "bhqkd" if name in used)

    def at(self, grid: tuple[str, ...]) -> dict[str, Expr]:
        """What to put in place of positions in an element over a grid."""
        singles = {name: as_expr(0) for name in "bhqk" if self._single(name)}
        return singles | ({"q": as_expr(0), "k": Var(DISTANCE)} if DISTANCE in grid else {})

    def _single(self, name: str) -> bool:
        size = self.box.size.get(name)
        return size is not None and constant(size) == 1

    def formulas(self, element: Any) -> Iterator[Expr | Pred]:
        """The expressions and predicates that an element is made of, loads that stand for operations as they are."""
        match element:
            case Expr() | Pred():
                yield element
            case Pieces(parts):
                yield from (where for _, where in parts)
            case Tree(operands=None):
                yield from element.index
            case Tree():
                for operand in element.operands or ():
                    if not isinstance(operand, fx.Node):
                        yield from self.formulas(operand)

    def variables(self, element: Any) -> frozenset[str]:
        """The names of the positions and scalars that an element depends on."""
        if element not in self._variables:
            found: set[str] = set()
            for formula in self.formulas(element):
                found |= self._of_formula(formula)
            self._variables[element] = frozenset(found)
        return self._variables[element]

    def _of_formula(self, formula: Expr | Pred) -> set[str]:
        inner: set[str] = set()

        def hide(leaf: Expr) -> Expr | None:
            if isinstance(leaf, Load) and leaf in self.trees:
                inner.update(self.variables(self.trees[leaf]))
                return as_expr(0)
            return None

        return set(variables(_hidden(formula, hide))) | inner

    def moves(self, element: Any) -> bool:
        """Whether an element may change where q and k go up by the same amount."""
        if element not in self._moves:
            self._moves[element] = any(map(self._formula_moves, self.formulas(element)))
        return self._moves[element]

    def _formula_moves(self, formula: Expr | Pred) -> bool:
        moved = [self.moves(self.trees[load]) for load in loads(formula) if load in self.trees]
        if any(moved):
            return True

        def still(leaf: Expr) -> Expr | None:
            if isinstance(leaf, Load) and leaf in self.trees:
                return leaf
            return leaf + Var("any") if leaf in (Var("q"), Var("k")) else None

        return rewrite(formula, still) != formula


def _hidden(formula: Expr | Pred, hide: Any) -> Expr | Pred:
    """The formula with loads replaced, where nothing folds away what else is in it."""
    kept: set[str] = set()

    def leaf(node: Expr) -> Expr | None:
        found = hide(node)
        if found is None and isinstance(node, Var):
            kept.add(node.name)
        return found

    rewrite(formula, leaf)
    total: Expr = as_expr(0)
    for name in kept:
        total = total + Var(name)
    return total
