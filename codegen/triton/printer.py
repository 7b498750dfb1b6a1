"""Prints a program as a Triton kernel: the skeleton (`PARTS`), filled with the tile rules and terms."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from sparsify.bias import Term
from sparsify.codegen.target import DTYPES
from sparsify.codegen.triton.expressions import OPS, TritonPrinter, rank
from sparsify.codegen.triton.listing import packing, predicates, rounds, static
from sparsify.codegen.triton.round_holes import round_holes
from sparsify.codegen.triton.summaries import by_bits, gaps, reads_pairs, scanned, split, summaries
from sparsify.expr import FALSE, TRUE, Expr
from sparsify.patterns.interior import interiors
from sparsify.patterns.tiles import BLOCK, analyse
from sparsify.program import Layout, Program, Skip
from sparsify.ranges import Ranges, of_numbers, text_of
from sparsify.text import to_text
from sparsify.walk import variables

if TYPE_CHECKING:
    from jinja2 import Template

LOG2_E = 1.4426950408889634
PARTS = ("helpers", "rules", "lists", "attention")  # of the skeleton, one behind another
HUGE = 1e30  # a factor beyond it is there to drop pairs


def kernel_source(
    program: Program,
    dtype: str,
    head_dim: int,
    value_dim: int,
    wrapped: frozenset[Expr] = frozenset(),
    lse: bool = False,
) -> str:
    """The kernel's module as text; `dtype` is float32, bfloat16 or float16, `wrapped` as in `TritonPrinter`.

    lse: whether the kernel writes that, too.
    """
    name = kernel_name(program, dtype, head_dim, value_dim, wrapped, lse)
    return fill(_skeleton(), holes(program, name, dtype, head_dim, value_dim, wrapped) | {"lse": lse})


@functools.lru_cache(maxsize=1024)
def kernel_name(
    program: Program,
    dtype: str,
    head_dim: int,
    value_dim: int,
    wrapped: frozenset[Expr] = frozenset(),
    lse: bool = False,
) -> str:
    """The kernel's name: what it computes in, its head sizes, and a hash of all that its source follows from."""
    parts = [_skeleton(), repr(sorted(OPS.items())), program.text(), dtype, str(head_dim), str(value_dim)]
    digest = hashlib.sha256("\n".join([*parts, *sorted(map(to_text, wrapped))]).encode()).hexdigest()[:12]
    sizes = f"d{head_dim}" if head_dim == value_dim else f"d{head_dim}v{value_dim}"
    return f"attention_{'lse_' * lse}{len(program.keep)}rules_triton_{DTYPES[dtype]}_{sizes}_{digest}"


def fill(skeleton: str, values: Mapping[str, Any]) -> str:
    """The skeleton with its holes filled; a hole without a value and a value without a hole both raise."""
    template, wanted = _read(skeleton)
    if unlike := wanted ^ set(values):
        raise ValueError(f"the kernel's skeleton and its values differ in {sorted(unlike)}")
    return template.render(values)


@functools.lru_cache(maxsize=8)
def _read(skeleton: str) -> tuple[Template, frozenset[str]]:
    """A skeleton, compiled, and the names of its holes: it has hundreds of lines, and all kernels share it."""
    from jinja2 import Environment, StrictUndefined, meta

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(skeleton), frozenset(meta.find_undeclared_variables(environment.parse(skeleton)))


@functools.lru_cache(maxsize=1)
def _skeleton() -> str:
    folder = resources.files(__package__)
    return "".join(folder.joinpath(f"{part}.py.jinja").read_text().rstrip("\n") + "\n" for part in PARTS)


def used_loads(program: Program) -> dict[str, int]:
    """The loads that some predicate reads, by source name, each with its number of indices; in a fixed order."""
    return dict(sorted(program.load_ranks().items(), key=lambda item: int(item[0][1:])))


def units(program: Program) -> str:
    """What scores are in before weights are made of them.

    "raw": dot products, scaled inside the exponent; "log2": ready for exp2; "natural": as the model has them, so that
    the finite minima that models add to drop pairs don't overflow.
    """
    if any(_huge(term) for term in program.bias):
        return "natural"
    return "log2" if program.bias or program.softcap is not None else "raw"


def _huge(term: Term) -> bool:
    return abs(term.factor) > HUGE or any(rank(load) for load in term.loads)


