"""Choose keys: selectors become ops in the graph, and what they choose becomes lists in the programs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify.errors import PatternError
from sparsify.expr import TRUE, Chosen, Pred
from sparsify.passes.attach_spec import phase
from sparsify.passes.forms.caches import forgets
from sparsify.passes.nodes import same, shape
from sparsify.passes.runner import Capture
from sparsify.passes.selection_nodes import Chooser, Learned, Lists
from sparsify.passes.site import Site
from sparsify.patterns.head_choices import check_order, complaint, dropped, head_choices, sees_no_future, skip_of
from sparsify.patterns.head_rules import Lifetimes
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.ranges import contains

Made = dict[tuple[int | None, str], Lists]  # what the sites before have chosen, by layer and choice


@dataclass(frozen=True)
class ChooseKeys:
    """Choices to lists.

    Before: site.programs say `chosen(...)`, with the text of a selector.
    After:  the graph has a `sparsify.select` op before the site's output, its results are loads of the site, and the
            programs say `listed(...)`; layers that reuse a choice share the op. Where a layer is dense they keep
            everything. What the kernel skips by itself is in site.skips, and what is dropped and joins as one key in
            site.dropped. How long a key lives is a load of the site, too (`q <= expiry[b, h, k]`). Where a selector
            sorts the keys, site.segments says how, and the programs are over its slots.

    learned: the modules that score units, by name.
    """

    learned: Learned = field(default_factory=dict)

    def __call__(self, capture: Capture) -> None:
        chooser, made = Chooser(capture, self.learned), Made()
        for site in capture.open_sites():
            _choose(site, chooser, made)


def _choose(site: Site, chooser: Chooser, made: Made) -> None:
    try:
        found = [head_choices(program) for program in site.programs]
    except PatternError as error:
        return site.refuse(str(error))
    replaced: dict[Chosen, Pred] = {}
    for listed in dict.fromkeys(head.listed for head in found if head.listed is not None):
        choice, causal = Choice.parse(listed.text), _is_causal(site, listed)
        _check(site, choice, causal)
        dense = site.layer is not None and contains(choice.dense_layers, site.layer)
        replaced[listed] = TRUE if dense else _listed(site, choice, listed, causal, chooser, made)
        if not site.open:
            return None
    for lives in dict.fromkeys(head.lives for head in found if head.lives is not None):
        lifetimes = Choice.parse(lives.text).selector
        assert isinstance(lifetimes, Lifetimes)
        replaced[lives] = _living(site, lifetimes, chooser)
        if not site.open:
            return None
    skips = {
        online: skip_of(online) for online in dict.fromkeys(head.online for head in found if head.online is not None)
    }
    if skips:
        site.skips = tuple(skips.get(head.online) for head in found)
        replaced |= dict.fromkeys(skips, TRUE)
    if site.segments is not None:
        try:
            check_order(found)
        except PatternError as error:
            return site.refuse(str(error))
    compensates = [head.compensation for head in found]
    if set(compensates) != {None}:
        _check_compensation(site)
        rules = zip(site.programs, compensates, strict=True)
        site.dropped = tuple(dropped(site.keep, keep, mark, site.position) for keep, mark in rules)
        replaced |= {mark: TRUE for mark in compensates if mark is not None}
    keep = site.segments.keep if site.segments else (lambda program: program)
    site.programs = tuple(with_choices(keep(program), replaced) for program in site.programs)
    return None


def _check_compensation(site: Site) -> None:
    """Refuses a site where one key can't stand for those that are dropped."""
    if phase(site) != "decode":
        site.refuse("compensation serves decode, and this is prefill", "give the spec's rule `phase: decode`")
    if site.softcap is not None:
        site.refuse("the model caps its scores, and the score of a mean of keys stands for theirs without a cap only")
    if site.bias:
        site.refuse("the model adds biases to its scores, and a mean of keys has no position to have one")
    if not site.heads_known:
        site.refuse("compensation is made by heads, and which dimension of the scores is the heads is not known")


def _listed(site: Site, choice: Choice, chosen: Chosen, causal: bool, chooser: Chooser, made: Made) -> Pred:
    """The lists of a choice, made here or by the layer whose choice this one takes."""
    selector, reuse = choice.selector, choice.reuse
    assert isinstance(selector, Selector)
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
    if reason := complaint(selector, here == "decode", causal):
        other = selector.phase not in ("both", here)
        site.refuse(reason, f"give the spec's rule `phase: {selector.phase}`" if other else "")
    if (choice.reuse.layers or choice.dense_layers) and site.layer is None:
        site.refuse("the selection tells layers apart, and which layer this is is not known")
    if not site.heads_known:
        site.refuse("a selection is made by heads, and which dimension of the scores is the heads is not known")
    if not site.positions_known:
        site.refuse("the absolute positions of the queries are not known, and a selection depends on them")
    if (selector.force.sink or (selector.lines and selector.lines.first)) and forgets(site.k):
        site.refuse("the selection's sinks are absolute positions, and the cache drops its oldest keys")


def _is_causal(site: Site, chosen: Chosen) -> bool:
    """Whether the heads with this choice see no key after their query."""
    mine = [program for program in site.programs if chosen in choices(program)]
    return same(shape(site.q)[2], 1) or all(sees_no_future(program, chosen, site.position) for program in mine)
