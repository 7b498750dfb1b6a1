"""Pictures of what each head keeps: one PNG, or one HTML page that needs nothing but itself.

draw({"model.layers.0.self_attn": [window(64)] * 8}, length=4096, path="masks.html")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.files import write_whole
from sparsify.patterns import Pattern
from sparsify.pictures.scene import Scene

__all__ = ["Scene", "draw"]


def draw(
    sites: Mapping[str, Sequence[Pattern]],
    length: int,
    path: str | Path,
    *,
    queries: int | None = None,
    causal: bool = True,
    names: Mapping[str, Pattern] | None = None,
    masks: Mapping[Pattern, Any] | None = None,
    title: str = "What each head keeps",
) -> Path:
    """Draws the pattern of each head of each site at a sequence length, and returns the path.

    `sites` maps addresses to one pattern per query head. `queries` is how many queries there are, the last ones of
    the `length` positions (default: all). With `causal`, the model's own causal mask is drawn and counted, too.
    `names` names patterns in the legend; `masks` gives bool arrays (heads, queries, length) of what is kept by patterns
    that choose by data. The path's ending, .png (needs matplotlib) or .html, chooses what is made.
    The file is there whole or not at all. Raises InputError.
    """
    path = Path(path)
    if path.suffix not in (".png", ".html"):
        raise InputError(f"draw: path: expected a name that ends in .png or .html, found '{path.name}'")
    scene = Scene.of(sites, length, queries=queries, causal=causal, names=names or {}, masks=masks or {}, title=title)
    if path.suffix == ".png":
        from sparsify.pictures.png import png

        content: str | bytes = png(scene)
    else:
        from sparsify.pictures.page import html

        content = html(scene)
    write_whole(path, content, "draw: path")
    return path
