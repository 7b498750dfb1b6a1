"""Prints tile rules as C++: what a predicate does on a tile, and which keys each row of a partial tile keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sparsify.codegen.cpp.rows import KEYS, LISTED_PARAMETERS, ListedRows, Rows
from sparsify.codegen.cpp.rows import PARAMETERS as ROW_PARAMETERS
from sparsify.expr import Bound, Expr, Listed, Load, Pred, Var
from sparsify.patterns.lists import Passes, passes
from sparsify.patterns.tiles import MAX_BANDS, Band, TileRule, analyse
from sparsify.program import Program
from sparsify.text import PYTHON, to_text
from sparsify.walk import data_bounds, variables

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
PARAMETERS = "const Call& c, I b, I h, I q0, I q1"
TILE_PARAMETERS = "const Call& c, const I* facts, I b, I h, I q0, I q1, I k0, I k1"
LIST_PARAMETERS = "const Call& c, I b, I h, I q"
KEEP_PARAMETERS = f"{ROW_PARAMETERS}, const I* y, uint64_t* keep"
KEEP_LISTED_PARAMETERS = f"{LISTED_PARAMETERS}, const I* y, uint64_t* keep"
PREPARE_PARAMETERS = "const Call& c, I b, I h, I q0, I count, I* y"
Text = Callable[[Expr | Pred], str]


@dataclass(frozen=True)
class Step:
    """What a kernel's rule number stands for: a predicate's static part, or the keys that it has of one list."""

    rule: TileRule
    listed: Listed | None = None

    @property
    def gathers(self) -> bool:
        """Whether key tiles are made of several units of a list; else a unit is so many whole tiles."""
        return self.listed is not None and self.listed.unit % KEYS != 0

    def rows(self, names: Names) -> tuple[Rows, str]:
        """What rows of a tile need to know, and the bits of the keys that one keeps."""
        rows = ListedRows(names.text) if self.gathers else Rows(names.text, names.keys)
        return rows, rows.bits(self.rule.keep)

    def tests(self) -> list[Expr | Pred]:
        """What is asked of tiles."""
        bands = self.rule.bands if self.listed is None else ()
        parts = [part for band in bands for part in (band.low, band.high, band.unless) if part is not None]
        return [self.rule.full, self.rule.empty, *parts]


def steps(program: Program) -> list[Step]:
    """A kernel's rules: the static part of each predicate in the program, and then all passes over lists."""
    found = [passes(keep) for keep in program.keep]
    lists = [Step(analyse(one.keep), one.listed) for part in found for one in part.lists]
    return [*(Step(analyse(part.static)) for part in found), *lists]


def gathers(program: Program) -> bool:
    """Whether any key tile is made of several units of a list."""
    return any(step.gathers for step in steps(program))


def uses_head(program: Program) -> bool:
    """Whether a rule depends on the head, beyond where its lists are."""
    return any("h" in variables(step.rule.keep) for step in steps(program))


class Names:
    """What the names in a program's predicates and biases are called in its kernel; `keys` are those of a key tile."""

    def __init__(self, program: Program, keys: int = KEYS) -> None:
        self.keys = keys
        self.scalars = {"N": "c.k_len", "Nq": "c.q_len"}
        self.scalars |= {size: f"c.sizes[{i}]" for i, size in enumerate(program.sizes())}
        self.ranks = program.load_ranks()
        tests = [part for step in steps(program) for part in step.tests()]
        asked = dict.fromkeys((int(b.load.source[1:]), b.axis) for part in tests for b in data_bounds(part))
        self.summaries = list(asked)  # the load and the axis of each summary that the rules look into

    def text(self, node: Expr | Pred, facts: Mapping[Bound, int] | None = None) -> str:
        """The node in C++; `facts` are the bounds that were asked before, by number."""

        def leaf(atom: Expr) -> str | None:
            match atom:
                case Var(name):
                    return self.scalars.get(name)
                case Load(source, ()):
                    return f"load{source}(c)"
                case Bound():
                    return f"facts[{facts[atom]}]" if facts and atom in facts else self.bound(atom)
            return None

        return to_text(node, CPP, leaf)

    def bound(self, bound: Bound) -> str:
        source, greatest = bound.load.source, "true" if bound.greatest else "false"
        parts = [f"bound{source}_{bound.axis}(c", self.text(bound.last), greatest, *map(self.text, bound.load.index)]
        return ", ".join(parts) + ")"

    def functions(self) -> list[str]:
        """Those that read an element, and those that look up a bound."""
        reads = [_load(source, rank) for source, rank in sorted(self.ranks.items())]
        looks = [_bound(n, f"_{load}", axis, self.ranks[f"_{load}"]) for n, (load, axis) in enumerate(self.summaries)]
        return reads + looks


