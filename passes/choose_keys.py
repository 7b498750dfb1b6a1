"""Choose keys: selectors become ops in the graph, and what they choose becomes lists in the programs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify.errors import PatternError
from sparsify.expr import TRUE, Chosen, Expr, Pred, Var, as_expr, conjunction
from sparsify.passes.attach_spec import phase
from sparsify.passes.forms.caches import forgets
from sparsify.passes.nodes import ATEN, call, same, shape, size
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Online, Selector
from sparsify.program import Skip
from sparsify.ranges import contains
from sparsify.selection.site import Ask, lists_of, segments_of, select, usable_keys

Q, K, N, NQ = (Var(name) for name in ("q", "k", "N", "Nq"))


@dataclass
class Made:
    """The nodes of one choice: (index, count) for each of its lists, and the order of the keys, if it has one."""

    lists: list[tuple[fx.Node, fx.Node]]
    order: fx.Node | None
    q_len: Any
    k_len: Any


@dataclass(frozen=True)
class ChooseKeys:
    """Choices to lists.

    Before: site.programs say `chosen(...)`, with the text of a selector.
    After:  the graph has a `sparsify.select` op before the site's output, its results are loads of the site, and the
            programs say `listed(...)`; layers that reuse a choice share the op. Where a layer is dense they keep
            everything, and what the kernel skips by itself is in site.skips. Where a selector sorts the keys,
            site.segments says how, and the programs are over its slots.
    """

    def __call__(self, capture: Capture) -> None:
        made: dict[tuple[int | None, str], Made] = {}
        for site in capture.open_sites():
            _choose(site, made)


def _choose(site: Site, made: dict[tuple[int | None, str], Made]) -> None:
    try:
        found = [choices(program) for program in site.programs]
    except PatternError as error:
        return site.refuse(str(error))
    if any(len(of_head) > 1 for of_head in found):
        return site.refuse("a head has two selections, which could choose a key twice", "give each head one selection")
    replaced: dict[Chosen, Pred] = {}
    skips: dict[Chosen, Skip] = {}
    for chosen in dict.fromkeys(one for of_head in found for one in of_head):
        choice = Choice.parse(chosen.text)
        if isinstance(choice.selector, Online):
            replaced[chosen], skips[chosen] = TRUE, Skip(choice.selector.value, choice.selector.per_length)
        elif choice.dense_layers and site.layer is not None and contains(choice.dense_layers, site.layer):
            replaced[chosen] = TRUE
        else:
            replaced[chosen] = _listed(site, choice, chosen, made)
        if not site.open:
            return None
    if site.segments is not None and len({*found}) > 1:
        return site.refuse(
            "the heads share one order of keys, and only some of them have the selection that sorts them",
            "give all heads of this site that selection",
        )
    if skips:
        site.skips = tuple(skips.get(of_head[0]) if of_head else None for of_head in found)
    keep = site.segments.keep if site.segments else (lambda program: program)
    site.programs = tuple(with_choices(keep(program), replaced) for program in site.programs)
    return None


def _listed(site: Site, choice: Choice, chosen: Chosen, made: dict[tuple[int | None, str], Made]) -> Pred:
    """The lists of a choice, made here or by the layer whose choice this one takes."""
    selector = choice.selector
    assert isinstance(selector, Selector)
    causal = _is_causal(site, chosen)
    _check(site, selector, causal)
    source = choice.reuse.source_of(site.layer)
    if choice.reuse.layers and site.layer is None:
        site.refuse("the spec reuses choices by layer, and which layer this is is not known")
    if not site.open:
        return TRUE
    if source is None:
        lists = _made(site, selector, causal)
        made[site.layer, chosen.text] = lists
        if choice.reuse.is_source(site.layer) and choice.reuse.source == "dense":
            return TRUE
        return _atoms(site, selector, lists)
    lists = made.get((source, chosen.text))
    if lists is None:
        site.refuse(
            f"layer {site.layer} is to take the choice of layer {source}, which makes none in this graph",
            f"give layer {source} the same selection (neither dense nor refused), without a graph break between them",
        )
        return TRUE
    if not (same(lists.q_len, shape(site.q)[2]) and same(lists.k_len, shape(site.k)[2])):
        site.refuse(f"layer {site.layer} is to take the choice of layer {source}, which has other lengths")
    return _atoms(site, selector, lists)


def _check(site: Site, selector: Selector, causal: bool) -> None:
    """Refuses a site that the selector doesn't serve."""
    here = phase(site)
    if selector.phase not in ("both", here):
        other = "`phase: decode`" if selector.phase == "decode" else "`phase: prefill`"
        site.refuse(f"the selection serves {selector.phase}, and this is {here}", f"give the spec's rule {other}")
    if selector.learned is not None:
        hint = f"give it as options={{'learned': {{'{selector.learned}': module}}}}"
        site.refuse(f"the selection's module '{selector.learned}' was not given", hint)
    if not site.heads_known:
        site.refuse("a selection is made by heads, and which dimension of the scores is the heads is not known")
    if not site.positions_known:
        site.refuse("the absolute positions of the queries are not known, and a selection depends on them")
    if (selector.force.sink or (selector.lines and selector.lines.first)) and forgets(site.k):
        site.refuse("the selection's sinks are absolute positions, and the cache drops its oldest keys")
    if selector.permute and not causal:
        site.refuse("the selection sorts keys inside segments, which a causal attention alone can tell apart")


def _is_causal(site: Site, chosen: Chosen) -> bool:
    """Whether the heads with this choice see no key after their query."""
    mine = [program for program in site.programs if chosen in choices(program)]
    return same(shape(site.q)[2], 1) or all(conjunction([p, site.position >= K]) == p for p in mine)


def _made(site: Site, selector: Selector, causal: bool) -> Made:
    """The op's nodes, before the site's output."""
    before = site.output
    one = bool(same(shape(site.q)[2], 1))
    ask = Ask(selector, site.position, usable_keys(site.keep, one), causal)
    k = site.k
    if not same(shape(k)[0], shape(site.q)[0]):
        k = call(before, ATEN.expand.default, k, [size(before, site.q, 0), -1, -1, -1])
    numbers = site.q_offset, float(site.scale), ask.text()
    found = call(before, select, site.q, k, list(site.loads), None, *numbers)
    parts = [call(before, operator.getitem, found, i) for i in range(2 * len(selector.units()))]
    order = call(before, operator.getitem, found, len(parts)) if selector.permute else None
    return Made(list(zip(parts[::2], parts[1::2], strict=True)), order, shape(site.q)[2], shape(k)[2])


def _atoms(site: Site, selector: Selector, made: Made) -> Pred:
    """The lists as one predicate, over new loads of the site."""
    first = len(site.loads)
    nodes = [node for pair in made.lists for node in pair] + ([] if made.order is None else [made.order])
    site.loads += tuple(nodes)
    site.load_names += tuple(node.name for node in nodes)
    heads = shape(site.q)[1], shape(site.k)[1]
    listed = lists_of(selector, first, *heads, _row(site, selector.unit.q))
    segments = segments_of(selector, len(site.loads) - 1, *heads, site.position)
    if segments is None:
        return listed
    site.segments = segments
    return segments.chosen(listed)


def _row(site: Site, unit: int) -> Expr:
    """A query's number from the first query on; 0 where all queries share one row of lists."""
    q_len = shape(site.q)[2]
    if isinstance(q_len, int) and q_len <= unit:
        return as_expr(0)
    return Q - (as_expr(site.q_offset) if isinstance(site.q_offset, int) else N - NQ)
