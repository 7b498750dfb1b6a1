"""Prints tile rules as C++: what a predicate does on a tile, and which keys each row of a partial tile keeps.

Rows are 64-bit masks, one bit a key. Linear bounds on k become shifts; what depends on keys only is computed once a
tile and what depends on the query only once a row, so divisions are rare even in strided and dilated patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparsify.expr import (
    And,
    Eq,
    Expr,
    FloorDiv,
    Ge,
    Load,
    Max,
    Min,
    Mod,
    Mul,
    Not,
    Or,
    Pred,
    Select,
    Sum,
    Test,
    Var,
    as_expr,
    conjunction,
    disjunction,
    eq,
    floordiv,
    maximum,
    minimum,
    mod,
    negate,
    select,
)
from sparsify.patterns.tiles import MAX_BANDS, Band, TileRule, analyse
from sparsify.program import Program
from sparsify.text import PYTHON, to_text
from sparsify.walk import variables

CPP: Mapping[str, str] = {
    **PYTHON,
    "mul": "mul({0}, {1})",
    "scale": "mul({0}_I, {1})",
    "floordiv": "floordiv({0}, {1})",
    "mod": "mod({0}, {1})",
    "min": "least({0}, {1})",
    "max": "most({0}, {1})",
    "select": "({0} ? {1} : {2})",
    "load": "load{0}(c, {1})",
    "and": " && ",
    "or": " || ",
    "not": "!{0}",
    "true": "true",
    "false": "false",
    "const": "{0}_I",
}
K, Q = "k", "q"
PARAMETERS = "const Call& c, I b, I h, I q0, I q1"
ROW_PARAMETERS = "const Call& c, I b, I h, I q0, I count, I k0, int keys, uint64_t* keep"


def print_rules(program: Program) -> str:
    """All functions that the driver calls on a rule's number: full_of, empty_of, bands_of and rows_of."""
    names = {"N": "c.k_len", "Nq": "c.q_len"}
    names |= {size: f"c.sizes[{i}]" for i, size in enumerate(program.sizes())}
    text = lambda node: to_text(node, CPP, lambda leaf: names.get(leaf.name) if isinstance(leaf, Var) else None)  # noqa: E731
    parts = [_load(source, rank) for source, rank in sorted(program.load_ranks().items())]
    for number, keep in enumerate(program.keep):
        parts.append(_rule(number, analyse(keep).without_data(), text))
    numbers = range(len(program.keep))
    tile = f"{PARAMETERS}, I k0, I k1"
    parts += [
        _dispatch("bool", "full_of", tile, numbers),
        _dispatch("bool", "empty_of", tile, numbers),
        _dispatch("int", "bands_of", f"{PARAMETERS}, Interval* to", numbers),
        _dispatch("void", "rows_of", ROW_PARAMETERS, numbers),
    ]
    return "\n\n".join(parts)


def max_bands(program: Program) -> int:
    """How many bands a rule of the program has at most."""
    found = max((len(analyse(keep).bands) for keep in program.keep), default=1)
    assert found <= MAX_BANDS
    return max(1, found)


def _load(source: str, rank: int) -> str:
    indices = "".join(f", I i{axis}" for axis in range(rank))
    place = " + ".join(f"place(from, {axis}, i{axis})" for axis in range(rank)) or "0"
    return (
        f"static inline I load{source}(const Call& c{indices}) {{\n"
        f"    const Source& from = c.loads[{source[1:]}];\n"
        f"    return element(from, {place});\n}}"
    )


def _dispatch(result: str, name: str, parameters: str, numbers: Sequence[int]) -> str:
    stem = name.removesuffix("_of")
    arguments = ", ".join(part.split()[-1] for part in parameters.split(","))
    cases = "".join(f"        case {n}: return {stem}{n}({arguments});\n" for n in numbers)
    last = "    __builtin_unreachable();\n"
    return f"static {result} {name}(int rule, {parameters}) {{\n    switch (rule) {{\n{cases}    }}\n{last}}}"


def _rule(number: int, rule: TileRule, text: Callable[[Expr | Pred], str]) -> str:
    tile = f"{PARAMETERS}, I k0, I k1"
    bands = "".join(f"    {_band(band, text)}\n" for band in rule.bands)
    return (
        f"// Rule {number} keeps: {to_text(rule.keep)}\n"
        f"static bool full{number}({tile}) {{ return {text(rule.full)}; }}\n"
        f"static bool empty{number}({tile}) {{ return {text(rule.empty)}; }}\n"
        f"static int bands{number}({PARAMETERS}, Interval* to) {{\n    int n = 0;\n{bands}    return n;\n}}\n"
        f"static void rows{number}({ROW_PARAMETERS}) {{\n{_Rows(text).body(rule.keep)}}}"
    )


def _band(band: Band, text: Callable[[Expr | Pred], str]) -> str:
    low = "0" if band.low is None else text(band.low)
    high = "c.k_len" if band.high is None else text(band.high)
    return f"if (!{text(band.unless)}) to[n++] = {{{low}, {high}}};"


