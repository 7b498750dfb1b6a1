"""Expressions and predicates as text, and back: Python's own syntax, read through an AST whitelist, never run.

    >>> parse_pred("k <= q and (k < 4 or q - k < size('N/8 + 512'))")

Printing is by an op table, which a target's printer overrides with its own language (`codegen`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sparsify.errors import PatternError, nearest
from sparsify.expr import (
    FALSE,
    TRUE,
    And,
    Bound,
    Chosen,
    Eq,
    Expr,
    FloorDiv,
    Ge,
    Listed,
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
    constant,
    disjunction,
    eq,
    floordiv,
    maximum,
    minimum,
    mod,
    negate,
    select,
)  # fmt: skip

POSITIONS = ("b", "h", "q", "k", "N", "Nq")
OF_PATTERNS = ("h", "q", "k", "N")  # what a user's pattern may depend on

PYTHON: Mapping[str, str] = {
    "var": "{0}",
    "const": "{0}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "scale": "{0}*{1}",
    "mul": "({0})*({1})",
    "floordiv": "({0})//({1})",
    "mod": "({0}) % ({1})",
    "min": "min({0}, {1})",
    "max": "max({0}, {1})",
    "select": "({1} if {0} else {2})",
    "load": "{0}[{1}]",
    "run": "{0}:{1}",
    "chosen": "chosen({0!r})",
    "listed": "listed({0}, {1}, {2})",
    "ge": "{0} >= {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": " and ",
    "or": " or ",
    "not": "not {0}",
    "true": "True",
    "false": "False",
    "group": "({0})",
}


def to_text(
    node: Expr | Pred, ops: Mapping[str, str] = PYTHON, leaf: Callable[[Expr], str | None] | None = None
) -> str:
    """The node in the language of an op table; `leaf(atom)`, where it isn't None, names a variable or a load."""
    if ops is PYTHON and leaf is None:
        return _plain(node)
    return Printer(ops, leaf or _no_name).text(node)


def _no_name(atom: Expr) -> None:
    """No leaf has a name of its own."""


@functools.lru_cache(maxsize=4096)
def _plain(node: Expr | Pred) -> str:
    return Printer(PYTHON, _no_name).text(node)


class Printer:
    """Prints nodes by an op table; subclasses print some kinds of nodes their own way."""

    def __init__(self, ops: Mapping[str, str], leaf: Callable[[Expr], str | None]) -> None:
        self.ops, self.leaf = ops, leaf

    def op(self, name: str, *parts: Any) -> str:
        return self.ops[name].format(*parts)

    def text(self, node: Any) -> str:
        match node:
            case Var(name):
                return self.leaf(node) or self.op("var", name)
            case Load(source, index):
                return self.leaf(node) or self.op("load", source, ", ".join(map(self.text, index)))
            case Bound():
                return self.leaf(node) or self._bound(node)
            case Sum():
                return self._sum(node.terms, node.const)
            case Mul(left, right):
                return self.op("mul", self.text(left), self.text(right))
            case FloorDiv(left, right):
                return self.op("floordiv", self.text(left), self.text(right))
            case Mod(left, right):
                return self.op("mod", self.text(left), self.text(right))
            case Min(left, right):
                return self.op("min", self.text(left), self.text(right))
            case Max(left, right):
                return self.op("max", self.text(left), self.text(right))
            case Select(condition, then, other):
                return self.op("select", self.text(condition), self.text(then), self.text(other))
            case And(parts):
                return self._joined(parts, "and", "true")
            case Or(parts):
                return self._joined(parts, "or", "false")
            case Ge(expr):
                return self._comparison("ge", expr)
            case Eq(expr):
                return self._comparison("eq", expr)
            case Not(Eq(expr)):
                return self._comparison("ne", expr)
            case Not(part):
                return self.op("not", self.text(part))
            case Test(load):
                return self.text(load)
            case Chosen(text):
                return self.op("chosen", text)
            case Listed(index, count, unit):
                return self.op("listed", *map(self.text, (index, count, floordiv(Var("k"), unit))))
        raise TypeError(f"not an expression or a predicate: {node!r}")

    def _bound(self, bound: Bound) -> str:
        """As the least or the greatest element of a slice."""
        index = [self.text(part) for part in bound.load.index]
        index[bound.axis] = self.op("run", index[bound.axis], self.text(bound.last + 1))
        return f"{'max' if bound.greatest else 'min'}({self.op('load', bound.load.source, ', '.join(index))})"

    def _sum(self, terms: tuple[tuple[int, Expr], ...], const: int) -> str:
        if not terms:
            return self.op("const", const)
        text = ""
        for coefficient, atom in terms:
            size = abs(coefficient)
            part = self.text(atom) if size == 1 else self.op("scale", size, self.op("group", self.text(atom)))
            if not text:
                text = part if coefficient > 0 else self.op("sub", self.op("const", 0), part)
            else:
                text = self.op("add" if coefficient > 0 else "sub", text, part)
        if const:
            text = self.op("add" if const > 0 else "sub", text, self.op("const", abs(const)))
        return text

    def _comparison(self, name: str, expr: Expr) -> str:
        terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
        const = expr.const if isinstance(expr, Sum) else 0
        if _leading(terms) < 0:
            terms, const = tuple((-c, atom) for c, atom in terms), -const
            name = "le" if name == "ge" else name
        terms = tuple(sorted(terms, key=lambda term: term[0] < 0))
        return self.op("group", self.op(name, self._sum(terms, 0), self.op("const", -const)))

    def _joined(self, parts: tuple[Pred, ...], joiner: str, empty: str) -> str:
        if not parts:
            return self.op(empty)
        return self.op("group", self.ops[joiner].join(map(self.text, parts)))


