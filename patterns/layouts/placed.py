"""Predicates and biases over tokens as ones over the slots of boxes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparsify import bias as biases
from sparsify.bias import Bias
from sparsify.expr import (
    FALSE,
    TRUE,
    And,
    Eq,
    Expr,
    FloorDiv,
    Ge,
    Load,
    Mod,
    Or,
    Pred,
    Sum,
    Var,
    as_expr,
    conjunction,
    constant,
    disjunction,
    eq,
    select,
)
from sparsify.patterns.grid import coordinates
from sparsify.patterns.layouts.boxes import TILE, Boxes
from sparsify.patterns.tiles import unwrap
from sparsify.sizes import size_values
from sparsify.walk import rewrite, substitute, variables

Q, K = Var("q"), Var("k")
Span = tuple[int, int]  # of tokens, the first and the one after the last


@dataclass(frozen=True)
class Placed:
    """Rewrites what speaks of tokens q and k into what speaks of slots q and k, both laid out in the same boxes.

    The coordinates of a token in the grid, wherever a predicate computes them, become those of the slot, which are
    known of a whole tile. Where that allows it, bounds on the slot itself are added that say nothing new: from them
    the bounds of key loops follow (`tiles.bands`).
    """

    boxes: Boxes

    def keep(self, pred: Pred) -> Pred:
        """The predicate over slots; it drops the keys of empty ones. No list may be in it."""
        sides = {"q": self.whole, "k": self.whole}
        return self._real(self._walk(substitute(pred, self._constants(pred)), sides, True, not self.grouped))

    def bias(self, bias: Bias) -> Bias:
        """The bias (or a sink's) over slots."""
        sides = {"q": self.whole, "k": self.whole}
        placed = biases.rewrite(bias, lambda node: self._leaf(node, sides))
        return biases.substitute(placed, self._places())

    @property
    def grouped(self) -> bool:
        """Whether there are several dilation groups."""
        return math.prod(self.boxes.dilation) > 1

    @property
    def whole(self) -> Span:
        """All tokens."""
        return 0, self.boxes.total

    def _constants(self, pred: Pred) -> dict[str, int]:
        total = self.boxes.total
        return {"N": total, "Nq": total} | size_values(variables(pred), total)

    def _places(self) -> dict[str, Expr]:
        """What the placeholders of coordinates in dilation groups, `q_0` and so on, stand for."""
        sides = (("q", self.boxes.places(Q)), ("k", self.boxes.places(K)))
        return {f"{side}_{axis}": place for side, places in sides for axis, place in enumerate(places)}

    def _real(self, pred: Pred) -> Pred:
        return substitute(pred, self._places())

    def _walk(self, pred: Pred, spans: Mapping[str, Span], fill: bool, same: bool) -> Pred:
        """A predicate over slots, in which coordinates are still placeholders (`q_0`, `k_0`).

        spans: the tokens that q and k are known to be among. fill: whether to drop the keys of empty slots here, which
        one level of it does. same: whether q and k are known to be in one dilation group.
        """
        if isinstance(pred, Or):
            return disjunction(self._walk(part, spans, fill, same) for part in pred.parts)
        parts = pred.parts if isinstance(pred, And) else (pred,)
        narrowed, exact, rest = self._narrowed(parts, spans)
        if any(low >= high for low, high in narrowed.values()):
            return FALSE
        leaves = [(part, self._placed(part, narrowed)) for part in rest if not isinstance(part, Or)]
        found = [placed for _, placed in leaves]
        if not same:
            found, same = self._one_group(found)
        bounds = [self._bound(part, placed, narrowed, same) for part, placed in leaves]
        inner = [part for part in rest if isinstance(part, Or)]
        filled = next((part for part in inner if "k" in variables(part)), None) if fill else None
        if filled is not None and self._region(narrowed["k"]):
            filled = None
        empty = self._filled(narrowed["k"]) if fill and filled is None else []
        nested = [self._walk(part, narrowed, part is filled, same) for part in inner]
        return conjunction([*exact, *found, *bounds, *empty, *nested])

    def _narrowed(
        self, parts: tuple[Pred, ...], spans: Mapping[str, Span]
    ) -> tuple[dict[str, Span], list[Pred], list[Pred]]:
        """The spans with what the parts say of q or k alone; those as bounds on slots, and the other parts."""
        narrowed, exact, rest = dict(spans), [], []
        for part in parts:
            names = variables(part)
            side = next(iter(names)) if len(names) == 1 and names <= {"q", "k"} else ""
            limits = [None if one is None else constant(one) for one in solved(part, Var(side))] if side else [None] * 2
            if limits == [None, None]:
                rest.append(part)
                continue
            low, high = narrowed[side]
            first = low if limits[0] is None else max(low, limits[0])
            stop = high if limits[1] is None else min(high, limits[1])
            narrowed[side] = first, stop
            cuts = [cut for cut, old in ((first, low), (stop, high)) if cut != old]
            if any(self.boxes.start < cut < self.boxes.stop for cut in cuts):
                rest.append(part)
                continue
            exact += [Var(side) >= self._slot(first)] if first != low else []
            exact += [Var(side) < self._slot(stop, before=True)] if stop != high else []
        return narrowed, exact, rest

    def _slot(self, token: int, before: bool = False) -> int:
        """The slot of a token outside the grid, or of its first; `before`: the one after that of the token before."""
        boxes = self.boxes
        if token >= boxes.stop:
            return token - boxes.stop + boxes.end
        return token if token < boxes.start or before else boxes.first

    def _region(self, span: Span) -> str:
        """Where all of the span is: "before", "grid" or "after"; "" if that can't be said."""
        start, stop = self.boxes.start, self.boxes.stop
        if start <= span[0] and span[1] <= stop:
            return "grid"
        return "before" if span[1] <= start else "after" if span[0] >= stop else ""

    def _placed(self, part: Pred, spans: Mapping[str, Span]) -> Pred:
        return rewrite(part, lambda node: self._leaf(node, spans))

    def _leaf(self, node: Expr, spans: Mapping[str, Span]) -> Expr | None:
        """A token or a coordinate by slots. What is read from tensors is read inside them, whatever the slot."""
        if isinstance(node, Load) and any(span != self.whole for span in spans.values()):
            anywhere = dict.fromkeys(spans, self.whole)
            return Load(node.source, tuple(rewrite(part, lambda n: self._leaf(n, anywhere)) for part in node.index))
        for side, span in spans.items():
            region = self._region(span)
            if node == Var(side):
                return self._token(side, region)
            if region == "grid" and node in _coordinate_table(self, side):
                return _coordinate_table(self, side)[node]
        return None

    def _token(self, side: str, region: str) -> Expr:
        if region == "before":
            return Var(side)
        if region == "after":
            return Var(side) - (self.boxes.end - self.boxes.stop)
        return self.boxes.grid_token(self.at(side)) if region == "grid" else self.boxes.token(Var(side))

    def at(self, side: str) -> tuple[Expr, ...]:
        """Of a slot in the grid, over placeholders and the slot's dilation group."""
        parts = enumerate(zip(self.boxes.dilation, self.boxes.groups(Var(side)), strict=True))
        return tuple(Var(f"{side}_{axis}") * apart + group for axis, (apart, group) in parts)

    def _one_group(self, leaves: list[Pred]) -> tuple[list[Pred], bool]:
        """The equalities of q's and k's dilation group in every dimension as one, if they are all there."""
        sides = zip(self.boxes.groups(Q), self.boxes.groups(K), strict=True)
        equal = [rule for rule in (eq(a, b) for a, b in sides) if rule != TRUE]
        if not all(rule in leaves for rule in equal):
            return leaves, False
        return [leaf for leaf in leaves if leaf not in equal] + [eq(self.boxes.group(Q), self.boxes.group(K))], True

    def _bound(self, part: Pred, placed: Pred, spans: Mapping[str, Span], same: bool) -> Pred:
        """A bound on k's slot that follows from a part, TRUE if there is none."""
        low, high = solved(placed, Var("k_0"))
        if (low, high) != (None, None):
            return self._within(low and self._row(low), high and self._row(high - 1, 1)) if same else TRUE
        low, high = (one and rewrite(one, lambda node: self._leaf(node, spans)) for one in solved(part, K))
        return self._within(low and self._least(low), high and self._most(high))

    def _within(self, low: Expr | None, high: Expr | None) -> Pred:
        low = None if low == as_expr(0) else low
        high = None if high == as_expr(self.boxes.slots) else high
        return conjunction([TRUE if low is None else low <= K, TRUE if high is None else high > K])

    def _row(self, place: Expr, after: int = 0) -> Expr:
        """The first slot of the boxes in the query's dilation group with a place along the slowest dimension."""
        boxes = self.boxes
        return boxes.group(Q) * boxes.group_slots + (place // boxes.box[0] + after) * boxes.row_slots + boxes.first

    def _least(self, token: Expr) -> Expr:
        """A slot that no later token's is before."""
        inside = as_expr(self.boxes.first) if self.grouped else self._grid_row(token)
        return self._by_region(token, inside, token)

    def _most(self, token: Expr) -> Expr:
        """A slot that is after those of all earlier tokens."""
        inside = as_expr(self.boxes.end) if self.grouped else self._grid_row(token - 1, 1)
        return self._by_region(token - 1, inside, token)

    def _grid_row(self, token: Expr, after: int = 0) -> Expr:
        return self._row(coordinates(token - self.boxes.start, self.boxes.shape)[0], after)

    def _by_region(self, token: Expr, inside: Expr, outside: Expr) -> Expr:
        boxes = self.boxes
        found = inside
        if boxes.stop < boxes.total:
            found = select(token < boxes.stop, found, outside + (boxes.end - boxes.stop))
        return select(token < boxes.start, outside, found) if boxes.start else found

    def _filled(self, span: Span) -> list[Pred]:
        """What holds of the slot of a key in the span if it is filled."""
        boxes, (low, high) = self.boxes, span
        before, after = low < boxes.start, high > boxes.stop
        found: list[Pred] = []
        if before and high > boxes.start and boxes.start % TILE:
            found.append((boxes.start > K) | (boxes.first <= K))
        if low < boxes.stop and high > boxes.start:
            outside = [boxes.first > K] * before + [boxes.end <= K] * after
            found += [disjunction([*outside, rule]) for rule in boxes.inside(K)]
        if after and high == boxes.total:
            found.append(boxes.end + boxes.total - boxes.stop > K)
        return found


@functools.lru_cache(maxsize=256)
def _coordinate_table(placed: Placed, side: str) -> dict[Expr, Expr]:
    """The quotients and remainders by which a predicate computes a token's coordinates, and what they are of a slot."""
    found = {}
    by_token = coordinates(Var(side) - placed.boxes.start, placed.boxes.shape)
    for asked, place in zip(by_token, placed.at(side), strict=True):
        const, terms = (asked.const, asked.terms) if isinstance(asked, Sum) else (0, ((1, asked),))
        if terms and isinstance(terms[0][1], FloorDiv | Mod):
            found[terms[0][1]] = place - const
    return found


def solved(part: Pred, variable: Expr) -> tuple[Expr | None, Expr | None]:
    """(low, high excluded) of a variable where a condition holds, as far as it is a bound on it; else None."""
    match part:
        case Ge(expr):
            return _side(expr, variable)
        case Eq(expr):
            one, other = _side(expr, variable), _side(-expr, variable)
            return one[0] if one[0] is not None else other[0], one[1] if one[1] is not None else other[1]
    return None, None


def _side(expr: Expr, variable: Expr) -> tuple[Expr | None, Expr | None]:
    """Solves expr >= 0, where the variable occurs once, alone or in floored divisions, and its side nowhere else."""
    terms = expr.terms if isinstance(expr, Sum) else ((1, expr),)
    (name,) = variables(variable)
    own = [(c, atom) for c, atom in terms if any(found.split("_")[0] == name[0] for found in variables(atom))]
    if len(own) != 1 or abs(own[0][0]) != 1 or variables(own[0][1]) != {name}:
        return None, None
    coefficient, atom = own[0]
    rest = expr - atom * coefficient
    return unwrap(atom, -rest, None, variable) if coefficient == 1 else unwrap(atom, None, rest, variable)