class _Rows:
    """Collects what is computed once a tile and once a row, and prints the body of a rows function."""

    def __init__(self, text: Callable[[Expr | Pred], str]) -> None:
        self.text = text
        self.tile: list[str] = []
        self.row: list[str] = []
        self.slots: dict[Expr | Pred, str] = {}

    def body(self, keep: Pred) -> str:
        result = self.bits(keep)
        row = "".join(f"        {line}\n" for line in self.row)
        tile = "".join(f"    {line}\n" for line in self.tile)
        loop = f"        I q = q0 + n;\n{row}        keep[n] = {result};\n"
        return f"{tile}    for (I n = 0; n < count; n++) {{\n{loop}    }}\n"

    def bits(self, pred: Pred) -> str:
        """An expression of type uint64_t: bit j says whether key k0 + j is kept."""
        names = variables(pred)
        if K not in names:
            return f"({self.text(pred)} ? ~0ull : 0ull)"
        if Q not in names:
            return self.gathered(pred, self.tile, self.text(pred))
        match pred:
            case And(parts) | Or(parts):
                return "(" + (" & " if isinstance(pred, And) else " | ").join(map(self.bits, parts)) + ")"
            case Not(part):
                return "~" + self.bits(part)
            case Ge(expr):
                found = _linear(expr)
                if found is not None:
                    return self.threshold(*found)
        return self.gathered(pred, self.row, self.text(self.separate(pred)))

    def threshold(self, coefficient: int, rest: Expr) -> str:
        """coefficient * k + rest >= 0, where rest is free of k."""
        limit = self.text(floordiv(rest, abs(coefficient)))
        return f"keys_from({limit} + k0)" if coefficient > 0 else f"keys_to({limit} - k0)"

    def gathered(self, pred: Pred, lines: list[str], condition: str) -> str:
        if pred not in self.slots:
            name = self.slots[pred] = f"bits{len(self.slots)}"
            lines.append(f"uint64_t {name} = 0;")
            loop = f"{{ I k = k0 + j; {name} |= (uint64_t)({condition} ? 1 : 0) << j; }}"
            lines.append(f"for (int j = 0; j < keys; j++) {loop}")
        return self.slots[pred]

    def by_key(self, expr: Expr) -> Expr:
        """An expression free of q, computed once a tile."""
        if expr == Var(K) or not variables(expr):
            return expr
        if expr not in self.slots:
            name = f"x{len(self.slots)}"
            self.slots[expr] = f"{name}[j]"
            self.tile.append(f"I {name}[64];")
            self.tile.append(f"for (int j = 0; j < keys; j++) {{ I k = k0 + j; {name}[j] = {self.text(expr)}; }}")
        return Var(self.slots[expr])

    def by_row(self, expr: Expr) -> Expr:
        """An expression free of k, computed once a row."""
        if isinstance(expr, Var) or not variables(expr):
            return expr
        if expr not in self.slots:
            self.slots[expr] = f"y{len(self.slots)}"
            self.row.append(f"I {self.slots[expr]} = {self.text(expr)};")
        return Var(self.slots[expr])

    def separate(self, node: Expr | Pred) -> Expr | Pred:
        """The node for one key of one row, with everything that can be computed less often taken out."""
        go = self.separate
        if isinstance(node, Expr) and K not in variables(node):
            return self.by_row(node)
        if isinstance(node, Expr) and Q not in variables(node):
            return self.by_key(node)
        match node:
            case And(parts):
                return conjunction(map(go, parts))
            case Or(parts):
                return disjunction(map(go, parts))
            case Not(part):
                return negate(go(part))
            case Ge(expr):
                return go(expr) >= 0
            case Eq(expr):
                return eq(go(expr), 0)
            case Test(load):
                return Test(Load(load.source, tuple(map(go, load.index))))
            case Load(source, index):
                return Load(source, tuple(map(go, index)))
            case Sum():
                by_key, by_row, both = _parts(node)
                return sum((go(atom) * c for c, atom in both), start=self.by_key(by_key) + self.by_row(by_row))
            case FloorDiv(left, right) | Mod(left, right):
                return self.divided(node, left, right)
            case Mul(left, right):
                return go(left) * go(right)
            case Min(left, right):
                return minimum(go(left), go(right))
            case Max(left, right):
                return maximum(go(left), go(right))
            case Select(condition, then, other):
                return select(go(condition), go(then), go(other))
        raise TypeError(f"not an expression or a predicate: {node!r}")

    def divided(self, node: Expr, left: Expr, right: Expr) -> Expr:
        """(x + y) // d and (x + y) mod d from the quotients and remainders of x (by key) and y (by row)."""
        by_key, by_row, both = _parts(left)
        if both or variables(right) & {K, Q}:
            divide = floordiv if isinstance(node, FloorDiv) else mod
            return divide(self.separate(left), self.separate(right))
        rest = self.by_key(mod(by_key, right)) + self.by_row(mod(by_row, right))
        wraps, divisor = rest >= right, self.by_row(right)
        if isinstance(node, Mod):
            return select(wraps, rest - divisor, rest)
        return self.by_key(floordiv(by_key, right)) + self.by_row(floordiv(by_row, right)) + select(wraps, 1, 0)


def _parts(expr: Expr) -> tuple[Expr, Expr, list[tuple[int, Expr]]]:
    """A sum as (what depends on k but not on q, what is free of k, the terms with both)."""
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    by_key, by_row = as_expr(0), as_expr(expr.const if isinstance(expr, Sum) else 0)
    both = []
    for coefficient, atom in terms:
        names = variables(atom)
        if K not in names:
            by_row = by_row + atom * coefficient
        elif Q not in names:
            by_key = by_key + atom * coefficient
        else:
            both.append((coefficient, atom))
    return by_key, by_row, both


def _linear(expr: Expr) -> tuple[int, Expr] | None:
    """(coefficient, rest) if expr is coefficient * k + rest with rest free of k."""
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    coefficient = next((c for c, atom in terms if atom == Var(K)), 0)
    rest = expr - Var(K) * coefficient
    return (coefficient, rest) if coefficient and K not in variables(rest) else None
