"""Predicates in the words of `sparsify.patterns`, for people: `window(512) & attention_mask[b, k]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import fx
from torch._ops import OpOverload

from sparsify import patterns
from sparsify.expr import TRUE, And, Eq, Expr, FloorDiv, Ge, Load, Mod, Not, Or, Pred, Sum, Test, Var, as_expr, constant
from sparsify.text import PYTHON, to_text

GAP = Var("q") - Var("k")
PLAIN = PYTHON | {"group": "{0}", "scale": "{0}*({1})", "and": " & ", "or": " | ", "not": "~{0}"}
SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNCHANGED = (
    "to", "_to_copy", "view", "reshape", "unsqueeze", "squeeze", "expand", "clone", "contiguous", "alias", "detach",
)  # fmt: skip
WORD = re.compile(r"~?[\w.]+([(\[][^()\[\]]*[)\]])?")  # a name, a call or an indexed tensor


def describe(keep: Pred, names: Sequence[str] = ()) -> str:
    """A predicate over absolute q and k as text: pattern words where they say the same, comparisons elsewhere.

    `names` are those of the tensors that the loads `_0`, `_1`, ... index (`load_names`). "all" keeps everything.
    """
    return Words(names).text(keep)


class Words:
    """Texts of predicates, sums and loads, with the loads' names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = {f"_{i}": name for i, name in enumerate(names)}

    def text(self, keep: Pred) -> str:
        if keep == TRUE:
            return "all"
        if isinstance(keep, Or):
            return _joined([self.text(part) for part in keep.parts], " | ") or "nothing"
        words, rest = _distance(list(keep.parts) if isinstance(keep, And) else [keep])
        return _joined(words + [self.part(part) for part in rest], " & ")

    def part(self, part: Pred) -> str:
        match part:
            case And() | Or():
                return self.text(part)
            case Test(load):
                return self.load(load) or ""
            case Not(Test(load)):
                return f"~{self.load(load)}"
            case Not(Eq(expr)):
                return self.load(_unsigned(expr)) or self.comparison(expr, "!=")
            case Eq(expr) if self.load(_unsigned(expr)):
                return f"~{self.load(_unsigned(expr))}"
            case Eq(expr):
                return _pattern(part) or self.comparison(expr, "==")
            case Ge(expr):
                return self.comparison(expr, ">=")
        raise TypeError(f"not a predicate: {part!r}")

    def comparison(self, expr: Expr, sign: str) -> str:
        """`k <= q + 3`, `q - k < 8`, `k >= 12`: what reads best of `expr >= 0` and the like."""
        terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
        const = expr.const if isinstance(expr, Sum) else 0
        plus = [(c, atom) for c, atom in terms if c > 0]
        minus = [(-c, atom) for c, atom in terms if c < 0]
        if const and (not plus or any(atom == Var("q") for _, atom in minus)):
            text, other = self.sum(minus, plus), f"< {const + 1}" if sign == ">=" else f"{sign} {const}"
        elif not minus:
            text, other = self.sum(plus, []), f"{sign} {-const}"
        else:
            flip = {">=": "<="}.get(sign, sign)
            if sign == ">=" and const < 0 and any(isinstance(atom, Load) for _, atom in plus):
                flip, const = "<", const + 1  # `k < length[b]`
            offset = f" {'+' if const > 0 else '-'} {abs(const)}" if const else ""
            text, other = self.sum(minus, []) or "0", f"{flip} {self.sum(plus, []) or '0'}{offset}"
        return f"{text} {other}"

    def sum(self, plus: list[tuple[int, Expr]], minus: list[tuple[int, Expr]]) -> str:
        words = [("+", c, atom) for c, atom in plus] + [("-", c, atom) for c, atom in minus]
        texts = [(sign, c, _plain(to_text(atom, PLAIN, self.load))) for sign, c, atom in words]
        shown = [
            (sign, text if c == 1 else f"{c}*{text if WORD.fullmatch(text) else f'({text})'}")
            for sign, c, text in texts
        ]
        text = " ".join(f"{sign} {word}" for sign, word in shown)
        return text.removeprefix("+ ")

    def position(self, index: Expr) -> str:
        """`k - q + N - 1`: positions first, then sizes, then the number."""
        if not isinstance(index, Sum):
            return _plain(to_text(index, PLAIN, self.load))
        terms = sorted(index.terms, key=lambda term: (term[1] not in map(Var, "bhqk"), -term[0]))
        plus, minus = ([(abs(c), atom) for c, atom in terms if (c > 0) == up] for up in (True, False))
        first = [term for term in plus if term[1] in map(Var, "bhqk")] or plus
        later = [term for term in plus if term not in first]
        text = " + ".join(part for part in (self.sum(first, minus), self.sum(later, [])) if part)
        return text + (f" {'+' if index.const > 0 else '-'} {abs(index.const)}" if index.const else "")

    def load(self, atom: Expr) -> str | None:
        """`pad[b, k]`: a load by its tensor's name, without the dimensions of size 1."""
        if not isinstance(atom, Load):
            return None
        shown = [self.position(i) for i in atom.index if i != as_expr(0)]
        return self.names.get(atom.source, atom.source) + (f"[{', '.join(shown)}]" if shown else "")


