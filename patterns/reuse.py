"""Reuse of a choice: which layers take what another layer chose, and for how many steps a choice holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import PatternError, nearest
from sparsify.ranges import Ranges, contains, read_ranges, text_of

SOURCES = ("sparse", "dense")
FIELDS = ("layers", "source", "every", "cosine")


@dataclass(frozen=True)
class Reuse:
    """What is chosen once and used again.

    layers: (the layer that chooses, the later ones that take its choice), ...; other layers choose for themselves.
    source: whether a layer that chooses for others attends by its choice (`sparse`) or to everything (`dense`,
    TidalDecode). every: a choice holds for so many steps. cosine: and for as long as the mean query is as similar to
    that of the choice; None to not ask.
    """

    layers: tuple[tuple[int, Ranges], ...] = ()
    source: str = "sparse"
    every: int = 1
    cosine: float | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise PatternError(f"reuse.source: unknown '{self.source}'; {nearest(str(self.source), SOURCES)}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise PatternError(f"reuse.every: expected an integer >= 1, found {self.every!r}")
        number = isinstance(self.cosine, int | float) and not isinstance(self.cosine, bool)
        if self.cosine is not None and not (number and -1 <= self.cosine <= 1):
            raise PatternError(f"reuse.cosine: expected a number from -1 to 1, found {self.cosine!r}")
        _check_layers(self.layers)

    @property
    def by_steps(self) -> bool:
        """Whether steps share choices."""
        return self.every > 1 or self.cosine is not None

    def source_of(self, layer: int | None) -> int | None:
        """The layer whose choice a layer takes, None where it chooses for itself."""
        return next((source for source, takers in self.layers if layer is not None and contains(takers, layer)), None)

    def is_source(self, layer: int | None) -> bool:
        """Whether other layers take this one's choice."""
        return any(source == layer for source, _ in self.layers)

    def to_data(self) -> dict[str, Any]:
        """As a spec has it, defaults left out."""
        found: dict[str, Any] = {"layers": {str(source): text_of(takers) for source, takers in self.layers}}
        found |= {"source": self.source, "every": self.every, "cosine": self.cosine}
        default = {"layers": {}, "source": "sparse", "every": 1, "cosine": None}
        return {name: value for name, value in found.items() if value != default[name]}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Reuse:
        """From the form in a spec: {layers: {3: 4-12, 13: [14-31]}, source: dense, every: 8, cosine: 0.9}."""
        if not isinstance(data, Mapping):
            raise PatternError(f"reuse: expected a mapping such as {{layers: {{3: 4-12}}}}, found {data!r}")
        for name in data:
            if name not in FIELDS:
                raise PatternError(f"reuse: unknown field '{name}'; {nearest(str(name), FIELDS)}")
        given = data.get("layers", {})
        if not isinstance(given, Mapping):
            raise PatternError(f"reuse.layers: expected a mapping such as {{3: 4-12, 13: 14-31}}, found {given!r}")
        layers = tuple(sorted((_layer(source), _takers(source, takers)) for source, takers in given.items()))
        return cls(layers, **{name: value for name, value in data.items() if name != "layers"})


def _layer(source: object) -> int:
    text = str(source).strip()
    if isinstance(source, bool) or not text.isdigit():
        raise PatternError(f"reuse.layers: expected the number of a layer that chooses, found {source!r}")
    return int(text)


def _takers(source: object, takers: Any) -> Ranges:
    try:
        return read_ranges(takers)
    except ValueError as error:
        raise PatternError(f"reuse.layers.{source}: {error}") from None


def _check_layers(layers: tuple[tuple[int, Ranges], ...]) -> None:
    """Refuses a cycle, a source that comes after a layer that takes its choice, two sources, and chains."""
    import networkx

    graph = networkx.DiGraph(
        (source, layer) for source, takers in layers for a, b in takers for layer in range(a, b + 1)
    )
    cycle = next(iter(networkx.simple_cycles(graph)), None)
    if cycle:
        shown = " -> ".join(map(str, [*cycle, cycle[0]]))
        raise PatternError(f"reuse.layers: the layers {shown} take each other's choice in a cycle")
    for source, layer in graph.edges:
        if layer < source:
            raise PatternError(f"reuse.layers: layer {layer} comes before layer {source}, whose choice it is to take")
        if graph.in_degree(layer) > 1:
            both = " and ".join(map(str, sorted(graph.predecessors(layer))))
            raise PatternError(f"reuse.layers: layer {layer} is to take the choices of {both}; one is allowed")
        if graph.in_degree(source):
            first = next(iter(graph.predecessors(source)))
            raise PatternError(
                f"reuse.layers: layer {layer} is to take the choice of layer {source}, which takes that of {first}; "
                f"name {first} for both"
            )
