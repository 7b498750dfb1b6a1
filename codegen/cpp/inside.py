"""Expressions inside a key tile, which starts at a multiple of 64: what of them is the same for all of its keys.

Slots of a layout are taken apart by quotients and remainders (`k // 512`, `k % 64 // 8`). Inside a tile the quotients
by multiples of 64 stay what they are at its first key k0, such remainders go on with k, and the other digits depend on
the key's place in the tile alone, which is known when a kernel is printed.
"""

from __future__ import annotations

from sparsify.expr import Expr, FloorDiv, Mod, Mul, Pred, Sum, Var, as_expr, constant, floordiv, mod
from sparsify.walk import evaluate, loads, rewrite, substitute, variables

KEYS = 64  # of a tile
K, K0 = Var("k"), Var("k0")
SPAN = 600  # of the values of a table, at most: it has a word for each


def inside(node: Pred) -> Pred:
    """The node for keys of one tile, over k and k0."""

    def leaf(atom: Expr) -> Expr | None:
        if not isinstance(atom, FloorDiv | Mod) or "k" not in variables(atom.left):
            return None
        left = rewrite(atom.left, leaf)
        shift, size = left - K, constant(atom.right)
        if "k" in variables(shift) or not _whole(shift):
            return None
        if _whole(atom.right):
            same = floordiv(K0 + shift, atom.right)
            return same if isinstance(atom, FloorDiv) else K - K0 + (0 if size == KEYS else mod(K0 + shift, atom.right))
        if size is None or KEYS % size:
            return None
        if isinstance(atom, Mod):
            return mod(K - K0, size)
        return floordiv(K0 + shift, size) + floordiv(K - K0, size)

    return rewrite(node, leaf)


def _whole(expr: Expr) -> bool:
    """Whether an expression is a multiple of a tile's keys, as far as can be seen."""
    match expr:
        case Var("k0"):
            return True
        case Sum(const, terms):
            return const % KEYS == 0 and all(c % KEYS == 0 or _whole(atom) for c, atom in terms)
        case Mul(left, right):
            return _whole(left) or _whole(right)
    return False


def values(expr: Expr) -> tuple[tuple[int, ...], Expr] | None:
    """(value of each key of a tile, rest free of k), whose sum an expression is; None if that can't be said."""
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    with_k = [(c, atom) for c, atom in terms if "k" in variables(atom)]
    own = sum((atom * c for c, atom in with_k), start=as_expr(0))
    start = K0 * sum(c for c, atom in with_k if atom == K)
    places = substitute(own, {"k": Var("j") + K0}) - start
    if variables(places) != {"j"} or loads(places):
        return None
    each = tuple(int(evaluate(places, {"j": j})) for j in range(KEYS))
    return (each, expr - own + start) if max(each) - min(each) <= SPAN else None