def _leading(terms: tuple[tuple[int, Expr], ...]) -> int:
    """The coefficient that should print as positive: that of q where it occurs, else the first."""
    return next((c for c, atom in terms if atom == Var("q")), terms[0][0])


def size_var(text: str) -> Var:
    """The variable that stands for a size expression in N, evaluated on the host at launch (`sparsify.sizes`)."""
    return Var(f"size({text!r})")


def parse_pred(text: str, sources: tuple[str, ...] | None = None) -> Pred:
    """Reads a predicate over b, h, q, k, N, Nq: comparisons, and/or/not, + - * // %, min, max, abs, `a if c else b`.

    `sources` names the tensors that may be indexed (any, when None; none, where a user's pattern is read). Raises
    PatternError naming what is not allowed.
    """
    node = _Reader(text, sources).read(_parse(text))
    if isinstance(node, Load):
        return Test(node)
    if not isinstance(node, Pred):
        raise PatternError(f"expression '{text}': expected a condition such as 'k <= q', found a number")
    return node


def parse_expr(text: str, sources: tuple[str, ...] | None = None) -> Expr:
    """Reads an integer expression, in the same language as `parse_pred`."""
    node = _Reader(text, sources).read(_parse(text))
    if not isinstance(node, Expr):
        raise PatternError(f"expression '{text}': expected a number, found a condition")
    return node


def _parse(text: str) -> ast.expr:
    if not isinstance(text, str):
        raise PatternError(f"expected an expression as text, found {text!r}")
    if len(text) > 100_000:
        raise PatternError(f"an expression of {len(text)} characters is longer than the 100000 allowed")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PatternError(f"expression '{text}': not an expression") from None


_COMPARE: dict[type, Callable[[Expr, Expr], Pred]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: eq,
    ast.NotEq: lambda a, b: negate(eq(a, b)),
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: floordiv,
    ast.Mod: mod,
}
_CALLS = {"min": minimum, "max": maximum}


