"""Attach the spec: which pattern each query head of each site gets, on top of the model's own mask."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from sparsify.expr import Load, Var, conjunction
from sparsify.passes.forms.caches import forgets, moves_along
from sparsify.passes.nodes import call, same, shape
from sparsify.passes.recover_masks import is_causal
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.patterns.grid import grids
from sparsify.selection.site import last_key
from sparsify.text import to_text
from sparsify.walk import loads, substitute, variables


@dataclass(frozen=True)
class AttachSpec:
    """Patterns to heads.

    Before: site.keep is the model's own mask.
    After:  site.programs has, for every query head, that mask and the head's pattern: both have to keep a pair.
            Without a spec, or where no rule of the spec matches, a head keeps what the model keeps.
    """

    spec: Any = None
    placed: bool = True

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites() if not self.placed else ():
            site.refuse(
                "which layer this is can't be told: after a graph break the layers share one compiled function",
                "remove the graph break, or run without a spec",
            )
        for site in capture.open_sites() if self.spec is not None else ():
            _check_rule(site, self.spec.rule(info(site)))
            _check_uses(site, self.spec, capture.home)
        sites = capture.open_sites()
        found: list[Any] = [None] * len(sites)
        if self.spec is not None:
            found = self.spec.resolve([info(site) for site in sites], complete=False)
        for site, patterns in zip(sites, found, strict=True):
            heads = shape(site.q)[1]
            site.patterns = patterns
            _check_shapes(site)
            if patterns:
                _find_query(site)
            rules = [substitute(pattern.keep(), {"q": site.position}) for pattern in patterns or ()]
            if any("q" in variables(rule) for rule in rules) and not site.positions_known:
                site.refuse(
                    "the absolute positions of the queries are not known, and the spec's pattern depends on them",
                    "the mask of this site could not be raised to a closed form",
                )
            if not all(moves_along(pattern.keep()) for pattern in patterns or ()) and forgets(site.k):
                site.refuse(
                    "the spec's pattern depends on absolute positions, and the cache drops its oldest keys",
                    "give this site windows, or a cache that keeps all keys",
                )
            keeps = {rule: conjunction([site.keep, rule]) for rule in rules}
            site.programs = tuple(keeps[rule] for rule in rules) if rules else (site.keep,) * heads


def _find_query(site: Site) -> None:
    """The position of a single query from the mask, where tensors say which keys it may use: that of the last one.

    It is the last of all keys behind padding, but not where a cache has room for keys to come and the mask that leaves
    them out was made outside of the graph.
    """
    reads_keys = any("k" in variables(load) for load in loads(site.keep))
    if site.kind == "self" and site.position == Var("q") and reads_keys and same(shape(site.q)[2], 1):
        node = call(site.output, last_key, site.q, site.k, list(site.loads), site.q_offset, to_text(site.keep))
        site.position = Load(f"_{len(site.loads)}", (Var("b"),))
        site.loads += (node,)
        site.load_names += (node.name,)


def _check_rule(site: Site, rule: Any) -> None:
    """Refuses a site where what the rule speaks of is not known: heads, or positions of queries among the keys."""
    if rule is None:
        return
    if not site.heads_known and rule.tells_heads_apart():
        site.refuse(
            "the spec tells heads apart, and which dimension of the scores is the heads is not known",
            "give all heads of this site one pattern, or keep batch and heads apart, as (B, H, N, D), in the model",
        )
    by_position = any("q" in variables(group.pattern.keep()) for group in rule.groups)
    if site.kind == "cross" and "cross" not in rule.kinds and by_position:
        site.refuse(
            "the spec's pattern compares positions of queries and keys, and this is cross attention",
            "say `kind: cross` in the rule if that is meant, or `kind: self` if not",
        )


def _check_shapes(site: Site) -> None:
    """Refuses a site whose keys are not the tokens of its patterns' grids. A dynamic length is fixed by the grid's."""
    for pattern in dict.fromkeys(site.patterns or ()):
        wrong = pattern.fits(int(shape(site.k)[2])) if grids(pattern) else ""
        if wrong:
            site.refuse(wrong, "give the shape of the tokens that this site sees, and the others to global_tokens")
            site.misfit = True


def _check_uses(site: Site, spec: Any, home: str) -> None:
    """Refuses a site where a rule tells uses of a module apart that share one compiled function."""
    if home and any(rule.uses is not None and fnmatchcase(site.address, rule.match) for rule in spec.rules):
        site.refuse(
            "which use of its module this is can't be told: after a graph break they share one compiled function",
            "remove the graph break, or leave `uses` out of the spec",
        )


def phase(site: Site) -> Literal["prefill", "decode"]:
    """Decode is one query: a step of generation."""
    return "decode" if site.q is not None and same(shape(site.q)[2], 1) else "prefill"


def info(site: Site) -> Any:
    """The site as the spec sees it. One that was refused before its heads were found has none."""
    from sparsify.spec import SiteInfo

    if site.q is None or site.k is None:
        where = {"use": site.use, "layers": site.layers}
        return SiteInfo(site.address, site.layer, site.kind, causal=False, heads=0, kv_heads=0, **where)
    return SiteInfo(
        address=site.address,
        layer=site.layer,
        kind=site.kind,
        causal=is_causal(site),
        heads=shape(site.q)[1],
        kv_heads=shape(site.k)[1],
        use=site.use,
        phase=phase(site),
        layers=site.layers,
    )
