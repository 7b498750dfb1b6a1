"""Expressions, predicates, loads and biases as Triton: an op table, and how an element's place is written.

Inside the kernel `q` is (BLOCK_M, 1) or (BLOCK_M,), `k` is (1, BLOCK_N) and everything else a scalar, so what depends
on queries only or on keys only is computed on that shape, and only what depends on both on a whole tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.bias import Bias, Term
from sparsify.codegen.triton.summaries import Summary, of_keys
from sparsify.expr import (
    TRUE,
    And,
    Bound,
    Expr,
    FloorDiv,
    Ge,
    Load,
    Max,
    Min,
    Mod,
    Mul,
    Pred,
    Select,
    Sum,
    Test,
    Var,
    as_expr,
    constant,
)
from sparsify.patterns.tiles import BLOCK
from sparsify.program import Program
from sparsify.text import Printer
from sparsify.walk import variables

# Division and remainder truncate in Triton: `floor_div` and `floor_mod` are helpers in the skeleton.
OPS: Mapping[str, str] = {
    "var": "{0}",
    "const": "{0}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "scale": "{0} * {1}",
    "mul": "({0}) * ({1})",
    "floordiv": "floor_div({0}, {1})",
    "mod": "floor_mod({0}, {1})",
    "min": "tl.minimum({0}, {1})",
    "max": "tl.maximum({0}, {1})",
    "select": "tl.where({0}, {1}, {2})",
    "ge": "{0} >= {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": " & ",
    "or": " | ",
    "not": "({0} == 0)",
    "true": "True",
    "false": "False",
    "group": "({0})",
}
NEVER_NEGATIVE = (Var("b"), Var("h"), Var("head"), Var("k"))
Q, K = Var("q"), Var("k")
LARGEST = 3.4028234663852886e38  # of float32


@dataclass(frozen=True)
class Affine:
    """An index as scalar + q · queries + k · keys."""

    scalar: Expr
    q: int
    k: int


def affine(index: Expr) -> Affine | None:
    """The index in that form, or None where a position stands inside a product, a division, a load, ..."""
    const, terms = (index.const, index.terms) if isinstance(index, Sum) else (0, ((1, index),))
    scalar, factors = as_expr(const), {Q: 0, K: 0}
    for coefficient, atom in terms:
        if atom in factors:
            factors[atom] = coefficient
        elif rank(atom):
            return None
        else:
            scalar = scalar + atom * coefficient
    return Affine(scalar, factors[Q], factors[K])


def rank(node: Any) -> int:
    """What a node depends on: 0 neither rows (their queries, or heads where a tile has several) nor keys, 1 rows,
    2 keys, 3 both."""
    names = variables(node)
    return bool(names & {"q", "head"}) + 2 * ("k" in names)


def _natural(program: Program) -> frozenset[str]:
    """The variables that are known to be 0 at least where slots are taken apart into coordinates."""
    if program.queries is None and program.keys is None:
        return frozenset()
    queries = {"q", "q0", "q1"} if program.queries else set()
    return frozenset({"b", "h", "k", "k0", "k1", "N", "Nq"} | queries)


def _shift(divisor: Expr) -> int | None:
    """Of a power of two, by how many bits it shifts: as in a floored division, of negative numbers, too."""
    value = constant(divisor)
    return None if value is None or value < 1 or value & (value - 1) else value.bit_length() - 1


def _range(one: Pred, other: Pred) -> tuple[Expr, int] | None:
    """(x, limit) where two conditions on pairs say together that x is in 0..limit."""
    if not isinstance(one, Ge) or not isinstance(other, Ge) or rank(one.expr) != 3:
        return None
    limit = constant(one.expr + other.expr)
    plain = min(one.expr, other.expr, key=lambda expr: abs(expr.const) if isinstance(expr, Sum) else 0)
    return None if limit is None or not 0 <= limit < 2**31 else (plain, limit)


def never_negative(expr: Expr, natural: frozenset[str]) -> bool:
    """Whether an expression is 0 at least, as its parts show."""
    match expr:
        case Var(name):
            return name in natural
        case Sum(const, terms):
            return const >= 0 and all(c > 0 and never_negative(atom, natural) for c, atom in terms)
        case FloorDiv(left, right):
            return never_negative(left, natural) and constant(right) is not None
        case Mod(_, right):
            return constant(right) is not None
        case Select(_, then, other):
            return never_negative(then, natural) and never_negative(other, natural)
    return False


class TritonPrinter(Printer):
    """Prints sizes and loads by the names of the kernel's arguments, and makes tests of loads boolean.

    `wrapped` holds the indices over queries or keys that can be negative in a launch: those count from the end.
    """

    def __init__(self, program: Program, wrapped: frozenset[Expr] = frozenset()) -> None:
        super().__init__(OPS, self.leaf_text)
        self.sizes = {name: f"size_{i}" for i, name in enumerate(program.sizes())}
        self.wrapped = wrapped
        self.natural = _natural(program)
        self.rows: dict[Bound, tuple[str, str]] = {}  # the bounds that one query tile has: a name and a text

    def text(self, node: Any) -> str:
        match node:
            case Test(load):
                return f"({self.element(load)} != 0)"
            case And(parts):
                return self.op("group", self.ops["and"].join(self._conditions(parts))) if parts else self.op("true")
            case FloorDiv(left, right) if (shift := _shift(right)) is not None:
                return f"(({self.text(left)}) >> {shift})"
            case Mod(left, right) if _shift(right) is not None:
                return f"(({self.text(left)}) & {self.text(right - 1)})"
            case FloorDiv(left, right) if never_negative(left, self.natural) and constant(right):
                return f"(({self.text(left)}) // {self.text(right)})"
            case Mod(left, right) if never_negative(left, self.natural) and constant(right):
                return f"(({self.text(left)}) % {self.text(right)})"
        return super().text(node)

    def _conditions(self, parts: tuple[Pred, ...]) -> Iterator[str]:
        """The parts of a conjunction; `0 <= x` and `x <= limit` on whole tiles are one test of an unsigned number."""
        left = list(parts)
        while left:
            part = left.pop(0)
            other, found = next(((one, both) for one in left if (both := _range(part, one))), (None, None))
            if found is None:
                yield self.text(part)
            else:
                left.remove(other)
                yield f"(unsigned({self.text(found[0])}) <= {found[1]})"

    def _sum(self, terms: tuple[tuple[int, Expr], ...], const: int) -> str:
        """What depends on rows and what on keys first, each by itself, so that few operations take whole tiles."""
        of_keys = tuple(term for term in terms if rank(term[1]) == 2)
        others = tuple(term for term in terms if rank(term[1]) != 2)
        if len(terms) + bool(const) <= 2 or not of_keys or not others:
            return super()._sum(terms, const)
        sign = 1 if any(c > 0 for c, _ in of_keys) else -1
        keys = super()._sum(tuple(sorted(((sign * c, atom) for c, atom in of_keys), key=lambda term: term[0] < 0)), 0)
        others = tuple(sorted(others, key=lambda term: term[0] < 0))
        return self.op("add" if sign > 0 else "sub", f"({super()._sum(others, const)})", f"({keys})")

    def leaf_text(self, atom: Expr) -> str | None:
        if isinstance(atom, Load):
            return f"integer({self.element(atom)})"
        if isinstance(atom, Bound):
            return self._extreme(atom) if of_keys(atom) else self._row_bound(atom)
        return self.sizes.get(atom.name) if isinstance(atom, Var) else None

    def element(self, load: Load) -> str:
        """The element at its place."""
        place = self.place(load)
        return f"fetch({place}, within, MASKED)" if rank(load) >= 2 else f"tl.load({place})"

    def place(self, load: Load) -> str:
        """A pointer: the scalar parts of the place move it in 64 bits, the others are offsets inside a tile."""
        bases, offsets = [], []
        for axis, index in enumerate(load.index):
            base, offset = self._place(index, f"{load.source}_length_{axis}", f"{load.source}_stride_{axis}")
            bases, offsets = bases + base, offsets + offset
        return " + ".join([load.source, *bases] + ([f"({' + '.join(offsets)})"] if offsets else []))

    def _place(self, index: Expr, length: str, stride: str) -> tuple[list[str], list[str]]:
        """The scalar and the other parts of one index's offset; a negative index counts from the end, as in Python."""
        if not rank(index):
            return self._scalar_place(index, length, stride), []
        if index in self.wrapped:
            return [], [f"element({self.text(index)}, {length}, {stride}, OFFSETS)"]
        form = affine(index)
        if form is None:
            return [], [f"({self.text(index)}).to(OFFSETS) * {stride}"]
        scalar = form.scalar + Var("q0") * form.q
        bases = [] if constant(scalar) == 0 else [f"tl.cast({self.text(scalar)}, tl.int64) * {stride}"]
        rows = {0: "", 1: "(q - q0)", -1: "(q0 - q)"}.get(form.q, f"({form.q} * (q - q0))")
        keys = {0: "", 1: "k"}.get(form.k, f"({form.k} * k)")
        return bases, [f"{part}.to(OFFSETS) * {stride}" for part in (rows, keys) if part]

    def _scalar_place(self, index: Expr, length: str, stride: str) -> list[str]:
        value = constant(index)
        if value == 0:
            return []
        if value is not None:
            return [f"tl.cast({value if value > 0 else f'{length} - {-value}'}, tl.int64) * {stride}"]
        if index in NEVER_NEGATIVE:
            return [f"tl.cast({self.text(index)}, tl.int64) * {stride}"]
        return [f"element({self.text(index)}, {length}, {stride}, tl.int64)"]

    def _row_bound(self, bound: Bound) -> str:
        """A bound that all key tiles share, read before the first of them."""
        if bound not in self.rows:
            text = self._extreme(bound)  # first: other bounds may be in it
            self.rows[bound] = f"bound_{len(self.rows)}", text
        return self.rows[bound][0]

    def _extreme(self, bound: Bound) -> str:
        """A bound, from its summary."""
        load, axis = bound.load, bound.axis
        lengths = [f"{load.source}_length_{i}" for i in range(len(load.index))]
        indices = [self._scalar_index(index, length) for index, length in zip(load.index, lengths, strict=True)]
        outer, inner = _place(indices[:axis], lengths[:axis]), _place(indices[axis + 1 :], lengths[axis + 1 :])
        run = f"tl.cast({self.text(load.index[axis])}, tl.int64), tl.cast({self.text(bound.last)}, tl.int64)"
        size = " * ".join(lengths[axis + 1 :]) or "1"
        place = f"{Summary.of(bound).name}, {outer}, {inner}, {size}, {run}, {lengths[axis]}"
        return f"extreme({place}, {bound.greatest}, {_steps(bound)})"

    def _scalar_index(self, index: Expr, length: str) -> str:
        value = constant(index)
        if value is not None:
            return f"{value}" if value >= 0 else f"({length} - {-value})"
        return self.text(index) if index in NEVER_NEGATIVE else f"counted({self.text(index)}, {length})"

    def bias(self, bias: Bias, unit: float) -> str:
        """The sum of a bias's terms times `unit`, what is smaller than a tile first."""
        terms = sorted(((_term_rank(term), self._term(term, unit)) for term in bias), key=lambda found: found[0])
        return " + ".join(text for _, text in terms) or "0.0"

    def _term(self, term: Term, unit: float) -> str:
        whole = constant(term.integer)
        factor = _number(term.factor * unit * (1 if whole is None else whole))
        parts = [(rank(load), f"{self.element(load)}.to(tl.float32)") for load in term.loads]
        if whole is None:
            parts.append((rank(term.integer), f"tl.cast({self.number(term.integer)}, tl.float32)"))
        parts.sort(key=lambda found: found[0])
        factors = [text for _, text in parts]
        product = " * ".join(factors if factor == "1.0" and factors else [factor, *factors])
        return product if term.where == TRUE else f"tl.where({self.text(term.where)}, {product}, 0.0)"

    def number(self, expr: Expr) -> str:
        """An integer as NUMBERS, a float where that is exact: conversions are done on positions, not on whole tiles."""
        match expr:
            case _ if not rank(expr):
                return self.text(expr)
            case Var(name):
                return f"{name}_number"
            case Sum(const, terms):
                return self._number_sum(const, terms)
            case Mul(left, right):
                return self.op("mul", self.number(left), self.number(right))
            case Min(left, right):
                return self.op("min", self.number(left), self.number(right))
            case Max(left, right):
                return self.op("max", self.number(left), self.number(right))
            case Select(condition, then, other):
                return self.op("select", self.text(condition), self.number(then), self.number(other))
        return f"({self.text(expr)}).to(NUMBERS)"

    def _number_sum(self, const: int, terms: tuple[tuple[int, Expr], ...]) -> str:
        scalar = sum((atom * c for c, atom in terms if not rank(atom)), start=as_expr(const))
        parts = [] if constant(scalar) == 0 else [self.text(scalar)]
        for coefficient, atom in sorted(((c, a) for c, a in terms if rank(a)), key=lambda term: rank(term[1])):
            number = self.number(atom)
            parts.append({1: number, -1: f"-({number})"}.get(coefficient, f"{coefficient} * ({number})"))
        return f"({' + '.join(parts)})"


def _place(indices: list[str], lengths: list[str]) -> str:
    """The offset of scalar indices in contiguous memory."""
    place = "tl.cast(0, tl.int64)"
    for index, length in zip(indices, lengths, strict=True):
        place = f"({place} * {length} + {index})"
    return place


def _steps(bound: Bound) -> str:
    """How many blocks a run goes on to after its first, or which loop finds that out."""
    if not of_keys(bound):
        return "ONE_RUN"
    shift = constant(bound.load.index[bound.axis] - Var("k0"))
    if shift is None or shift < 0 or bound.last - Var("k1") != as_expr(shift):
        return "SEVERAL_RUNS"
    return f"(BLOCK_N - 1) // {BLOCK}" if shift == 0 else f"(BLOCK_N + {BLOCK - 2}) // {BLOCK}"


def _term_rank(term: Term) -> int:
    found = 0
    for part in (*term.loads, term.integer, term.where):
        found |= rank(part)
    return found


def _number(value: float) -> str:
    """A float32 constant; a finite one stays finite."""
    if math.isinf(value):
        return f'float("{value}")'
    return repr(min(max(float(value), -LARGEST), LARGEST))
