"""Biases for people: `slopes[h] * (k - q)`, `table[h, k - q + 7] where causal`."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.bias import Bias, Term
from sparsify.expr import TRUE, Expr, Sum, as_expr
from sparsify.passes.masks.describe import Words


def describe_bias(bias: Bias, names: Sequence[str] = ()) -> str:
    """A bias as a sum of products; "" for none. `names` are those of the tensors that `_0`, `_1`, ... index."""
    words = Words(names)
    text = " + ".join(_term(term, words) for term in bias)
    return text.replace("+ -", "- ")


def _term(term: Term, words: Words) -> str:
    factors = [words.load(load) or str(load) for load in term.loads]
    if term.integer != as_expr(1):
        factors.append(_integer(term.integer, words))
    if not factors or term.factor not in (1.0, -1.0):
        factors.insert(0, f"{term.factor:g}")
    sign = "-" if term.factor == -1.0 and factors[0] != "-1" else ""
    where = "" if term.where == TRUE else f" where {words.text(term.where)}"
    return sign + " * ".join(factors) + where


def _integer(expr: Expr, words: Words) -> str:
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    const = expr.const if isinstance(expr, Sum) else 0
    text = words.sum([(c, atom) for c, atom in terms if c > 0], [(-c, atom) for c, atom in terms if c < 0])
    if const:
        text = f"{text} {'+' if const > 0 else '-'} {abs(const)}" if text else str(const)
    return f"({text})" if " " in text else text
