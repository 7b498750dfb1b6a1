"""Scores of retrieval heads: `{"layer-head": [score of each sample, ...]}`, of which a mixture is made."""

from __future__ import annotations

import re
from typing import Any

from sparsify.errors import InputError
from sparsify.imports.duo_attention import OPTIONS as DUO
from sparsify.imports.option import Option
from sparsify.imports.plan import Imported
from sparsify.imports.source import File

NAME, TITLE = "retrieval_heads", 'scores of retrieval heads: a JSON object with "layer-head": [scores]'
SOURCE = "Scores of retrieval heads (Wu et al., arXiv 2404.15574; nightdessert/Retrieval_Head)"
THRESHOLD, SINKS, RECENT = 0.1, 64, 256  # the paper's threshold; what DuoAttention's other heads keep when deployed
OPTIONS = {
    "top": Option(int, None, "Retrieval heads: how many heads are dense, those of the best mean scores.", 1),
    **{name: DUO[name] for name in ("threshold", "sinks", "recent")},
}
_KEY = re.compile(r"(0|[1-9][0-9]{0,4})-(0|[1-9][0-9]{0,4})")


def looks(value: Any) -> bool:
    """Whether a JSON value is in this format, be it right or wrong."""
    return isinstance(value, dict) and any(re.match(r"\d+\D\d+", str(key)) for key in value)


def plan(
    value: Any, file: File, top: int | None, threshold: float | None, sinks: int | None, recent: int | None
) -> Imported:
    """What the file says. Raises InputError naming the place."""
    if top is not None and threshold is not None:
        raise InputError("import: top and threshold both say which heads are dense; give one")
    scores = _means(value, file)
    best = sorted(scores, key=lambda key: (-scores[key], key))
    if top is not None and top > len(best):
        raise InputError(f"import: top: the file has {len(best)} heads, found {top}")
    least = THRESHOLD if threshold is None else threshold
    dense = set(best[:top] if top is not None else (key for key in best if scores[key] >= least))
    layers = [[] for _ in range(1 + max(layer for layer, _ in scores))]
    for key in sorted(scores):
        layers[key[0]].append("dense" if key in dense else "streaming")
    given = {"sinks": SINKS if sinks is None else sinks, "recent": RECENT if recent is None else recent}
    how = f"the {top} best" if top is not None else f"those with a mean score of {least:g} or more"
    notes = (
        f"Dense are {len(dense)} of the {len(scores)} heads: {how}.",
        "A score is no mask: what the others keep is chosen.",
    )
    forms = {"streaming": {"duo_streaming": given}}
    return Imported(NAME, file.path, tuple(map(tuple, layers)), forms, notes=notes)


def _means(value: dict[str, Any], file: File) -> dict[tuple[int, int], float]:
    """The mean score of each (layer, head), of which none is missing. Raises InputError naming the place."""
    found: dict[tuple[int, int], float] = {}
    for key, samples in value.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise file.error((key,), "expected a key such as '3-17', a layer and a head")
        numbers = file.items(samples, (key,), "a list of scores, one a sample")
        scores = [file.number(one, (key, place), 0) for place, one in enumerate(numbers)]
        found[int(match[1]), int(match[2])] = sum(scores) / len(scores)
    heads = 1 + max(head for _, head in found)
    for layer in range(1 + max(layer for layer, _ in found)):
        missing = next((head for head in range(heads) if (layer, head) not in found), None)
        if missing is not None:
            raise file.error((), f"head '{layer}-{missing}' is missing, expected {heads} heads in each layer")
    return found
