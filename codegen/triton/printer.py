"""Prints a program as a Triton kernel: the skeleton `attention.py.jinja`, and an op table for the tile rules."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from sparsify.expr import FALSE, TRUE, Expr, Load, Pred, Sum, Test, Var
from sparsify.patterns.interior import has_gaps, interiors
from sparsify.patterns.tiles import analyse
from sparsify.program import Program
from sparsify.text import _Printer, to_text
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
NEVER_NEGATIVE = ("b", "h", "k")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class _TritonPrinter(_Printer):
    """Prints sizes and loads by the names of the kernel's arguments, and makes tests of loads boolean."""

    def __init__(self, program: Program) -> None:
        super().__init__(OPS, self.leaf_text)
        self.sizes = {name: f"size_{i}" for i, name in enumerate(program.sizes())}

    def text(self, node: Any) -> str:
        return f"({self.text(node.load)} != 0)" if isinstance(node, Test) else super().text(node)

    def leaf_text(self, atom: Expr) -> str | None:
        if isinstance(atom, Load):
            parts = [self._element(atom.source, axis, index) for axis, index in enumerate(atom.index)]
            return f"read({' + '.join([atom.source, *parts])})"
        return self.sizes.get(atom.name) if isinstance(atom, Var) else None

    def _element(self, source: str, axis: int, index: Expr) -> str:
        """The offset of one index; a negative one counts from the end, as in Python."""
        stride, length = f"{source}_stride_{axis}", f"{source}_length_{axis}"
        if isinstance(index, Sum) and not index.terms:
            return f"{index.const} * {stride}" if index.const >= 0 else f"({length} - {-index.const}) * {stride}"
        if isinstance(index, Var) and index.name in NEVER_NEGATIVE:
            return f"{index.name}.to(OFFSETS) * {stride}"
        return f"element({self.text(index)}, {length}, {stride}, OFFSETS)"


def kernel_source(program: Program, dtype: str, head_dim: int, value_dim: int) -> str:
    """The kernel's module as text; `dtype` is float32, bfloat16 or float16."""
    name = kernel_name(program, dtype, head_dim, value_dim)
    return fill(_skeleton(), holes(program, name, dtype, head_dim, value_dim))


@functools.lru_cache(maxsize=1024)
def kernel_name(program: Program, dtype: str, head_dim: int, value_dim: int) -> str:
    """The kernel's name: what it computes in, its head sizes, and a hash of all that its source follows from."""
    parts = (_skeleton(), repr(sorted(OPS.items())), program.text(), dtype, str(head_dim), str(value_dim))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    sizes = f"d{head_dim}" if head_dim == value_dim else f"d{head_dim}v{value_dim}"
    return f"attention_{len(program.keep)}rules_triton_{DTYPES[dtype]}_{sizes}_{digest}"


def fill(skeleton: str, values: Mapping[str, Any]) -> str:
    """The skeleton with its holes filled; a hole without a value and a value without a hole both raise."""
    from jinja2 import Environment, StrictUndefined, meta

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    wanted = meta.find_undeclared_variables(environment.parse(skeleton))
    if unlike := wanted ^ set(values):
        raise ValueError(f"the kernel's skeleton and its values differ in {sorted(unlike)}")
    return environment.from_string(skeleton).render(values)


@functools.lru_cache(maxsize=1)
def _skeleton() -> str:
    return resources.files(__package__).joinpath("attention.py.jinja").read_text()


def used_loads(program: Program) -> dict[str, int]:
    """The loads that some predicate reads, by source name, each with its number of indices; in a fixed order."""
    return dict(sorted(program.load_ranks().items(), key=lambda item: int(item[0][1:])))


