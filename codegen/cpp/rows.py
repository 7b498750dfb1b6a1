"""Prints what a row of a tile needs to know, key by key, as little of it as can be for each key.

What depends on keys only is computed once a tile and what depends on the query only once a row, so divisions are rare
even in strided and dilated patterns. Rows of predicates are 64-bit masks, one bit a key: linear bounds on k become
shifts, and loads whose indices go on with k are read 64 elements at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsify.codegen.cpp.inside import K0, KEYS, inside, values
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
from sparsify.walk import rewrite, variables

K, Q = "k", "q"
PARAMETERS = "const Call& c, I b, I h, I q0, I count, I k0, int keys"
LISTED_PARAMETERS = "const Call& c, I b, I h, I q0, I count, const int32_t* at, int keys"


class Rows:
    """Collects what is computed once a query tile, once a key tile and once a row. A tile's keys go on from k0."""

    key = "k0 + j"  # key j of a tile
    aligned = True  # whether that starts at a multiple of `KEYS`

    def __init__(self, text: Callable[[Expr | Pred], str], keys: int = KEYS) -> None:
        self.text, self.aligned = text, self.aligned and keys == KEYS
        self.query: list[Expr] = []
        self.tile: list[str] = []
        self.row: list[str] = []
        self.slots: dict[object, str] = {}

    def loop(self, last: str) -> str:
        """The body of a function: what is collected, and what is done last for each row."""
        return _indented(self.tile) + _each_row([*self.row, last])

    def prepare(self) -> str:
        """The body of a function that fills `y` with what rows need to know whatever the keys."""
        return _each_row([f"y[{i} * count + n] = {self.text(expr)};" for i, expr in enumerate(self.query)])

    def lines(self, node: Expr | Pred) -> list[str]:
        """Where what depends on the node's variables is computed."""
        return self.row if Q in variables(node) else self.tile

    def slot(self, key: object, prefix: str) -> tuple[str, bool]:
        """A name for what a key stands for, and whether it is new."""
        new = key not in self.slots
        if new:
            self.slots[key] = f"{prefix}{len(self.slots)}"
        return self.slots[key], new

    def line(self, load: Load) -> str | None:
        """The name of the line of elements that a load reads along a tile's keys, if its indices are linear in k."""
        parts = [linear(index) for index in load.index]
        if K not in variables(load) or None in parts:
            return None
        name, new = self.slot(("line", load), "line")
        if new:
            lines = self.lines(load)
            lines.append(f"Line {name}(c.loads[{load.source[1:]}], {len(parts)});")
            for axis, (coefficient, rest) in enumerate(parts):  # type: ignore[misc]
                first = self.text(rest + Var("k0") * coefficient)
                lines.append(f"{name}.along({axis}, {first}, {coefficient}, keys);")
        return name

    def bits(self, pred: Pred) -> str:
        """An expression of type uint64_t: bit j says whether key k0 + j is kept."""
        return self.bits_of(inside(pred) if self.aligned else pred)

    def bits_of(self, pred: Pred) -> str:
        """The same of a predicate over k and k0."""
        names = variables(pred)
        if K not in names:
            return f"({self.text(self.separate(pred) if Q in names else pred)} ? ~0ull : 0ull)"
        line = self.line(pred.load) if isinstance(pred, Test) else None
        if line is not None:
            name, new = self.slot(pred, "bits")
            if new:
                self.lines(pred).append(f"uint64_t {name} = bits_of({line}, keys);")
            return name
        found = linear(pred.expr) if isinstance(pred, Ge) else None
        if found is not None:
            return self.threshold(*found)
        of_keys = values(pred.expr) if self.aligned and isinstance(pred, Ge | Eq) else None
        if of_keys is not None:
            return self.looked_up(pred, *of_keys)
        if Q not in names and not isinstance(pred, And | Or | Not):
            return self.gathered(pred, self.tile, self.text(rewrite(pred, self.read)))
        pred = _split(pred)
        match pred:
            case And(parts) | Or(parts):
                return "(" + (" & " if isinstance(pred, And) else " | ").join(map(self.bits_of, parts)) + ")"
            case Not(part):
                return "~" + self.bits_of(part)
        found = self.separate(pred)
        by_row = variables(found) & {Q, *(name for name in self.slots.values() if name[0] == "y")}
        return self.gathered(pred, self.row, self.text(found), *(by_row - {Q} if len(by_row) == 1 else ()))

    def threshold(self, coefficient: int, rest: Expr) -> str:
        """coefficient * k + rest >= 0, where rest is free of k."""
        limit = floordiv(rest, abs(coefficient))
        if Q in variables(rest) and not all(isinstance(atom, Var) for _, atom in _terms(limit)):
            limit = self.separate(limit)
        return self.shared(self.side(coefficient > 0, self.text(limit)), rest)

    def looked_up(self, pred: Ge | Eq, of_keys: tuple[int, ...], rest: Expr) -> str:
        """of_keys[j] + rest >= 0, or == 0, where rest is free of k: a row of a table that is printed."""
        low, high = min(of_keys), max(of_keys)
        table, new = self.slot(("table", of_keys), "table")
        if new:
            words = (sum(1 << j for j, x in enumerate(of_keys) if x >= limit) for limit in range(low, high + 2))
            self.tile.append(f"static const uint64_t {table}[] = {{{', '.join(f'{word:#x}ull' for word in words)}}};")
        limit = -rest - low
        at = self.text(self.separate(limit) if Q in variables(rest) else limit)
        bits = [f"{table}[most(0_I, least({high - low + 1}_I, {at}{more}))]" for more in ("", " + 1")]
        return self.shared(bits[0] if isinstance(pred, Ge) else f"({bits[0]} & ~{bits[1]})", rest)

    def shared(self, bits: str, rest: Expr) -> str:
        """Bits that know of a row what `rest` says: computed once a tile if that is nothing."""
        if Q in variables(rest):
            return bits
        name, new = self.slot(bits, "bits")
        if new:
            self.tile.append(f"uint64_t {name} = {bits};")
        return name

    def side(self, upper: bool, limit: str) -> str:
        """The keys with limit + k >= 0, or with limit - k >= 0."""
        return f"keys_from({limit} + k0)" if upper else f"keys_to({limit} - k0)"

    def each(self, body: str) -> str:
        """A loop over a tile's keys."""
        return f"for (int j = 0; j < keys; j++) {{ I k = {self.key}; {body} }}"

    def gathered(self, pred: Pred, lines: list[str], condition: str, by_row: str | None = None) -> str:
        """Bits by a condition on each key. Rows share them where the condition knows one number of the row alone."""
        name, new = self.slot(pred, "bits")
        loop = f"{{ Bytes found; {self.each(f'found.of[j] = {condition};')} {name} = found.bits(); }}"
        if new and by_row:
            self.tile.append(f"Memory of_{name};")
            lines.append(f"uint64_t& {name} = of_{name}.bits_of({by_row});")
            lines.append(f"if (of_{name}.renew({by_row})) {loop}")
        elif new:
            lines += [f"uint64_t {name};", loop]
        return name

    def by_key(self, expr: Expr) -> Expr:
        """An expression free of q, computed once a tile."""
        if expr == Var(K) or not variables(expr):
            return expr
        if _negative(expr):
            return -self.by_key(-expr)
        line = self.line(expr) if isinstance(expr, Load) else None
        name, new = self.slot(expr, "x")
        if new:
            value = expr if line else rewrite(expr, self.read)
            fill = self.each(f"{name}[j] = {self.text(value)};")
            self.tile.append(f"I {name}[{KEYS}];")
            self.tile.append(fill if line is None else f"integers_of({line}, keys, {name});")
        return Var(f"{name}[j]")

    def by_tile(self, expr: Expr) -> Expr:
        """An expression of a tile's first key, computed once a tile."""
        if isinstance(expr, Var):
            return expr
        name, new = self.slot(expr, "s")
        if new:
            self.tile.append(f"const I {name} = {self.text(expr)};")
        return Var(name)

    def read(self, leaf: Expr) -> Expr | None:
        """A load that is free of q and linear in k, read once a tile."""
        return self.by_key(leaf) if isinstance(leaf, Load) and self.line(leaf) else None

    def by_row(self, expr: Expr) -> Expr:
        """An expression free of k, computed once a query tile."""
        if isinstance(expr, Var) or not variables(expr):
            return expr
        if _negative(expr):
            return -self.by_row(-expr)
        name, new = self.slot(expr, "y")
        if new:
            self.row.append(f"I {name} = {self.of_row(expr)};")
        return Var(name)

    def of_row(self, expr: Expr) -> str:
        """What is free of k for the current row."""
        self.query.append(expr)
        return f"y[{len(self.query) - 1} * count + n]"

    def separate(self, node: Expr | Pred) -> Expr | Pred:
        """The node for one key of one row, with everything that can be computed less often taken out."""
        go, names = self.separate, variables(node)
        if isinstance(node, Expr) and K not in names and K0.name not in names:
            return self.by_row(node)
        if isinstance(node, Expr) and Q not in names:
            return self.by_key(node) if K in names else self.by_tile(node)
        if isinstance(node, Var):
            return node
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
                start = self.by_tile if K not in variables(by_key) and variables(by_key) else self.by_key
                return sum((go(atom) * c for c, atom in both), start=start(by_key) + self.by_row(by_row))
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
        if both or variables(right) & {K, Q, K0.name}:
            divide = floordiv if isinstance(node, FloorDiv) else mod
            return divide(self.separate(left), self.separate(right))
        here = self.by_key if K in variables(by_key) else self.by_tile if variables(by_key) else self.by_row
        rest = here(mod(by_key, right)) + self.by_row(mod(by_row, right))
        wraps, divisor = rest >= right, self.by_row(right)
        if isinstance(node, Mod):
            return select(wraps, rest - divisor, rest)
        return here(floordiv(by_key, right)) + self.by_row(floordiv(by_row, right)) + select(wraps, 1, 0)


