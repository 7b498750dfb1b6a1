"""Number sites: which layer a site is, and which use of its module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sparsify.addresses import shape_of
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site


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
        for ordinal, site in enumerate(capture.sites):
            site.use = uses[site.address]
            uses[site.address] += 1
            site.layer, site.layers = _numbered(site, capture, ordinal)


def _numbered(site: Site, capture: Capture, ordinal: int) -> tuple[int, int | None]:
    """(the layer, how many there are, if that is known)."""
    parts = site.address.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(places) == 1:
        prefix = ".".join(parts[: places[0]])
        return int(parts[places[0]]), _children(prefix, capture)
    alike = _alike(site.address, capture) if places else []
    if site.address in alike:
        return alike.index(site.address), len(alike)
    return ordinal, None


def _children(prefix: str, capture: Capture) -> int | None:
    """How many numbered modules stand under a path."""
    start = f"{prefix}." if prefix else ""
    found = [path.removeprefix(start).split(".")[0] for path in capture.classes if path.startswith(start)]
    return max((int(part) + 1 for part in found if part.isdigit()), default=None)


def _alike(address: str, capture: Capture) -> list[str]:
    """The paths of the modules of one class that differ from an address in numbers only, in the model's order."""
    shape, kind = shape_of(address), capture.classes.get(address)
    return [path for path, cls in capture.classes.items() if cls is kind and shape_of(path) == shape]
