"""From a softmax back to the product of queries and keys, through operations that only transform the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.forms.axes import EXPANDS, PERMUTES, REGROUPS, Layout, aligned, flat
from sparsify.passes.forms.masking import added, clamped, index_put, masked_fill, where
from sparsify.passes.forms.products import MATMULS, Factor, Product, product
from sparsify.passes.forms.scaling import dropout, negated, scaled, tanh, through, view
from sparsify.passes.forms.scores import HINT, MIXERS, Scores, Side, mixed_heads, multiply, of_pairs
from sparsify.passes.forms.sinks import concatenated
from sparsify.passes.nodes import CASTS, COPIES, is_tensor, op, same, value


@dataclass(frozen=True)
class Climb:
    """Reads scores. `is_weight`: whether a tensor is a parameter of the model; `is_key`: whether one is of the keys'
    and values' origin, which decides between several products.
    failed, mixed: why nodes hold no scores, and why products hold none of single heads."""

    is_weight: Callable[[fx.Node], bool]
    is_key: Callable[[fx.Node], bool]
    failed: dict[fx.Node, Refusal] = field(default_factory=dict)
    mixed: dict[fx.Node, Refusal | None] = field(default_factory=dict)

    def __call__(self, node: Any) -> Scores | Refusal:
        """What the scores in `node` are made of."""
        if not isinstance(node, fx.Node) or not is_tensor(node):
            return Refusal("the scores are a constant", str(node))
        if node in self.failed:
            return self.failed[node]
        self.failed[node] = Refusal("the scores are too long a chain", str(node))  # until it is known better
        result = self._read(node)
        if result:
            del self.failed[node]
        else:
            self.failed[node] = result
        return result

    def _read(self, node: fx.Node) -> Scores | Refusal:
        found = self.pairwise(node)
        if found is not None:
            if node not in self.mixed:
                self.mixed[node] = self._mixed(node, found.factors, found.layout)
            mixed = self.mixed[node]
            return self._begin(found, node) if mixed is None else mixed
        rule = RULES.get(op(node))
        if rule is None:
            return self._unknown(node)
        result = rule(self, node)
        if result:
            result.path.append(node)
        return result

    def pairwise(self, node: fx.Node) -> Product | None:
        """A product of two tensors that were both computed."""
        found = product(node)
        return None if found is None or any(self.is_weight(factor.node) for factor in found.factors) else found

    def _begin(self, found: Product, node: fx.Node) -> Scores | Refusal:
        scores = Scores(found, found.layout, steps=[found.spelling], path=[node])
        if not same(found.alpha, 1):
            multiply(scores, found.alpha)
        if found.bias is not None:
            bias = Side(found.bias, aligned(found.bias, found.layout))
            scores.masks.append(bias)
            if not same(value(found.beta), 1):
                bias.factors.append(("mul", found.beta))
        return scores

    def _mixed(self, node: fx.Node, factors: tuple[Factor, ...], made: Layout) -> Refusal | None:
        """Talking heads: a product that sums scores over something else than their queries and keys."""
        for factor in factors:
            if op(factor.node) in (*MATMULS, "einsum", *RULES):
                inner = self(factor.node)
                summed = [i for i, dim in enumerate(factor.layout) if dim and not set(dim) & set(flat(made))]
                if inner and not any(of_pairs(inner, inner.layout[i]) for i in summed):
                    return mixed_heads(node)
        return None

    def _unknown(self, node: fx.Node) -> Refusal:
        name = op(node)
        if name in MIXERS:
            inner = self(node.args[0])
            if inner and not of_pairs(inner, inner.layout[MIXERS[name]]):
                return mixed_heads(node)
        if name in MATMULS or name == "einsum":
            found = product(node)
            others = [f for f in found.factors if not self.is_weight(f.node)] if found is not None else []
            mixed = self._mixed(node, tuple(others), found.layout) if found is not None else None
            if mixed is not None:
                return mixed
        return Refusal(f"the scores pass through {name or node.name}", str(node), HINT)


RULES: dict[str, Callable[[Climb, fx.Node], Scores | Refusal]] = {
    **dict.fromkeys((*CASTS, *COPIES), through),
    **dict.fromkeys((*REGROUPS, *PERMUTES, *EXPANDS), view),
    **dict.fromkeys(("mul", "div", "multiply", "divide", "true_divide", "mul_", "div_"), scaled),
    **dict.fromkeys(("add", "sub", "subtract", "add_", "sub_"), added),
    **dict.fromkeys(("masked_fill", "masked_fill_"), masked_fill),
    "index_put": index_put,
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), clamped),
    "neg": negated,
    "where": where,
    "tanh": tanh,
    "cat": concatenated,
    "dropout": dropout,
}


def reaches_product(node: Any, climb: Climb, limit: int = 64) -> fx.Node | None:
    """A product of two computed tensors behind a softmax, with no projection in between: an attention, then."""
    seen, queue = set(), [node]
    while queue and len(seen) < limit:
        current = queue.pop(0)
        if current in seen or not is_tensor(current) or "softmax" in op(current):
            continue
        seen.add(current)
        found = product(current)
        if found is not None and climb.pairwise(current) is None:
            continue  # a projection
        if found is not None and {0, 1} <= set(found.alone):
            return current
        if op(current) not in ("linear", "addmm", "conv1d", "conv2d", "embedding"):
            queue.extend(current.all_input_nodes)
    return None
