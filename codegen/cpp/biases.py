"""Prints biases and sinks: what is added to a row of scores, in vectors of floats, and what starts a row's sum."""

from __future__ import annotations

from sparsify.bias import Bias, Term, variables
from sparsify.codegen.cpp.rows import LISTED_PARAMETERS, PARAMETERS, K, ListedRows, Q, Rows, linear
from sparsify.codegen.cpp.rules import Names, gathers
from sparsify.expr import TRUE, Expr, Load, Max, Min, Mul, Pred, Sum, as_expr, constant
from sparsify.program import Program
from sparsify.text import to_text
from sparsify.walk import rewrite
from sparsify.walk import variables as names_in

SHARE = 16  # several terms are summed in so many parts of a unit, so that finite ones have a finite sum


def print_biases(program: Program, names: Names) -> str:
    """The functions add_bias, add_bias_listed for keys from lists, and sink_of, where the program has such."""
    parts = []
    if program.bias:
        parts.append(_add_bias("add_bias", program.bias, PARAMETERS, _BiasRows(names)))
    if program.bias and gathers(program):
        parts.append(_add_bias("add_bias_listed", program.bias, LISTED_PARAMETERS, _ListedBiasRows(names)))
    if program.sink is not None:
        parts.append(_sink(program.sink, names))
    return "\n\n".join(parts)


def _add_bias(name: str, bias: Bias, parameters: str, rows: _BiasRows) -> str:
    """Fills a row of `add` for each query, and keeps what isn't -inf. Rows that are equal are filled once."""
    share = 1 if len(bias) == 1 else SHARE
    total = " + ".join(rows.term(term, share) for term in bias)
    fill = (
        "float* row = add + n * KB; "
        f"for (int v = 0; v < KB; v += W) *(AnyFloats*)(row + v) = {total}; "
        f"uint64_t left = finish_row(row, {share}); "
    )
    if Q in variables(bias):
        body = rows.loop(f"{fill}lines[n] = row; keep[n] &= left;")
    else:
        each = "for (I i = 0; i < count; i++) lines[i] = row, keep[i] &= left; break;"
        body = rows.loop(f"{fill}{each}")
    start = "    Floats lane;\n    for (int i = 0; i < W; i++) lane[i] = i;\n"
    parameters = f"{parameters}, float* add, const float** lines, uint64_t* keep"
    return f"// Adds: {_text(bias)}\nstatic void {name}({parameters}) {{\n{start}{body}}}"


def _sink(sink: Bias, names: Names) -> str:
    terms = [f"({names.text(t.where)} ? {_scalar(t.factor, t.loads, t.integer, names)} : 0)" for t in sink]
    total = " + ".join(terms) or "0.0"
    return (
        f"// Sinks: {_text(sink)}\nstatic float sink_of(const Call& c, I b, I h, I q) {{\n"
        f"    return rounded({total}) * LOG2E;\n}}"
    )


def _text(bias: Bias) -> str:
    parts = []
    for term in bias:
        factors = [repr(term.factor), *map(to_text, term.loads), f"({to_text(term.integer)})"]
        parts.append(" * ".join(factors) + ("" if term.where == TRUE else f" where {to_text(term.where)}"))
    return " + ".join(parts)


def _scalar(factor: float, loads: tuple[Load, ...], integer: Expr, names: Names) -> str:
    """A product for one query and no key, in double precision."""
    parts = [f"value{load.source}({', '.join(['c', *map(names.text, load.index)])})" for load in loads]
    if constant(integer) != 1:
        parts.append(f"(double)({names.text(integer)})")
    return " * ".join([_double(factor), *parts])


def _double(value: float) -> str:
    special = {"inf": "__builtin_inf()", "-inf": "-__builtin_inf()", "nan": '__builtin_nan("")'}
    return special.get(repr(value), repr(value))