def holes(program: Program, name: str, dtype: str, head_dim: int, value_dim: int) -> dict[str, Any]:
    """What fills the skeleton's holes."""
    printer = _TritonPrinter(program)
    sizes = list(printer.sizes.values())
    loads = used_loads(program)
    lengths = [f"{source}_length_{axis}" for source, rank in loads.items() for axis in range(rank)]
    strides = [f"{source}_stride_{axis}" for source, rank in loads.items() for axis in range(rank)]
    numbers = ["N", "Nq", "q_offset", "q_tiles", "all_heads", "section", *sizes, *lengths]
    early = program.softcap is not None or program.mask == "add"
    return {
        "title": f"Attention in {dtype}, head size {head_dim}, value size {value_dim}: {len(program.keep)} rules.",
        "name": name,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "rules": [_rule(program, number, printer) for number in range(len(program.keep))],
        "assignments": [(_heads_test(program, number), number) for number in range(1, len(program.keep))],
        "scope": ", ".join(["b", "h", "N", "Nq", *sizes, *loads, *lengths, *strides]),
        "launch_loads": "".join(f"{source}, " for source in loads),
        "launch_scalars": "".join(f"{scalar}, " for scalar in [*sizes, *lengths, *strides]),
        "unspecialised": ", ".join(f'"{number}"' for number in numbers),
        "mask": program.mask,
        "softcap": program.softcap,
        "factor": "LOG2_E" if early else "scale",
    }


def _rule(program: Program, number: int, printer: _TritonPrinter) -> dict[str, Any]:
    pred, text = program.keep[number], printer.text
    rule = analyse(pred).without_data()
    inside = [one for one in interiors(pred) if not one.data_bounds()]
    return {
        "heads": _ranges(program, number),
        "text": to_text(pred),
        "keep": "" if pred == TRUE else f" & {text(pred)}",
        "empty": text(rule.empty),
        "full": text(rule.full),
        "gaps": rule.empty != FALSE and has_gaps(pred),
        "bands": [_interval(band.low, band.high, text) | {"unless": text(band.unless)} for band in rule.bands],
        "interiors": [_interval(one.low, one.high, text) | {"when": text(one.when)} for one in inside],
    }


def _interval(low: Expr | None, high: Expr | None, text: Any) -> dict[str, str]:
    return {"low": "0" if low is None else text(low), "high": "N" if high is None else text(high)}


def _runs(program: Program, number: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for head in (h for h, rule in enumerate(program.heads) if rule == number):
        if runs and runs[-1][1] == head - 1:
            runs[-1] = (runs[-1][0], head)
        else:
            runs.append((head, head))
    return runs


def _ranges(program: Program, number: int) -> str:
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(program, number))


def _heads_test(program: Program, number: int) -> str:
    tests = [f"(h == {a})" if a == b else f"((h >= {a}) & (h <= {b}))" for a, b in _runs(program, number)]
    return " | ".join(tests) or "False"


def longest_last(program: Program) -> bool:
    """Whether later queries keep more keys, as under a causal mask: then query tiles are issued last first."""
    bands = [band for pred in program.keep for band in analyse(pred).bands]
    return any(b.low is None and b.high is not None and "q1" in variables(b.high) for b in bands)


def magnitude(node: Expr | Pred, limits: Mapping[str, int]) -> int:
    """The largest absolute value that any part of an expression can take, given those of its variables and loads."""
    from sparsify.expr import And, Eq, FloorDiv, Ge, Max, Min, Mod, Mul, Not, Or, Select

    inner = functools.partial(magnitude, limits=limits)
    match node:
        case Var(name):
            return limits[name]
        case Load(source, index):
            return max(limits[source], *map(inner, index))
        case Sum(const, terms):
            return abs(const) + sum(abs(c) * inner(atom) for c, atom in terms)
        case Mul(left, right):
            return inner(left) * inner(right)
        case FloorDiv(left, right) | Mod(left, right) | Min(left, right) | Max(left, right):
            # the printed floor_div and floor_mod also multiply back: never above the left side plus the right
            return inner(left) + inner(right)
        case Select(condition, then, other):
            return max(inner(condition), inner(then), inner(other))
        case And(parts) | Or(parts):
            return max(map(inner, parts), default=0)
        case Ge(part) | Eq(part) | Not(part):
            return inner(part)
        case Test(load):
            return inner(load)
    raise TypeError(f"not an expression or a predicate: {node!r}")
