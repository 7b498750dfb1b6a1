"""Sizes: integers, or expressions in the sequence length N such as "N/8 + 512" (MoA's elastic rule).

A size expression is exact rational arithmetic rounded down to an integer at the end, evaluated on the host when a
kernel is launched, so one compiled kernel serves every length.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sparsify.errors import PatternError
from sparsify.expr import Expr, as_expr, maximum
from sparsify.foldable import foldable
from sparsify.text import size_var

FAR = 2**20  # a length at which no sensible size is beyond LIMIT
LIMIT = 2**40  # sizes are positions; anything near the range of an int64 product is a mistake

_OPS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
}
_CALLS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "floor": math.floor, "ceil": math.ceil}


@dataclass(frozen=True)
class Size:
    """A size: `text` is an integer or an expression in N, normalised by Python's own unparser."""

    text: str

    @classmethod
    def read(cls, value: int | str, field: str = "size", low: int | None = None) -> Size:
        """Checks and keeps a user's size. Raises PatternError naming the field, the value and what is allowed."""
        return cls(_checked_text(value, field, low))

    def at(self, n: int) -> int:
        """The size at sequence length n, rounded down."""
        return _at(self.text, n)

    def expr(self) -> Expr:
        """The size as an expression: a constant, or a variable that the launch fills in."""
        return as_expr(int(self.text)) if self.text.lstrip("-").isdigit() else size_var(self.text)

    def divisor(self) -> Expr:
        """The size as a divisor: at least 1, whatever an expression in N comes to."""
        return maximum(self.expr(), 1)

    def __str__(self) -> str:
        return self.text


@foldable
def _checked_text(value: int | str, field: str, low: int | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PatternError(f"{field}: expected an integer or an expression in N, found {value!r}")
    if isinstance(value, int):
        if low is not None and value < low:
            raise PatternError(f"{field}: expected an integer >= {low}, found {value}")
        if value < -LIMIT:
            raise PatternError(f"{field}: expected an integer >= -2**40, found {str(value)[:30]}")
        if value > LIMIT:
            raise PatternError(f"{field}: expected an integer <= 2**40, found {str(value)[:30]}")
        return str(value)
    node = _parse(value, field)
    try:
        size = Size(ast.unparse(node))
        far = size.at(FAR)
    except RecursionError:
        raise PatternError(f"{field}: '{value}' is nested too deeply") from None
    except PatternError as error:
        raise PatternError(f"{field}: {error}") from None
    if "N" not in size.text:
        return _checked_text(size.at(1), field, low)
    if abs(far) > LIMIT:
        raise PatternError(f"{field}: '{value}' is beyond 2**40 at N = 2**20")
    return size.text


@functools.lru_cache(maxsize=4096)
def _at(text: str, n: int) -> int:
    try:
        return math.floor(_value(ast.parse(text, mode="eval").body, n))
    except ZeroDivisionError:
        raise PatternError(f"size '{text}' divides by zero at N = {n}") from None


def _parse(text: str, field: str) -> ast.expr:
    if len(text) > 1000:
        raise PatternError(f"{field}: an expression of {len(text)} characters is longer than the 1000 allowed")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PatternError(f"{field}: '{text}' is not an arithmetic expression in N") from None
    for part in ast.walk(node):
        _check(part, text, field)
    return node


def _check(part: ast.AST, text: str, field: str) -> None:
    allowed = ast.BinOp | ast.UnaryOp | ast.USub | ast.UAdd | ast.Load
    match part:
        case ast.Constant(value=value) if (
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LIMIT
        ):
            return
        case ast.Name(id=name) if name == "N" or name in _CALLS:
            return
        case ast.Call(func=ast.Name(id="min" | "max"), args=[_, _, *_], keywords=[]):
            return
        case ast.Call(func=ast.Name(id="floor" | "ceil"), args=[_], keywords=[]):
            return
    if isinstance(part, allowed) or type(part) in _OPS:
        return
    found = ast.unparse(part) or type(part).__name__
    raise PatternError(f"{field}: '{found}' is not allowed in '{text}' (only N, numbers, + - * / // %, min, max)")


def _value(node: ast.AST, n: int) -> Fraction:
    match node:
        case ast.Constant(value=value):
            return Fraction(str(value))
        case ast.Name(id="N"):
            return Fraction(n)
        case ast.UnaryOp(op=op, operand=operand):
            return -_value(operand, n) if isinstance(op, ast.USub) else _value(operand, n)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPS[type(op)](_value(left, n), _value(right, n))
        case ast.Call(func=ast.Name(id=name), args=args):
            return Fraction(_CALLS[name](*(_value(arg, n) for arg in args)))
    raise PatternError(f"'{ast.unparse(node)}' is not a number")


def size_values(names: frozenset[str], n: int) -> dict[str, int]:
    """The values at length n of those variables that stand for sizes (`size_var` names them)."""
    prefix = "size("
    return {name: _at(ast.literal_eval(name[len(prefix) : -1]), n) for name in names if name.startswith(prefix)}
