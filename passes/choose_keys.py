"""Choose keys: selectors become ops in the graph, and what they choose becomes lists in the programs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify.errors import PatternError
from sparsify.expr import TRUE, Chosen, Pred, Var, conjunction
from sparsify.passes.attach_spec import phase
from sparsify.passes.forms.caches import forgets
from sparsify.passes.nodes import same, shape
from sparsify.passes.runner import Capture
from sparsify.passes.selection_nodes import Chooser, Learned, Lists
from sparsify.passes.site import Site
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Lifetimes, Online, Selector
from sparsify.program import Skip
from sparsify.ranges import contains

Made = dict[tuple[int | None, str], Lists]  # what the sites before have chosen, by layer and choice


@dataclass(frozen=True)
class ChooseKeys:
    """Choices to lists.

    Before: site.programs say `chosen(...)`, with the text of a selector.
    After:  the graph has a `sparsify.select` op before the site's output, its results are loads of the site, and the
            programs say `listed(...)`; layers that reuse a choice share the op. Where a layer is dense they keep
            everything, and what the kernel skips by itself is in site.skips. How long a key lives is a load of the
            site, too (`q <= expiry[b, h, k]`). Where a selector sorts the keys, site.segments says how, and the
            programs are over its slots.

    learned: the modules that score units, by name.
    """

    learned: Learned = field(default_factory=dict)

    def __call__(self, capture: Capture) -> None:
        chooser, made = Chooser(capture, self.learned), Made()
        for site in capture.open_sites():
            _choose(site, chooser, made)


def _choose(site: Site, chooser: Chooser, made: Made) -> None:
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
        elif isinstance(choice.selector, Lifetimes):
            replaced[chosen] = _living(site, choice.selector, chooser)
        elif site.layer is not None and contains(choice.dense_layers, site.layer):
            replaced[chosen] = TRUE
        else:
            replaced[chosen] = _listed(site, choice, chosen, chooser, made)
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


def _listed(site: Site, choice: Choice, chosen: Chosen, chooser: Chooser, made: Made) -> Pred:
    """The lists of a choice, made here or by the layer whose choice this one takes."""
    selector, reuse = choice.selector, choice.reuse
    assert isinstance(selector, Selector)
    causal = _is_causal(site, chosen)
    _check(site, choice, causal)
    source = reuse.source_of(site.layer)
    if not site.open:
        return TRUE
    if source is None:
        lists = chooser.lists(site, selector, reuse, causal)
        if lists is not None:
            made[site.layer, chosen.text] = lists
        if lists is None or (reuse.is_source(site.layer) and reuse.source == "dense"):
            return TRUE
        return lists.atoms(site, selector)
    lists = made.get((source, chosen.text))
    if lists is None:
        site.refuse(
            f"layer {site.layer} is to take the choice of layer {source}, which makes none in this graph",
            f"give layer {source} the same selection (neither dense nor refused), without a graph break between them",
        )
        return TRUE
    if not lists.fit(site):
        site.refuse(f"layer {site.layer} is to take the choice of layer {source}, which has other lengths")
    return lists.atoms(site, selector)


def _living(site: Site, lifetimes: Lifetimes, chooser: Chooser) -> Pred:
    """The keys that live at a query, by what a module says of them."""
    if not (site.heads_known and site.positions_known):
        site.refuse("a key of a head lives until a position, and which heads or positions these are is not known")
    elif forgets(site.k):
        site.refuse("a key lives until an absolute position, and the cache drops its oldest keys")
    return chooser.living(site, lifetimes) if site.open else TRUE


def _check(site: Site, choice: Choice, causal: bool) -> None:
    """Refuses a site that the choice doesn't serve."""
    selector, here = choice.selector, phase(site)
    assert isinstance(selector, Selector)
    if selector.phase not in ("both", here):
        hint = f"give the spec's rule `phase: {selector.phase}`"
        site.refuse(f"the selection serves {selector.phase}, and this is {here}", hint)
    if choice.reuse.layers and site.layer is None:
        site.refuse("the spec reuses choices by layer, and which layer this is is not known")
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
    seen = site.position >= Var("k")
    return same(shape(site.q)[2], 1) or all(conjunction([program, seen]) == program for program in mine)
