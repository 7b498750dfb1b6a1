"""Number sites: which layer a site is, and which use of its module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sparsify.addresses import shape_of
from sparsify.passes.runner import Capture


@dataclass(frozen=True)
class NumberSites:
    """Addresses to numbers.

    Before: sites with the paths of their modules.
    After:  site.layer, site.layers and site.use:
            `model.layers.3.self_attn`   layer 3 of as many as `model.layers` has (a path's one number)
            `decoder.layers.3.cross`     layer 3 of the decoder: each stack counts for itself; `match` tells them apart
            `stages.2.blocks.5.attn`     of several numbers: the place among the model's modules of that class whose
                                         paths differ in numbers only, here after all blocks of stages 0 and 1
            no number                    the site's place in the graph
            A module that is used again (shared layers, ALBERT) has the same address and layer; its uses count from 0.
    """

    def __call__(self, capture: Capture) -> None:
        uses: Counter[str] = Counter()
        stacks, families = _stacks(capture), _families(capture)
        for ordinal, site in enumerate(capture.sites):
            site.use = uses[site.address]
            uses[site.address] += 1
            parts = site.address.split(".")
            places = [i for i, part in enumerate(parts) if part.isdigit()]
            alike = families.get((capture.classes.get(site.address), shape_of(site.address)), {})
            if len(places) == 1:
                site.layer, site.layers = int(parts[places[0]]), stacks.get(".".join(parts[: places[0]]))
            elif places and site.address in alike:
                site.layer, site.layers = alike[site.address], len(alike)
            else:
                site.layer, site.layers = ordinal, None


def _stacks(capture: Capture) -> dict[str, int]:
    """How many numbered modules stand under a path, for each path that has some."""
    found: dict[str, int] = {}
    for path in capture.classes:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                prefix = ".".join(parts[:i])
                found[prefix] = max(found.get(prefix, 0), int(part) + 1)
    return found


def _families(capture: Capture) -> dict[tuple[object, str], dict[str, int]]:
    """The modules of one class whose paths differ in numbers only: the place of each, in the model's order."""
    found: dict[tuple[object, str], dict[str, int]] = {}
    for path, cls in capture.classes.items():
        family = found.setdefault((cls, shape_of(path)), {})
        family[path] = len(family)
    return found
