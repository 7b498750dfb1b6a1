"""Drawn patterns and shapes, with each pattern's rule restated by hand in plain Python."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from sparsify import patterns as p
from sparsify.bias import Bias, Term
from sparsify.patterns import Pattern
from sparsify.text import parse_expr, parse_pred

# keep(h, q, k, n) in plain Python integers: what the constructors' docstrings promise, written a second time.
Rule = Callable[[int, int, int, int], bool]

sizes = st.integers(1, 40)


def elastic(divisor: int, plus: int) -> tuple[str, Callable[[int], int]]:
    """A size expression in N, and the same thing by hand."""
    return f"N/{divisor} + {plus}", lambda n: n // divisor + plus


@st.composite
def primitives(draw: st.DrawFn) -> tuple[Pattern, Rule]:
    """One constructor with drawn arguments, and its rule by hand."""
    a, b, c = draw(sizes), draw(sizes), draw(st.integers(-20, 20))
    text, length = elastic(draw(st.integers(1, 8)), draw(st.integers(0, 9)))
    positions = draw(st.lists(st.integers(0, 60), max_size=6))
    tall, wide = draw(st.integers(1, 5)), draw(st.integers(3, 7))

    def near(q: int, k: int) -> bool:  # a 3 wide window of one row, moved inward at the ends of the row
        first = min(max(q % wide - 1, 0), wide - 3)
        return 0 <= q < tall * wide > k and q // wide == k // wide and first <= k % wide < first + 3

    return draw(
        st.sampled_from(
            [
                (p.dense(), lambda h, q, k, n: True),
                (p.causal(), lambda h, q, k, n: k <= q),
                (p.window(a), lambda h, q, k, n: 0 <= q - k < a),
                (p.window(a, ahead=b), lambda h, q, k, n: -b <= q - k < a),
                (p.window(text), lambda h, q, k, n: 0 <= q - k < length(n)),
                (p.sinks(a), lambda h, q, k, n: k < a),
                (p.sinks(text), lambda h, q, k, n: k < length(n)),
                (p.dilated(a), lambda h, q, k, n: (q - k) % a == 0),
                (p.same_block(a), lambda h, q, k, n: q // a == k // a),
                (p.same_block(a, shift=c), lambda h, q, k, n: (q + c) // a == (k + c) // a),
                (p.block_window(a, b), lambda h, q, k, n: 0 <= q // a - k // a < b),
                (p.column_stride(a), lambda h, q, k, n: k % a == 0),
                (p.column_stride(a, block=b, offset=c), lambda h, q, k, n: (k // b + c) % a == 0),
                (p.column_stride(a, block=b, offset="head"), lambda h, q, k, n: (k // b + h) % a == 0),
                (p.global_tokens(positions), lambda h, q, k, n: q in positions or k in positions),
                (p.neighborhood([tall, wide], [1, 3]), lambda h, q, k, n: near(q, k)),
                (p.expr(f"(q - k) % {a} < {b} and k <= q"), lambda h, q, k, n: (q - k) % a < b and k <= q),
                (
                    p.expr(f"abs(q - k) * 2 <= min(q, k) + {a} + h"),
                    lambda h, q, k, n: abs(q - k) * 2 <= min(q, k) + a + h,
                ),
                (
                    p.expr(f"q * k % {a + 1} != {b} or N - k < {b}"),
                    lambda h, q, k, n: q * k % (a + 1) != b or n - k < b,
                ),
                (p.expr(f"k < ({a} if q > {b} else q // 2)"), lambda h, q, k, n: k < (a if q > b else q // 2)),
            ]
        )
    )


def composed() -> st.SearchStrategy[tuple[Pattern, Rule]]:
    """Compositions by &, | and ~ of primitives."""

    def extend(inner: st.SearchStrategy[tuple[Pattern, Rule]]) -> st.SearchStrategy[tuple[Pattern, Rule]]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda t: (t[0][0] & t[1][0], lambda h, q, k, n: t[0][1](h, q, k, n) and t[1][1](h, q, k, n))),
            pairs.map(lambda t: (t[0][0] | t[1][0], lambda h, q, k, n: t[0][1](h, q, k, n) or t[1][1](h, q, k, n))),
            inner.map(lambda t: (~t[0], lambda h, q, k, n: not t[1](h, q, k, n))),
        )

    return st.recursive(primitives(), extend, max_leaves=4)


# (q_len, k_len, q_offset): square, decode, longer keys, longer queries, chunks in the middle, before the first key.
shapes = st.one_of(
    st.integers(1, 70).map(lambda n: (n, n, None)),
    st.tuples(st.integers(1, 8), st.integers(8, 80)).map(lambda t: (*t, None)),
    st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(-30, 60)),
)


def term(factor: float = 1.0, loads: str = "", integer: str = "1", where: str = "True") -> Term:
    """A term by its texts; loads are apart by spaces."""
    read = tuple(parse_expr(load) for load in loads.split())
    return Term(factor, read, parse_expr(integer), parse_pred(where))  # type: ignore[arg-type]


# Biases over loads `_0` (H,), `_1` (H, Nq + Nk - 1), `_2` (B, Nk) and `_3` (B, H, Nq, Nk), with q from row 0.
BIASES: dict[str, Bias] = {
    "alibi": (term(loads="_0[h]", integer="k - q"),),
    "alibi both ways": (term(-1.0, "_0[h]", "max(k - q, q - k)"),),
    "relative": (term(loads="_1[h,k-q+Nq-1]"),),
    "key": (term(0.5, "_2[b,k]"),),
    "key in part": (term(2.0, "_2[b,k]", where="k <= q"), term(-1.5, where="k % 3 == 0")),
    "tensor": (term(loads="_3[b,h,q,k]"),),
    "sum": (term(loads="_1[h,k-q+Nq-1]"), term(loads="_3[b,0,q,k]"), term(0.1, integer="q // 4 - k // 4")),
    "product": (term(loads="_0[h] _2[b,k]", integer="k % 5"),),
}
SINKS: dict[str, Bias | None] = {
    "none": None,
    "by head": (term(loads="_0[h]"),),
    "by row": (term(loads="_1[h,q]"),),
    "constant": (term(0.0),),
}