class ListedRows(Rows):
    """Rows of a tile whose keys come from a list: they are at[0], at[1], ..., ascending."""

    key = "at[j]"
    aligned = False

    def line(self, load: Load) -> str | None:
        return None

    def side(self, upper: bool, limit: str) -> str:
        return f"listed_{'from' if upper else 'to'}({limit}, at, keys)"


def _terms(expr: Expr) -> tuple[tuple[int, Expr], ...]:
    return expr.terms if isinstance(expr, Sum) else ((1, expr),)


def _negative(expr: Expr) -> bool:
    """Of an expression and its opposite, one is: then either is computed from the same numbers."""
    opposite = -expr
    return isinstance(expr, Sum) and (not isinstance(opposite, Sum) or repr(opposite) > repr(expr))


def _split(pred: Pred) -> Pred:
    """A bound on a maximum or a minimum of what depends on keys as bounds on both."""
    if not isinstance(pred, Ge):
        return pred
    for coefficient, atom in _terms(pred.expr):
        if isinstance(atom, Max | Min) and K in variables(atom):
            rest = pred.expr - atom * coefficient
            join = disjunction if (coefficient > 0) == isinstance(atom, Max) else conjunction
            return join(rest + side * coefficient >= 0 for side in (atom.left, atom.right))
    return pred


def _indented(lines: list[str], by: int = 4) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in lines)


def _each_row(lines: list[str]) -> str:
    return f"    for (I n = 0; n < count; n++) {{\n        I q = q0 + n;\n{_indented(lines, 8)}    }}\n"


def _parts(expr: Expr) -> tuple[Expr, Expr, list[tuple[int, Expr]]]:
    """A sum as (what depends on k, or a tile, but not on q, what is free of these, the terms with both)."""
    terms = _terms(expr)
    by_key, by_row = as_expr(0), as_expr(expr.const if isinstance(expr, Sum) else 0)
    both = []
    for coefficient, atom in terms:
        names = variables(atom)
        if not names & {K, K0.name}:
            by_row = by_row + atom * coefficient
        elif Q not in names:
            by_key = by_key + atom * coefficient
        else:
            both.append((coefficient, atom))
    return by_key, by_row, both


def linear(expr: Expr) -> tuple[int, Expr] | None:
    """(coefficient, rest) if expr is coefficient * k + rest with rest free of k; the coefficient may be 0."""
    coefficient = next((c for c, atom in _terms(expr) if atom == Var(K)), 0)
    rest = expr - Var(K) * coefficient
    return (coefficient, rest) if K not in variables(rest) else None
