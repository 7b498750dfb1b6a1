"""Choose the target: who runs each site, or why nobody can."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import codegen
from sparsify.passes.nodes import dtype, shape, value
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.patterns.layouts.lay_out import LaidOut
from sparsify.program import Program


@dataclass(frozen=True)
class ChooseTarget:
    """Sites to targets.

    Before: sites with their predicates.
    After:  site.target names a target that takes the program; else the site carries that target's Refusal.
    """

    target: str = "auto"

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites():
            name = codegen.choose(value(site.q).device.type) if self.target == "auto" else self.target
            site.target = name
            runner = codegen.target(name)
            site.refusal = runner.unavailable()  # a Refusal is falsy: `or` would lose it
            if site.refusal is None:
                sizes = shape(site.q)[3], shape(site.v)[3]
                site.refusal = runner.refuse(program_of(site), dtype(site.q), *sizes)


def program_of(site: Site) -> Program:
    """The program that a site runs. A symbolic softcap is fixed here, with a guard."""
    laid_out = site.laid_out or LaidOut(site.programs, site.bias, site.sink_bias)
    return Program.of(
        laid_out.keeps,
        **laid_out.fields(),
        loads=len(site.loads),
        softcap=None if site.softcap is None else float(site.softcap),
        skips=site.skips,
        target=site.target,
    )
