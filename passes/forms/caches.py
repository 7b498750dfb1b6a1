"""Caches that forget: whether the first key that an attention sees is the first that there ever was."""

from __future__ import annotations

from torch import fx

from sparsify.expr import Pred, Var
from sparsify.passes.nodes import CASTS, COPIES, VIEWS, argument, is_tensor, op, shape
from sparsify.walk import substitute, variables

MOVED = (*CASTS, *COPIES, *VIEWS, "transpose", "permute", "expand", "unsqueeze", "squeeze", "repeat_interleave", "mul")
WRITTEN = ("copy", "index_put", "index_copy", "slice_scatter")


def forgets(keys: fx.Node) -> bool:
    """Whether keys (B, H, N, D) are old ones and new ones of which the oldest are, or were, cut off.

    As in rolling caches of sliding windows: cat([cache[:, :, 1:], new]), or cat([cache, new]) of which [:, :, -size:]
    is kept for the next step, or cache.roll(-1, 2) with the new one written over the last. Positions among such keys
    count from the oldest that is left.
    """
    node = keys
    while op(node).removesuffix("_") in (*MOVED, *WRITTEN):
        node = node.args[1 if op(node) == "copy_" else 0]
    if op(node) == "roll":
        dims = argument(node, "dims")
        return not dims or len(shape(node)) - 2 in [dim % len(shape(node)) for dim in dims]
    if op(node) == "slice":
        return _cuts_front(node)
    if op(node) != "cat":
        return False
    parts = [part for part in node.args[0] if is_tensor(part) and 0 not in shape(part)]
    return len(parts) > 1 and any(_cuts_front(other) for other in (*parts, *node.users))


def _cuts_front(node: fx.Node) -> bool:
    """Whether a node is a slice along the length (B, H, N, D) that leaves out the beginning."""
    if op(node) != "slice":
        return False
    rank = len(shape(node.args[0]))
    return argument(node, "dim") % rank == rank - 2 and argument(node, "start") not in (None, 0)


def moves_along(rule: Pred) -> bool:
    """Whether a rule says the same of query and key wherever they are, as windows do and sinks don't."""
    if "N" in variables(rule):
        return False
    return substitute(rule, {"q": Var("q") + 1, "k": Var("k") + 1}) == rule
