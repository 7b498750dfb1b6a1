"""Softmaxes, whatever they are spelled as: the operator, exp and a sum, exp of a log-softmax or of x - logsumexp(x)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.passes.forms.axes import EXPANDS, PERMUTES, Layout, flat, forward, resolved
from sparsify.passes.nodes import CASTS, COPIES, VIEWS, argument, op, scalar, shape

OPERATORS = ("softmax", "_softmax", "_safe_softmax", "special_softmax")
LOGARITHMS = ("log_softmax", "_log_softmax", "special_log_softmax")
HANDED_ON = (*CASTS, *COPIES)
RESHAPES = (*HANDED_ON, *VIEWS, *PERMUTES, *EXPANDS, "unsqueeze", "squeeze")


@dataclass
class Softmax:
    """exp(scores) / sum(exp(scores), dim).

    node: holds the weights; where `norm` is there and `divisor` is not, exp(scores), divided after a product.
    norm: the sums that exp(scores) are divided by; divisor: the node that they are divided by.
    sink: the logarithm of a number that is added to the sum: a sink's logit, or None.
    inside: the nodes that belong to the softmax itself.
    """

    node: fx.Node
    scores: Any
    dim: int
    spelling: str = "softmax"
    norm: Norm | None = None
    divisor: fx.Node | None = None
    sink: float | None = None
    inside: set[fx.Node] = field(default_factory=set)


def softmax(node: fx.Node) -> Softmax | None:
    """Reads a node as one that begins or is a softmax, or None. Of a spelling with several nodes only one is read."""
    name = op(node)
    if name in OPERATORS:
        return Softmax(node, node.args[0], argument(node, "dim") % max(len(shape(node)), 1))
    if name != "exp":
        return None
    inner = _behind(node.args[0])
    if op(inner) in LOGARITHMS:
        return Softmax(node, inner.args[0], argument(inner, "dim") % len(shape(inner)), "log_softmax > exp")
    return _minus_logsumexp(node, inner) or _divided(node)


def _behind(node: Any) -> Any:
    while op(node) in HANDED_ON:
        node = node.args[0]
    return node


def _minus_logsumexp(node: fx.Node, inner: Any) -> Softmax | None:
    if op(inner) != "sub" or argument(inner, "alpha", 1) != 1:
        return None
    found = _reduction(inner.args[1], ("logsumexp", "special_logsumexp"))
    if found is None or _behind(found[0].args[0]) is not _behind(inner.args[0]):
        return None
    return Softmax(node, inner.args[0], found[1], "sub(logsumexp) > exp")


def _reduction(node: Any, names: tuple[str, ...]) -> tuple[fx.Node, int] | None:
    """A reduction over one dimension that is kept or put back, and that dimension."""
    node, at = _behind(node), None
    while op(node) in ("expand", "expand_as", *HANDED_ON):
        node = node.args[0]
    if op(node) == "unsqueeze":
        at, node = argument(node, "dim") % len(shape(node)), _behind(node.args[0])
    if op(node) not in names:
        return None
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if len(dims) != 1:
        return None
    dim = dims[0] % len(shape(node.args[0]))
    kept = bool(argument(node, "keepdim"))
    return (node, dim) if (at is None if kept else at == dim) else None


def _divided(node: fx.Node) -> Softmax | None:
    """exp(x) that is divided by its own sum, at once or after a product."""
    held = _reached(node, HANDED_ON)
    totals = [user for one in held for user in one.users if op(user) == "sum"]
    dims = argument(totals[0], "dim") if len(totals) == 1 else None
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    dim = dims[0] % len(shape(node))
    bases = [(totals[0], 0.0)]
    bases += [(user, found) for one in _reached(totals[0], RESHAPES) for user in one.users if (found := _more(user))]
    for base, added in reversed(bases):
        sink = math.log(added) if added else None
        norm = Norm(base, totals[0])
        inside = {*held, *norm.nodes, *_reached(totals[0], RESHAPES)}
        for one in held:
            for user in one.users:
                if (divisor := norm.divisor(user, one)) is not None:
                    return Softmax(user, node.args[0], dim, "exp > div(sum)", norm, divisor, sink, inside)
        if any(user not in inside for one in norm.nodes for user in one.users):
            return Softmax(held[-1], node.args[0], dim, "exp", norm, None, sink, inside)
    return None


def _reached(node: fx.Node, names: tuple[str, ...]) -> list[fx.Node]:
    found = [node]
    for one in found:
        found += [user for user in one.users if op(user) in names and user.args[0] is one]
    return found


def _more(node: fx.Node) -> float | None:
    """The positive number that a node adds to something."""
    if op(node) != "add" or argument(node, "alpha", 1) != 1:
        return None
    found = [number for number in map(scalar, node.args[:2]) if isinstance(number, int | float) and number > 0]
    return float(found[0]) if found else None


class Norm:
    """The nodes that hold the sum of each row in any shape, and those that hold its reciprocal.

    total: the sum itself; base: it, or it and a number.
    """

    def __init__(self, base: fx.Node, total: fx.Node) -> None:
        self.total, self.reached = total, set(_reached(total, RESHAPES))
        self.nodes = _reached(base, RESHAPES)
        inverses = [user for one in self.nodes for user in one.users if op(user) == "reciprocal"]
        self.inverted = {one for inverse in inverses for one in _reached(inverse, RESHAPES)}
        self.nodes += self.inverted
        self.reached |= {*self.nodes, *inverses}

    def divisor(self, user: fx.Node, node: fx.Node) -> fx.Node | None:
        """By what `user` divides `node`, if that is the sum; or the reciprocal that it multiplies it with."""
        if op(user) in ("div", "true_divide", "divide") and argument(user, "rounding_mode") is None:
            by = user.args[1]
            return by if user.args[0] is node and by in self.nodes and by not in self.inverted else None
        found = [other for other in user.args if other in self.inverted] if op(user) == "mul" else []
        return found[0] if found and node in user.args else None

    def fits(self, divisor: fx.Node, exponentials: Layout, dim: int, divided: Layout) -> bool:
        """Whether each row is divided by its own sum: whether the divisor runs along `divided` over what the
        exponentials run over but for the dimension `dim`."""
        chain = [divisor]
        while chain[-1] is not self.total:
            chain.append(next(node for node in chain[-1].all_input_nodes if self._holds(node)))
        kept = len(shape(self.total)) == len(exponentials)
        start = (*exponentials[:dim], *([()] if kept else []), *exponentials[dim + 1 :])
        layout: Layout | None = start
        for node in reversed(chain[:-1]):
            if layout is not None and op(node) not in (*HANDED_ON, "add", "reciprocal"):
                layout = forward(node, layout)
        if layout is None or len(layout) > len(divided):
            return False
        layout, rows = ((),) * (len(divided) - len(layout)) + layout, flat(start)
        pairs = zip(resolved(layout), resolved(divided), strict=True)
        return all([a for a in ours if a in rows] == [a for a in theirs if a in rows] for ours, theirs in pairs)

    def _holds(self, node: fx.Node) -> bool:
        return node is self.total or node in self.reached
