"""MoA: `{"alphas": [[...]], "betas": [[...]]}`, a number for each layer and query head."""

from __future__ import annotations

from typing import Any

from sparsify.imports.option import Option
from sparsify.imports.plan import Imported
from sparsify.imports.source import File

NAME, TITLE = "moa", 'MoA: a JSON object with "alphas" and "betas"'
SOURCE = "MoA (Fu et al., arXiv 2406.14909; thu-nics/MoA): spans of alpha + beta (N + max_new) keys, sinks among them"
OPTIONS = {"max_new": Option(int, 1024, "MoA: tokens that will be generated, which its spans count from the start.")}
KEYS = ("alphas", "betas")


def looks(value: Any) -> bool:
    """Whether a JSON value is in this format, be it right or wrong."""
    return isinstance(value, dict) and any(key in value for key in KEYS)


def plan(value: Any, file: File, max_new: int) -> Imported:
    """What the file says. Raises InputError naming the place."""
    for key in value:
        if key not in KEYS:
            raise file.error((key,), "unknown field; allowed: alphas, betas")
    for key in KEYS:
        if key not in value:
            raise file.error((), f"the field '{key}' is missing")
    alphas = file.items(value["alphas"], ("alphas",), "a list with a list for each layer")
    betas = file.items(value["betas"], ("betas",), "a list with a list for each layer", len(alphas))
    layers, patterns = [], {}
    for layer, (left, right) in enumerate(zip(alphas, betas, strict=True)):
        first = file.items(left, ("alphas", layer), "a list with a number for each head")
        second = file.items(right, ("betas", layer), "a list with a number for each head", len(first))
        names = []
        for head, pair in enumerate(zip(first, second, strict=True)):
            alpha = file.number(pair[0], ("alphas", layer, head), -(2**30), 2**30)
            beta = file.number(pair[1], ("betas", layer, head), 0, 1)
            names.append(f"span_{alpha}_{beta}")
            given = {"alpha": alpha, "beta": beta, "max_new": max_new}
            patterns[names[-1]] = {"moa_head": given}
        layers.append(tuple(names))
    note = (
        "A span is named by alpha and beta; its N is that of each call, so it grows while decoding, where MoA's stays."
    )
    return Imported(NAME, file.path, tuple(layers), patterns, notes=(note,))
