"""Resolves what the element of a mask comes to: a predicate and bias terms, over loads of the smallest tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import fx

from sparsify.bias import Bias, Term
from sparsify.expr import FALSE, TRUE, And, Expr, Load, Pred, as_expr, conjunction, disjunction, eq, negate
from sparsify.passes.masks.elements import Elements
from sparsify.passes.masks.tables import table
from sparsify.passes.masks.values import CASTS, DROPPED, Opaque, Pieces, Tree, at_least_zero, whole
from sparsify.walk import loads, rewrite, variables

MAX_PRODUCT = 4  # terms that a product is multiplied out to
Lowered = tuple[Pred, Bias]


class Resolver:
    """Elements of one site's masks as what its program says.

    exact: take no integers for a mask of 0 and 1 (see `integer`); those that were are in `assumed`.
    """

    def __init__(self, el: Elements, shape: tuple[Any, ...], exact: bool) -> None:
        self.el, self.shape, self.exact = el, shape, exact
        self.assumed: dict[str, None] = {}
        self._tables: dict[Any, Load | None] = {}

    def resolved(self, node: Any) -> Any:
        """An expression or predicate over loads of tensors that are not over queries and keys, if possible."""
        return rewrite(node, self._load)

    def _load(self, load: Expr) -> Expr | None:
        if not isinstance(load, Load):
            return None
        inner = any(loads(part) for part in load.index)
        if not inner and (load not in self.el.trees or not self.spans(load.index)):
            return None
        return self._table(load) or Load(load.source, tuple(map(self.resolved, load.index)))

    def _table(self, element: Load | Tree) -> Load | None:
        """A load from a new, small tensor, if the element is told by few positions."""
        if element not in self._tables:
            grid = self.el.shifts.grid(element)
            try:
                self._tables[element] = None if grid is None else table(self.el, element, grid, self.shape)
            except Opaque:
                self._tables[element] = None
        return self._tables[element]

    def spans(self, index: tuple[Expr, ...]) -> bool:
        """Whether a tensor that is read at an index is one over queries and keys."""
        along = [part for part in index if variables(part) & {"q", "k"}]
        return len(along) > 1 or any(variables(part) >= {"q", "k"} and self.el.shifts.moves(part) for part in along)

    def added(self, element: Any, factor: float = 1.0) -> Lowered:
        """What factor * element does as an additive mask: what it keeps, and what it adds there. Raises Opaque."""
        if isinstance(element, bool | int | float):
            element = Pieces.of([(float(element), TRUE)])
        if isinstance(element, Pieces):
            return self.constants(element, factor)
        found = whole(element)
        if found is not None and math.isfinite(factor):
            return self.integer(found, factor)
        try:
            keep, terms = self.parts(element, factor)
        except Opaque:
            return TRUE, (self.atom(element, factor),)
        return self.joined(element, factor, keep, terms)

    def joined(self, tree: Tree, factor: float, keep: Pred, terms: Bias) -> Lowered:
        """One load in place of several, where the graph has, or needs, the sum of them as one tensor anyway."""
        if tree.node is None or tree.operands is None or tree.name in CASTS:
            return keep, terms
        small = not self.spans(tree.index) and keep == TRUE and any(term.loads for term in terms)
        large = [term for term in terms if any(self.spans(load.index) for load in term.loads)]
        if small or len(large) > 1:
            return keep, (self.atom(tree, factor),)
        return keep, terms

    def constants(self, pieces: Pieces, factor: float) -> Lowered:
        parts = [(value * factor if value else 0.0, self.resolved(where)) for value, where in pieces.parts]
        keep = disjunction(where for value, where in parts if not value <= DROPPED)
        return keep, tuple(Term(value, where=where) for value, where in parts if value and value > DROPPED)

    def integer(self, expr: Expr, factor: float) -> Lowered:
        """A whole number times a factor. With a factor that is a lot, a mask made of integers: (1 - mask) * min.

        Such integers are 0 or 1 by all that one knows. With others `exact` adds what the model would: about infinity.
        """
        expr = self.resolved(expr)
        if abs(factor) < -DROPPED:
            return TRUE, (Term(factor, integer=expr),)
        drops = expr if factor < 0 else -expr  # dropped where this is at least 1
        below = at_least_zero(-drops - 1, self.el.box)
        if below == FALSE:
            return at_least_zero(-drops, self.el.box), ()
        found = loads(expr)
        if self.exact or not found:
            return at_least_zero(-drops, self.el.box), (Term(factor, integer=expr, where=below),)
        self.assumed.update(dict.fromkeys(load.source for load in found))
        for load in found:  # what reads best for 0 and 1
            if drops == as_expr(1) - load:
                return negate(eq(load, 0)), ()
            if drops == load:
                return eq(load, 0), ()
        return at_least_zero(-drops, self.el.box), ()

    def parts(self, tree: Tree, factor: float) -> Lowered:
        """The parts that an element is the sum, the choice or the product of. Raises Opaque for other operations."""
        if tree.name == "choice":
            return self.choice(*(tree.operands or ()), factor)
        if tree.operands is None:
            raise Opaque("an element of a tensor")
        (first, *rest), kwargs = tree.arguments()
        if tree.name in CASTS:
            return self.added(first, factor)
        alpha = kwargs.get("alpha", 1) if len(rest) < 2 else rest[1]
        if any(isinstance(part, fx.Node) for part in (first, *rest, alpha)) or set(kwargs) - {"alpha"}:
            raise Opaque(tree.name)
        match tree.name:
            case "neg":
                return self.added(first, -factor)
            case "add":
                return self.sum(self.added(first, factor), self.added(rest[0], factor * alpha))
            case "sub":
                return self.sum(self.added(first, factor), self.added(rest[0], -factor * alpha))
            case "rsub" if alpha == 1:
                return self.sum(self.added(first, -factor), self.added(rest[0], factor))
            case "mul":
                return self.product(first, rest[0], factor)
            case "minimum" | "maximum":
                return self.extreme(tree.name, self.added(first, factor), self.added(rest[0], factor))
            case "div" if self.number(rest[0]) and not kwargs:
                return self.added(first, factor / (self.number(rest[0]) or 1.0))
        raise Opaque(tree.name)

    def choice(self, condition: Pred, then: Any, other: Any, factor: float) -> Lowered:
        yes = self.resolved(condition)
        no = negate(yes)
        (keep, terms), (keep_other, terms_other) = self.added(then, factor), self.added(other, factor)
        kept = disjunction([yes & keep, no & keep_other])
        if keep_other != FALSE and keep != FALSE:  # what is dropped anyway may be added to
            terms = tuple(replace(term, where=term.where & yes) for term in terms)
            terms_other = tuple(replace(term, where=term.where & no) for term in terms_other)
        return kept, (() if keep == FALSE else terms) + (() if keep_other == FALSE else terms_other)

    def sum(self, a: Lowered, b: Lowered) -> Lowered:
        return a[0] & b[0], a[1] + b[1]

    def extreme(self, name: str, a: Lowered, b: Lowered) -> Lowered:
        """Of two masks that add nothing where they keep."""
        if a[1] or b[1]:
            raise Opaque(name)
        return (a[0] & b[0] if name == "minimum" else a[0] | b[0]), ()

    def number(self, element: Any) -> float | None:
        """A finite number that is the same everywhere, and not 0."""
        if isinstance(element, Pieces) and len(element.parts) == 1:
            element = element.parts[0][0]
        if isinstance(element, bool) or not isinstance(element, int | float):
            return None
        return float(element) if math.isfinite(element) and element else None

    def product(self, left: Any, right: Any, factor: float) -> Lowered:
        for one, other in ((left, right), (right, left)):
            number = self.number(one)
            if number is not None:
                return self.added(other, factor * number)
        (keep, first), (keep_other, second) = self.added(left), self.added(right, factor)
        if keep != TRUE or keep_other != TRUE or len(first) * len(second) > MAX_PRODUCT:
            raise Opaque("a product")
        return TRUE, tuple(
            Term(a.factor * b.factor, a.loads + b.loads, a.integer * b.integer, a.where & b.where)
            for a in first
            for b in second
        )

    def atom(self, tree: Any, factor: float) -> Term:
        """One load: of the tensor that has the element, or of a smaller one that is made for it."""
        if not isinstance(tree, Tree) or tree.node is None:
            raise Opaque("a choice inside an operation")
        if tree.operands is None and not any(loads(part) for part in tree.index):
            return Term(factor, (Load(tree.node.name, tree.index or (as_expr(0),)),))
        found = self._table(tree) if tree.operands is None or self.spans(tree.index) else None
        if found is None:
            held = self.el.load(tree.node, tree.index)
            assert isinstance(held, Tree)
            found = Load(tree.node.name, tuple(map(self.resolved, held.index)) or (as_expr(0),))
        return Term(factor, (found,))


def simplified(keep: Pred, bias: Bias) -> Bias:
    """The terms without what `keep` says already, terms of equal value joined."""
    known = set(keep.parts) if isinstance(keep, And) else {keep}
    found: dict[Term, Pred] = {}
    for term in bias:
        parts = term.where.parts if isinstance(term.where, And) else (term.where,)
        where = conjunction(part for part in parts if part not in known)
        if conjunction([keep, where]) == keep:
            where = TRUE
        bare = replace(term, where=TRUE)
        found[bare] = found.get(bare, FALSE) | where
    return tuple(replace(term, where=where) for term, where in found.items() if where != FALSE)
