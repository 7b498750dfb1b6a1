"""Find sites: anchor at SDPA or softmax, and walk outward through operations that only transform the score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.aliasing import Writes
from sparsify.passes.forms.arrange import Unplaced
from sparsify.passes.forms.assemble import Parts, assemble, zero_dimensional
from sparsify.passes.forms.axes import leaves
from sparsify.passes.forms.climb import Climb, reaches_product
from sparsify.passes.forms.roles import roles
from sparsify.passes.forms.scores import MixedHeads, Scores
from sparsify.passes.forms.sdpa import from_sdpa
from sparsify.passes.forms.softmaxes import Softmax, softmax
from sparsify.passes.forms.sources import kind_of, projected, weights_of
from sparsify.passes.forms.weights import Descent, descend
from sparsify.passes.forms.whole import bodies, is_whole, whole_site
from sparsify.passes.nodes import is_tensor, module_path, op
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site


@dataclass(frozen=True)
class FindSites:
    """Forms to sites.

    Before: matmul(q, transpose(k)) > mul > add > softmax > to > dropout(eval) > matmul(v), or one SDPA call.
    After:  the graph computes what it did; `capture.sites` has a Site with q, k, v (KV heads not repeated; nodes that
            may be new, in front of the output), scale, softcap and masks, or with a Refusal that names the node that
            could not be followed.
    """

    def __call__(self, capture: Capture) -> None:
        finder = Finder(capture.graph, weights_of(capture.graph, capture.example_inputs))
        for node in list(capture.graph.nodes):
            for site in [finder.site(node), *_inside(node)]:
                if site is not None:
                    _add(site, node, capture)


def _add(site: Site, node: fx.Node, capture: Capture) -> None:
    site.address = module_path(node, capture.names) or capture.home
    if site.refusal is None:
        site.kind = kind_of(site.q, site.k)
    capture.sites.append(site)


def _inside(node: fx.Node) -> list[Site]:
    """The sites of graphs that a node decides to call, all refused: what is known of them ends at that node."""
    sites = []
    for body in bodies(node):
        finder = Finder(body, weights_of(body, ()), reads_only=True)
        sites += [Site(node, node, site.form) for inner in body.nodes if (site := finder.site(inner)) is not None]
    for site in sites:
        reason = f"the attention is inside a graph that {getattr(node.target, '_name', node.name)} calls"
        site.refuse(reason, "call the module without it, or under torch.no_grad() if it is a checkpoint")
    return sites


class Finder:
    """Reads the sites of one graph; with `reads_only` it adds no nodes for them."""

    def __init__(self, graph: fx.Graph, weights: set[fx.Node], reads_only: bool = False) -> None:
        self.graph, self.weights, self.reads_only = graph, weights, reads_only
        self.failed: dict[fx.Node, Refusal] = {}
        self.mixed: dict[fx.Node, Refusal | None] = {}

    @cached_property
    def writes(self) -> Writes:
        return Writes(self.graph)

    def site(self, node: fx.Node) -> Site | None:
        name = op(node)
        if name == "scaled_dot_product_attention":
            return self._arranged(Site(node, node, "sdpa"), from_sdpa)
        if is_whole(node):
            return whole_site(node)
        found = softmax(node)
        return None if found is None or not is_tensor(found.scores) else self._from_softmax(found)

    def _from_softmax(self, found: Softmax) -> Site | None:
        way = descend(found)
        if way is None:
            return None
        origin = projected(way.values) if isinstance(way, Descent) else set()
        climb = Climb(self.weights.__contains__, lambda node: bool(projected(node) & origin), self.failed, self.mixed)
        if not isinstance(way, Descent):
            if reaches_product(found.scores, climb) is None:
                return None
            return self._refused(found.node, found.node, "matmul > softmax", way)
        scores = climb(found.scores)
        if not scores:
            if not isinstance(scores, MixedHeads) and reaches_product(found.scores, climb) is None:
                return None  # a router or a pooling head: a softmax, but no product of queries and keys
            return self._refused(found.node, way.output, "matmul > ... > softmax > matmul", scores)
        if not {0, 1} <= set(scores.product.alone):
            return None  # a score of each pair of rows, not of all pairs
        form = " > ".join([*scores.steps, found.spelling, *way.steps, op(way.output)])
        site = Site(found.node, way.output, form)
        self._check_path(site, scores)
        if site.refusal is not None:
            return site
        return self._arranged(site, lambda site: _read(site, found, scores, way))

    def _refused(self, anchor: fx.Node, output: fx.Node, form: str, why: Refusal) -> Site:
        site = Site(anchor, output, form)
        site.refusal = why
        return site

    def _arranged(self, site: Site, read: Any) -> Site:
        try:
            parts = read(site)
            if site.refusal is None and not self.reads_only:
                assemble(site, parts)
        except Unplaced as why:
            site.refuse(str(why))
        return site

    def _check_path(self, site: Site, scores: Scores) -> None:
        """Refuses scores that are written to between two steps, and masks that are made of the scores."""
        path = [*scores.path, site.anchor]
        for node, reader in pairwise(path):
            writer = self.writes.between(node, reader)
            if writer is not None:
                site.refuse(f"{node.name} is changed in place by {writer.name} before the softmax", node=writer)
        for side in scores.masks + scores.multipliers:
            if _is_made_of(side.node, path[0]):
                hint = "kernels that never store the scores can't compute it"
                site.refuse(f"the mask {side.node.name} is made of the scores", hint)


def _is_made_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node depends on another one, by the nodes between them."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current is source:
            return True
        if current not in seen and source < current:
            seen.add(current)
            queue.extend(current.all_input_nodes)
    return False


def _read(site: Site, found: Softmax, scores: Scores, way: Descent) -> Parts:
    """The parts of an attention that is spelled out."""
    if scores.in_tanh:
        scores.softcap = 1.0
    site.scale, site.softcap = scores.scale, scores.softcap
    parts = roles(scores, scores.layout[found.dim], way)
    _check_norm(found, scores, way, parts)
    if found.sink is not None:
        if scores.shifted or parts.sink is not None:
            raise Unplaced("a number is added to the sum of exponentials from which a maximum was taken off")
        site.sink = zero_dimensional(found.sink, site.output)
    if any(leaves(over) not in ((), leaves(parts.keys), leaves(scores.layout[found.dim])) for over in scores.maxima):
        raise Unplaced("a maximum over something else than the keys is taken off the scores")
    if any(set(leaves(over)) & set(leaves(parts.keys)) for over in scores.stretched):
        raise Unplaced("the scores are shifted and then multiplied by a tensor that differs from key to key")
    return parts


def _check_norm(found: Softmax, scores: Scores, way: Descent, parts: Parts) -> None:
    """Raises Unplaced where exponentials are divided by other sums than those of their own rows."""
    if found.norm is None:
        return
    divided = scores.layout if found.divisor is not None else parts.output
    divisor = found.divisor or way.divisor
    if divisor is None or not found.norm.fits(divisor, scores.layout, found.dim, divided):
        raise Unplaced("the exponentials of the scores are divided by sums that are not those of their rows")