def facts_of(rule: TileRule) -> dict[Bound, int]:
    """The bounds in a rule's tests of a tile that only its queries decide: they are asked once a query tile."""
    found = dict.fromkeys(bound for part in (rule.full, rule.empty) for bound in data_bounds(part))
    return {bound: i for i, bound in enumerate(b for b in found if not variables(b) & {"k0", "k1"})}


def print_rules(program: Program, names: Names) -> str:
    """All functions that the driver calls on a rule's number.

    full_of, empty_of, ask_of and prepare_of know all rules; bands_of and lists_of_rule those of heads; keep_rows_of
    those that have tiles of keys in a row, and keep_listed_rows_of those that gather their keys.
    """
    parts, found = names.functions(), steps(program)
    parts += [_rule(number, step, names) for number, step in enumerate(found)]
    first = len(program.keep)
    for number, keep in enumerate(program.keep):
        parts.append(_lists(number, passes(keep), first, names))
        first += len(passes(keep).lists)
    everything, kept = range(len(found)), range(len(program.keep))
    parts += [
        _dispatch("bool", "full_of", TILE_PARAMETERS, everything),
        _dispatch("bool", "empty_of", TILE_PARAMETERS, everything),
        _dispatch("int", "bands_of", f"{PARAMETERS}, Interval* to", kept),
        _dispatch("int", "lists_of_rule", f"{LIST_PARAMETERS}, List* to", kept),
        _dispatch("void", "ask_of", f"{PARAMETERS}, I* facts", everything),
        _dispatch("void", "prepare_of", PREPARE_PARAMETERS, everything),
        _dispatch("void", "keep_rows_of", KEEP_PARAMETERS, (n for n in everything if not found[n].gathers)),
        _dispatch("void", "keep_listed_rows_of", KEEP_LISTED_PARAMETERS, (n for n in everything if found[n].gathers)),
    ]
    return "\n\n".join(parts)


def max_bands(program: Program) -> int:
    """How many bands a rule of the program has at most."""
    found = max((len(analyse(passes(keep).static).bands) for keep in program.keep), default=1)
    assert found <= MAX_BANDS
    return max(1, found)


def max_facts(program: Program) -> int:
    """How many facts a rule of the program asks at most."""
    return max((len(facts_of(step.rule)) for step in steps(program)), default=0)


def max_row_facts(program: Program, names: Names) -> int:
    """How many numbers a rule of the program needs of each row, whatever the keys, at most."""
    return max((len(step.rows(names)[0].query) for step in steps(program)), default=0)


def max_lists(program: Program) -> int:
    """How many lists a rule of the program has at most."""
    return max((len(passes(keep).lists) for keep in program.keep), default=0)


def _load(source: str, rank: int) -> str:
    indices = "".join(f", I i{axis}" for axis in range(rank))
    place = " + ".join(f"place(from, {axis}, i{axis})" for axis in range(rank)) or "0"
    start = f"    const Source& from = c.loads[{source[1:]}];\n"
    return (
        f"static inline I load{source}(const Call& c{indices}) {{\n{start}    return element(from, {place});\n}}\n"
        f"static inline double value{source}(const Call& c{indices}) {{\n{start}    return value(from, {place});\n}}"
    )


