"""MInference: a JSON list with an object for each layer, `{"0": ["vertical_and_slash", 1000, 6096, score], ...}`."""

from __future__ import annotations

from typing import Any

from sparsify.errors import nearest
from sparsify.imports.plan import Imported
from sparsify.imports.source import File, Where, numbered
from sparsify.spec.source import shown

NAME, TITLE = "minference", 'MInference: a JSON list of layers with ["vertical_and_slash", 1000, 6096, score] by head'
SOURCE = "MInference (Jiang et al., arXiv 2407.02490; microsoft/MInference): a class and two numbers for each head"
OPTIONS: dict[str, Any] = {}
CLASSES = {  # what the released kernels make of a class and its two numbers
    "vertical_and_slash": ("lines_{}_{}", lambda a, b: {"minference_lines": {"verticals": a, "slashes": b}}),
    "stream_llm": ("a_shape_{}_{}", lambda a, b: {"a_shape": {"sinks": a, "local": b}}),
    "block_sparse": ("blocks", lambda a, b: {"minference_blocks": {}}),  # they take 100 blocks whatever is written
}


def looks(value: Any) -> bool:
    """Whether a JSON value is in this format, be it right or wrong."""
    return isinstance(value, list)


def plan(value: Any, file: File) -> Imported:
    """What the file says. Raises InputError naming the place."""
    layers, patterns = [], {}
    for layer, heads in enumerate(file.items(value, (), "a list with an object for each layer")):
        if not isinstance(heads, dict) or not heads:
            raise file.error((layer,), f"expected an object with an entry for each head, found {shown(heads)}")
        numbers = numbered(heads, file, (layer,), "head")
        found = {number: _head(heads[str(number)], (layer, str(number)), file) for number in numbers}
        patterns.update(found.values())
        layers.append(tuple(found[number][0] for number in range(len(found))))
    note = "For prefill only: MInference decodes densely. What a head's search scored is left out."
    return Imported(NAME, file.path, tuple(layers), patterns, phase="prefill", notes=(note,))


def _head(entry: Any, where: Where, file: File) -> tuple[str, dict[str, Any]]:
    """The name and the form of a head's pattern."""
    entry = file.items(entry, where, "a list of a class, two numbers and a score", 4)
    kind = entry[0]
    if not isinstance(kind, str) or kind not in CLASSES:
        hint = nearest(kind, CLASSES) if isinstance(kind, str) else f"allowed: {', '.join(CLASSES)}"
        raise file.error((*where, 0), f"unknown class {shown(kind)}; {hint}")
    name, form = CLASSES[kind]
    numbers = []
    for place in (1, 2):
        number = file.number(entry[place], (*where, place), 1 if (kind, place) == ("stream_llm", 2) else 0, 2**30)
        if not isinstance(number, int):
            raise file.error((*where, place), f"expected an integer, found {number}")
        numbers.append(number)
    return name.format(*numbers), form(*numbers)