class _BiasRows(Rows):
    """Rows whose elements are floats: expressions of type Floats for the keys v .. v + W - 1 of a tile."""

    def __init__(self, names: Names) -> None:
        super().__init__(names.text, names.keys)
        self.names = names

    def term(self, term: Term, share: int) -> str:
        """One term, divided by `share`."""
        free = tuple(load for load in term.loads if K not in names_in(load))
        whole = as_expr(1) if K in names_in(term.integer) else term.integer
        parts = [self.floats(load) for load in term.loads if load not in free]
        if K in names_in(term.integer):
            parts.append(self.vector(term.integer))
        scalar = _scalar(term.factor / share, free, whole, self.names)
        if not parts:
            parts = [f"(Floats{{}} + {self.number(scalar, (*free, whole))})"]
        elif scalar != "1.0":
            parts.append(self.number(scalar, (*free, whole)))
        product = " * ".join(parts)
        if term.where == TRUE:
            return f"({product})"
        name, new = self.slot(("where", term.where), "where")
        if new:
            bits = self.bits(term.where)
            self.row.append(f"uint64_t {name} = {bits};")
        return f"chosen({product}, {name}, v)"

    def number(self, value: str, parts: tuple[Expr | Pred, ...]) -> str:
        """A float that is the same for all keys of a row."""
        name, new = self.slot(("number", value), "f")
        if new:
            lines = self.row if any(Q in names_in(part) for part in parts) else self.tile
            lines.append(f"const float {name} = rounded({value});")
        return name

    def floats(self, load: Load) -> str:
        """The elements of a load, as they lie in memory where they can be read from there."""
        line = self.line(load)
        name, new = self.slot(("floats", load), "at")
        if new and line is not None:
            self.lines(load).append(f"float {name}_buffer[KB];")
            self.lines(load).append(f"const float* {name} = floats_of({line}, keys, {name}_buffer);")
        elif new:
            index = ", ".join(["c", *(self.text(self.element(part)) for part in load.index)])
            self.filled(self.lines(load), name, f"rounded(value{load.source}({index}))")
        return f"*(const AnyFloats*)({name} + v)"

    def vector(self, expr: Expr) -> str:
        """An integer expression as floats: exact up to 2**24."""
        if K not in names_in(expr):
            return f"(Floats{{}} + {self.number(f'(double)({self.text(expr)})', (expr,))})"
        found = linear(expr)
        if found is not None:
            return self.ramp(expr, *found)
        match expr:
            case Sum(const, terms):
                return "(" + " + ".join(f"{self.vector(atom)} * {c}.0f" for c, atom in terms) + f" + {const}.0f)"
            case Mul(left, right):
                return f"({self.vector(left)} * {self.vector(right)})"
            case Min(left, right) | Max(left, right):
                one, other = self.vector(left), self.vector(right)
                return f"({one} {'<' if isinstance(expr, Min) else '>'} {other} ? {one} : {other})"
        return self.by_element(expr)

    def ramp(self, expr: Expr, slope: int, rest: Expr) -> str:
        """slope * k + rest, where rest is free of k."""
        first = self.number(f"(double)({self.text(rest)} + {slope} * k0)", (rest,))
        return f"(lane * {slope}.0f + (v * {slope}.0f + {first}))"

    def by_element(self, expr: Expr) -> str:
        """An expression computed for one key after the other."""
        name, new = self.slot(("vector", expr), "i")
        if new:
            self.filled(self.lines(expr), name, f"(float)({self.text(self.element(expr))})")
        return f"*(const AnyFloats*)({name} + v)"

    def element(self, expr: Expr) -> Expr:
        """An expression for key j of a row, or of all rows, in terms of what is computed before."""
        return self.separate(expr) if Q in names_in(expr) else rewrite(expr, self.read)

    def of_row(self, expr: Expr) -> str:
        return self.text(expr)

    def filled(self, lines: list[str], name: str, value: str) -> None:
        lines.append(f"float {name}[KB] = {{}};")
        lines.append(self.each(f"{name}[j] = {value};"))


class _ListedBiasRows(ListedRows, _BiasRows):
    """The same for keys from a list."""

    def ramp(self, expr: Expr, slope: int, rest: Expr) -> str:
        return self.by_element(expr)