def _bound(number: int, source: str, axis: int, rank: int) -> str:
    indices = ", ".join(f"I i{i}" for i in range(rank))
    others = [i for i in range(rank) if i != axis]
    at = " + ".join(f"place(from, {i}, i{i})" for i in others) or "0"
    line = " + ".join(f"position(from, {i}, i{i}) * by.stride[{i}]" for i in others) or "0"
    return (
        f"static I bound{source}_{axis}(const Call& c, I last, bool greatest, {indices}) {{\n"
        f"    const Source& from = c.loads[{source[1:]}];\n"
        f"    const Summary& by = c.summaries[{number}];\n"
        f"    return bound_of(from, by, {axis}, {at}, {line}, i{axis}, last, greatest);\n}}"
    )


def _dispatch(result: str, name: str, parameters: str, numbers: Iterable[int]) -> str:
    stem = name.partition("_of")[0]
    arguments = ", ".join(part.split()[-1] for part in parameters.split(","))
    cases = "".join(f"        case {n}: return {stem}{n}({arguments});\n" for n in numbers)
    last = "    __builtin_unreachable();\n"
    return f"static {result} {name}(int rule, {parameters}) {{\n    switch (rule) {{\n{cases}    }}\n{last}}}"


def _rule(number: int, step: Step, names: Names) -> str:
    rule, facts = step.rule, facts_of(step.rule)
    asked = "".join(f"    facts[{i}] = {names.bound(bound)};\n" for bound, i in facts.items())
    where = "" if step.listed is None else f" of {to_text(step.listed)}"
    text = (
        f"// Rule {number} keeps{where}: {to_text(rule.keep)}\n"
        f"static bool full{number}({TILE_PARAMETERS}) {{ return {names.text(rule.full, facts)}; }}\n"
        f"static bool empty{number}({TILE_PARAMETERS}) {{ return {names.text(rule.empty, facts)}; }}\n"
        f"static void ask{number}({PARAMETERS}, I* facts) {{\n{asked}}}\n"
    )
    if step.listed is None:
        bands = "".join(f"    {_band(band, names.text)}\n" for band in rule.bands)
        text += f"static int bands{number}({PARAMETERS}, Interval* to) {{\n    int n = 0;\n{bands}    return n;\n}}\n"
    rows, kept = step.rows(names)
    text += f"static void prepare{number}({PREPARE_PARAMETERS}) {{\n{rows.prepare()}}}\n"
    name, parameters = ("keep_listed_rows", KEEP_LISTED_PARAMETERS) if step.gathers else ("keep_rows", KEEP_PARAMETERS)
    return f"{text}static void {name}{number}({parameters}) {{\n{rows.loop(f'keep[n] = {kept};')}}}"


def _lists(number: int, found: Passes, first: int, names: Names) -> str:
    """The lists of a rule, the n-th with rule number first + n."""
    lines = "".join(f"    to[{n}] = {_list(one.listed, first + n, names)};\n" for n, one in enumerate(found.lists))
    return f"static int lists{number}({LIST_PARAMETERS}, List* to) {{\n{lines}    return {len(found.lists)};\n}}"


def _list(listed: Listed, rule: int, names: Names) -> str:
    from_ = f"c.loads[{listed.index.source[1:]}]"
    *outer, _ = listed.index.index
    at = " + ".join(f"place({from_}, {axis}, {names.text(part)})" for axis, part in enumerate(outer)) or "0"
    return f"list_at({from_}, {len(outer)}, {at}, {names.text(listed.count)}, {listed.unit}, {rule}, h)"


def print_layouts(program: Program, names: Names) -> str:
    """For a layout of queries and for one of keys: which token each slot holds, -1 for none."""
    parts = []
    for name, slot, layout in (("query", "q", program.queries), ("key", "k", program.keys)):
        if layout is not None:
            token = f"{names.text(layout.filled)} ? {names.text(layout.token)} : -1"
            parts.append(f"static I {name}_token(const Call& c, I b, I h, I {slot}) {{ return {token}; }}")
    return "\n\n".join(parts)


def _band(band: Band, text: Text) -> str:
    low = "0" if band.low is None else text(band.low)
    high = "c.k_slots" if band.high is None else text(band.high)
    return f"if (!{text(band.unless)}) to[n++] = {{{low}, {high}}};"