def holes(
    program: Program, name: str, dtype: str, head_dim: int, value_dim: int, wrapped: frozenset[Expr]
) -> dict[str, Any]:
    """What fills the skeleton's holes."""
    printer = TritonPrinter(program, wrapped)
    slots = [name for name, layout in (("q_slots", program.queries), ("k_slots", program.keys)) if layout]
    sizes = [*slots, *printer.sizes.values()]
    loads = used_loads(program)
    lengths = [f"{source}_length_{axis}" for source, count in loads.items() for axis in range(count)]
    strides = [f"{source}_stride_{axis}" for source, count in loads.items() for axis in range(count)]
    numbers = ["N", "Nq", "q_offset", "q_tiles", "all_heads", "section", *sizes, *lengths]
    unit = 1.0 if units(program) == "natural" else LOG2_E
    rules = [_rule(program, number, printer) for number in range(len(program.keep))]
    turns = [round_holes(turn, printer) for turn in rounds(program)]
    scope = ", ".join(["b", "h", "N", "Nq", *sizes, *loads, *lengths, *strides])
    found = [summary.name for summary in summaries(program)]
    skips = [name for name, _ in skip_arguments(program)]
    return _loops(program, rules) | {
        "title": f"Attention in {dtype}, head size {head_dim}, value size {value_dim}: {len(program.keep)} rules.",
        "name": name,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "rules": rules,
        "rounds": turns,
        "assignments": [(_heads_test(program.heads_of(n)), n) for n in range(1, len(program.keep))],
        "scope": scope,
        "packing": packing(program),
        "own": "head, " if packing(program) else "",
        "tile_scope": ", ".join([scope, *found, *(name for name, _ in printer.rows.values())]),
        "bounds": list(printer.rows.values()),
        "step": "QUERIES" if packing(program) else "BLOCK_M",
        "queries": "Nq" if program.queries is None else "q_slots",
        "keys": "N" if program.keys is None else "k_slots",
        "query_layout": _layout(program.queries, printer),
        "key_layout": _layout(program.keys, printer),
        "skips": _skips(program, "head" if packing(program) else "h"),
        "summaries": bool(found),
        "block": BLOCK,
        "launch_loads": "".join(f"{source}, " for source in (*loads, *found)),
        "launch_scalars": "".join(f"{scalar}, " for scalar in [*sizes, *skips, *lengths, *strides]),
        "unspecialised": ", ".join(f'"{number}"' for number in numbers),
        "softcap": program.softcap,
        "ceiling": None if program.softcap is None else program.softcap * unit,
        "bias": printer.bias(program.bias, unit) if program.bias else None,
        "sink": None if program.sink is None else printer.bias(program.sink, unit),
        "units": units(program),
    }


def _loops(program: Program, rules: list[dict[str, Any]]) -> dict[str, bool]:
    """Which loops over key tiles there are, and what they ask."""
    bits, listed = by_bits(program), bool(rounds(program))
    return {
        "by_bits": bits,
        "scans": listed or (any(rule["scanned"] for rule in rules) and not bits),
        "static": any(static(keep) != FALSE for keep in program.keep) or not listed,
        "tested": any(rule["beside"] for rule in rules),
        "one_loop": program.keys is None and not reads_pairs(program),
    }


def _rule(program: Program, number: int, printer: TritonPrinter) -> dict[str, Any]:
    pred, text = static(program.keep[number]), printer.text
    high = "N" if program.keys is None else "k_slots"
    closed, beside = split(pred)
    rule, inside = analyse(pred), [] if gaps(pred) else interiors(closed)
    return {
        "heads": text_of(program.heads_of(number)),
        "text": to_text(program.keep[number]),
        "keep": "" if pred == TRUE else f" & {text(pred)}",
        "beside": "" if beside == TRUE else f" & {text(beside)}",
        "empty": text(rule.empty),
        "full": text(analyse(closed).full),
        "gaps": gaps(pred),
        "scanned": scanned(pred) or (gaps(pred) and program.keys is not None),
        "bands": [_interval(band.low, band.high, high, text) | {"unless": text(band.unless)} for band in rule.bands],
        "interiors": [_interval(one.low, one.high, high, text) | {"when": text(one.when)} for one in inside],
    }


def _interval(low: Expr | None, high: Expr | None, keys: str, text: Any) -> dict[str, str]:
    return {"low": "0" if low is None else text(low), "high": keys if high is None else text(high)}


def _layout(layout: Layout | None, printer: TritonPrinter) -> dict[str, str] | None:
    return layout and {"token": printer.text(layout.token), "filled": printer.text(layout.filled)}


def skip_arguments(program: Program) -> list[tuple[str, Skip]]:
    """The distinct skips, by the names of the kernel's arguments that hold their limits."""
    return [(f"skip_{i}", skip) for i, skip in enumerate(dict.fromkeys(skip for skip in program.skips if skip))]


def _skips(program: Program, head: str) -> list[tuple[str, str]]:
    """Which heads have which limit, as tests of `head`."""
    found = []
    for name, skip in skip_arguments(program):
        having = of_numbers(h for h, one in enumerate(program.skips) if one == skip)
        found.append((_heads_test(having, head), name))
    return found


def _heads_test(heads: Ranges, name: str = "h") -> str:
    tests = [f"({name} == {a})" if a == b else f"(({name} >= {a}) & ({name} <= {b}))" for a, b in heads]
    return " | ".join(tests) or "False"


def longest_last(program: Program) -> bool:
    """Whether later queries keep more keys, as under a causal mask: then query tiles are issued last first."""
    bands = [band for pred in predicates(program) for band in analyse(pred).bands]
    return any(b.low is None and b.high is not None and "q1" in variables(b.high) for b in bands)