def _joined(words: list[str], joiner: str) -> str:
    alone = len(words) == 1
    return joiner.join(word if alone or WORD.fullmatch(word) else f"({word})" for word in words)


def _unsigned(expr: Expr) -> Expr:
    """`-x` as `x`: an equation with 0 says the same."""
    return -expr if isinstance(expr, Sum) and not expr.const and len(expr.terms) == 1 else expr


def _distance(parts: list[Pred]) -> tuple[list[str], list[Pred]]:
    """Bounds on q - k taken together: causal, or a window."""
    low = next((-_rest(part, GAP) for part in parts if _rest(part, GAP) is not None), None)
    high = next((_rest(part, -GAP) for part in parts if _rest(part, -GAP) is not None), None)
    if low is None or (high is None and low != 0) or low > 0:
        return [], parts
    found = patterns.causal() if high is None else patterns.window(high + 1, -low) if high >= 0 else None
    if found is None:
        return [], parts
    known = found.keep()
    known_parts = known.parts if isinstance(known, And) else (known,)
    return [str(found).removesuffix("()")], [part for part in parts if part not in known_parts]


def _rest(part: Pred, linear: Expr) -> int | None:
    """c of a comparison `linear + c >= 0`."""
    return constant(part.expr - linear) if isinstance(part, Ge) else None


def _pattern(part: Pred) -> str | None:
    """Single comparisons that are patterns of their own."""
    if isinstance(part, Eq):
        terms = part.expr.terms if isinstance(part.expr, Sum) else ((1, part.expr),)
        sizes = [constant(atom.right) for _, atom in terms if isinstance(atom, FloorDiv | Mod)]
        for size in sizes:
            for make in (patterns.same_block, patterns.dilated):
                if size and make(size).keep() == part:
                    return str(make(size))
    return None


def _plain(text: str) -> str:
    """Without the parentheses that only a parser needs, around single names and numbers."""
    return re.sub(r"(?<![\w\]])\((\w+)\)", r"\1", text)


def load_names(loads: Sequence[fx.Node]) -> tuple[str, ...]:
    """A readable name for each tensor: that of the graph input it is a cast or a view of, else its own."""
    return tuple(_input_name(node) for node in loads)


def _input_name(node: fx.Node) -> str:
    """`attention_mask`, `cumsum(attention_mask)`, `(attention_mask == 0)`; a node's own name without one input."""
    if "mask_name" in node.meta:
        return _plain_input(node.meta["mask_name"])
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return _plain_input(node.name)
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(tensors) != 1:
        return node.name
    inner, name = _input_name(tensors[0]), node.target._schema.name.removeprefix("aten::").rstrip("_")
    if name in UNCHANGED or (name == "slice" and node.args[2:3] in ((0,), (None,), ()) and node.args[4:] in ((1,), ())):
        return inner
    number = node.args[1] if len(node.args) > 1 and not isinstance(node.args[1], fx.Node) else None
    return f"({inner} {SIGNS[name]} {number})" if name in SIGNS and number is not None else f"{name}({inner})"


def _plain_input(name: str) -> str:
    """An input's name without what Dynamo puts in front of it."""
    return re.sub(r"^([lL]_)?((self|kwargs|args)_)*", "", name).strip("_") or name
