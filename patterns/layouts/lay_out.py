"""From the predicates of a site's heads over tokens to the fields of its program, with a layout where one is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.bias import Bias
from sparsify.expr import Pred
from sparsify.patterns.grid import Grid
from sparsify.patterns.layouts.best import BestLayout, best_layout, over_slots
from sparsify.patterns.layouts.by_head import BestByHead
from sparsify.patterns.layouts.placed import Placed
from sparsify.patterns.lists import choices, lists
from sparsify.program import Layout


@dataclass(frozen=True)
class LaidOut:
    """Fields of a `Program`: predicates (one for each query head) and biases, over slots where there are layouts."""

    keeps: tuple[Pred, ...]
    bias: Bias = ()
    sink: Bias | None = None
    queries: Layout | None = None
    keys: Layout | None = None
    chosen: BestLayout | BestByHead | None = None

    def fields(self) -> dict[str, Any]:
        """Those that `Program.of` takes by name."""
        return {"bias": self.bias, "sink": self.sink, "queries": self.queries, "keys": self.keys}


def lay_out(
    keeps: Sequence[Pred],
    grids: Sequence[Grid],
    total: int,
    bias: Bias = (),
    sink: Bias | None = None,
    by_head: BestByHead | None = None,
) -> LaidOut:
    """The fields for heads that keep `keeps`, where all `total` tokens are queries and keys in their order.

    All heads share one layout, that of one of `grids` (those in their patterns, as often as they occur); the other
    patterns work in it all the same. Where none saves enough, it is those that each key head has `by_head`, if any;
    else, and where a head has a list of keys, which counts tokens in their own order, the fields are over tokens.
    """
    listed = any(lists(keep) or choices(keep) for keep in keeps)
    chosen = None if listed or not grids else best_layout(tuple(keeps), tuple(grids), total)
    if chosen is None:
        return LaidOut(tuple(keeps), bias, sink) if listed or by_head is None else _by_head(keeps, bias, sink, by_head)
    placed = Placed(chosen.boxes)
    return LaidOut(
        over_slots(tuple(keeps), chosen.boxes),
        placed.bias(bias),
        None if sink is None else placed.bias(sink),
        chosen.boxes.layout("q"),
        chosen.boxes.layout("k"),
        chosen,
    )


def _by_head(keeps: Sequence[Pred], bias: Bias, sink: Bias | None, chosen: BestByHead) -> LaidOut:
    laid = chosen.laid
    return LaidOut(
        tuple(laid.keep(keep, head) for head, keep in enumerate(keeps)),
        laid.bias(bias),
        None if sink is None else laid.bias(sink),
        laid.layout("q"),
        laid.layout("k"),
        chosen,
    )
