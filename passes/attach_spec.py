"""Attach the spec: which pattern each query head of each site gets, on top of the model's own mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.expr import conjunction, substitute, variables
from sparsify.passes.nodes import shape
from sparsify.passes.recover_masks import is_causal
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site


@dataclass(frozen=True)
class AttachSpec:
    """Patterns to heads.

    Before: site.keep is the model's own mask.
    After:  site.programs has, for every query head, that mask and the head's pattern: both have to keep a pair.
            Without a spec, or where no rule of the spec matches, a head keeps what the model keeps.
    """

    spec: Any = None

    def __call__(self, capture: Capture) -> None:
        sites = capture.open_sites()
        found: list[Any] = [None] * len(sites)
        if self.spec is not None:
            found = self.spec.resolve([info(site) for site in sites], complete=False)
        for site, patterns in zip(sites, found, strict=True):
            heads = shape(site.q)[1]
            site.patterns = patterns
            rules = [substitute(pattern.keep(), {"q": site.position}) for pattern in patterns or ()]
            if any("q" in variables(rule) for rule in rules) and not site.positions_known:
                site.refuse(
                    "the absolute positions of the queries are not known, and the spec's pattern depends on them",
                    "the mask of this site could not be raised to a closed form",
                )
            keeps = {rule: conjunction([site.keep, rule]) for rule in rules}
            site.programs = tuple(keeps[rule] for rule in rules) if rules else (site.keep,) * heads


def info(site: Site) -> Any:
    """The site as the spec sees it."""
    from sparsify.spec import SiteInfo

    return SiteInfo(
        address=site.address,
        layer=site.layer,
        kind=site.kind,
        causal=is_causal(site),
        heads=shape(site.q)[1],
        kv_heads=shape(site.k)[1],
    )