class _Reader:
    """Turns whitelisted Python syntax into expressions; everything else is refused by name."""

    def __init__(self, text: str, sources: tuple[str, ...] | None) -> None:
        self.text, self.sources = text, sources
        self.names = OF_PATTERNS if sources == () else POSITIONS

    def fail(self, what: str) -> PatternError:
        return PatternError(f"expression '{self.text}': {what}")

    def read(self, node: ast.expr) -> Expr | Pred:
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is None:
            what = f"(only arithmetic and comparisons of {', '.join(self.names)})"
            raise self.fail(f"'{ast.unparse(node)}' is not allowed {what}")
        try:
            return method(node)
        except ValueError as error:
            if isinstance(error, PatternError):
                raise
            raise self.fail(str(error)) from None

    def number(self, node: ast.expr) -> Expr:
        value = self.read(node)
        if not isinstance(value, Expr):
            raise self.fail(f"'{ast.unparse(node)}' is a condition where a number is needed")
        return value

    def condition(self, node: ast.expr) -> Pred:
        value = self.read(node)
        if isinstance(value, Load):
            return Test(value)
        if not isinstance(value, Pred):
            raise self.fail(f"'{ast.unparse(node)}' is a number where a condition is needed")
        return value

    def _constant(self, node: ast.Constant) -> Expr | Pred:
        if isinstance(node.value, bool):
            return TRUE if node.value else FALSE
        if isinstance(node.value, int):
            return as_expr(node.value)
        raise self.fail(f"{node.value!r} is not allowed (only integers)")

    def _name(self, node: ast.Name) -> Expr:
        scalar = node.id.startswith("_") and self.sources != ()  # a launch's own; a user's pattern has none
        if node.id not in POSITIONS and not scalar:
            raise self.fail(f"unknown name '{node.id}'; {nearest(node.id, self.names)}")
        return Var(node.id)

    def _unaryop(self, node: ast.UnaryOp) -> Expr | Pred:
        if isinstance(node.op, ast.USub):
            return -self.number(node.operand)
        if isinstance(node.op, ast.UAdd):
            return self.number(node.operand)
        return negate(self.condition(node.operand))

    def _binop(self, node: ast.BinOp) -> Expr | Pred:
        if isinstance(node.op, ast.BitAnd):
            return self.condition(node.left) & self.condition(node.right)
        if isinstance(node.op, ast.BitOr):
            return self.condition(node.left) | self.condition(node.right)
        build = _BINARY.get(type(node.op))
        if build is None:
            raise self.fail(f"'{ast.unparse(node)}' is not allowed (use + - * // %)")
        return build(self.number(node.left), self.number(node.right))

    def _boolop(self, node: ast.BoolOp) -> Pred:
        join = conjunction if isinstance(node.op, ast.And) else disjunction
        return join([self.condition(value) for value in node.values])

    def _compare(self, node: ast.Compare) -> Pred:
        sides = [self.number(side) for side in [node.left, *node.comparators]]
        builders = [_COMPARE.get(type(op)) for op in node.ops]
        if None in builders:
            raise self.fail(f"'{ast.unparse(node)}' is not allowed (use < <= > >= == !=)")
        return conjunction(build(a, b) for build, a, b in zip(builders, sides, sides[1:], strict=False))

    def _ifexp(self, node: ast.IfExp) -> Expr:
        return select(self.condition(node.test), self.number(node.body), self.number(node.orelse))

    def _subscript(self, node: ast.Subscript) -> Expr:
        if not isinstance(node.value, ast.Name) or (self.sources is not None and node.value.id not in self.sources):
            raise self.fail(f"'{ast.unparse(node)}' is not allowed (a pattern can't index a tensor)")
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return Load(node.value.id, tuple(map(self.number, parts)))

    def _list(self, index: Expr, count: Expr, unit: Expr) -> Pred:
        size = constant(unit.right) if isinstance(unit, FloorDiv) else 1
        if not isinstance(index, Load) or not isinstance(count, Load) or size is None:
            raise self.fail("a list is listed(index[..., 0], count[...], k // unit)")
        return Listed(index, count, size)

    def _call(self, node: ast.Call) -> Expr | Pred:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if node.keywords:
            raise self.fail(f"'{ast.unparse(node)}': keywords are not allowed")
        if name == "size" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
            from sparsify.sizes import Size

            return Size.read(node.args[0].value).expr()
        if name == "chosen" and self.sources != () and isinstance(node.args[0], ast.Constant):
            return Chosen(str(node.args[0].value))
        if name == "listed" and self.sources != () and len(node.args) == 3:
            return self._list(*map(self.number, node.args))
        if name == "abs" and len(node.args) == 1:
            value = self.number(node.args[0])
            return maximum(value, -value)
        if name in _CALLS and len(node.args) >= 2:
            first, *rest = map(self.number, node.args)
            for other in rest:
                first = _CALLS[name](first, other)
            return first
        raise self.fail(f"call of '{name}' is not allowed; {nearest(name, ['min', 'max', 'abs', 'size'])}")
