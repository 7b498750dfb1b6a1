"""What a file of another system said: which pattern each head of each layer gets."""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.ranges import of_numbers, text_of
from sparsify.spec import Spec

Heads = tuple[str, ...]  # the name of each query head's pattern


@dataclass(frozen=True)
class Imported:
    """A plan from elsewhere.

    format: its name in `FORMATS`; path: the file. layers: for each layer the name of each query head's pattern;
    patterns: their forms, as a spec writes them (`dense` needs none). phase: where the system runs it, None for both.
    by_kv_head: whether `layers` have an entry for each KV head instead. notes: what to know of it, a sentence each.
    """

    format: str
    path: Path
    layers: tuple[Heads, ...]
    patterns: Mapping[str, Any] = field(hash=False)
    phase: str | None = None
    by_kv_head: bool = False
    notes: tuple[str, ...] = ()

    def spec(self) -> Spec:
        """The spec: one rule for all layers whose heads get the same.

        Every head is named, so that a model with other heads is an error and never half planned.
        """
        groups: dict[Heads, list[int]] = {}
        for layer, heads in enumerate(self.layers):
            groups.setdefault(heads, []).append(layer)
        used = Counter(name for heads in self.layers for name in heads)
        patterns = {name: form for name, form in self.patterns.items() if used[name]}
        return Spec(patterns, [self._rule(heads, layers) for heads, layers in groups.items()])

    def _rule(self, heads: Heads, layers: Sequence[int]) -> dict[str, Any]:
        named: dict[str, list[int]] = {}
        for head, name in enumerate(heads):
            named.setdefault(name, []).append(head)
        rule: dict[str, Any] = {"layers": text_of(of_numbers(layers))}
        if self.phase is not None:
            rule["phase"] = self.phase
        return rule | {"heads": {text_of(of_numbers(numbers)): name for name, numbers in named.items()}}

    def counts(self) -> dict[str, int]:
        """How many heads get each pattern, most first."""
        return dict(Counter(name for heads in self.layers for name in heads).most_common())

    def shape(self) -> str:
        """`32 layers x 32 heads`."""
        heads = sorted({len(heads) for heads in self.layers})
        return f"{len(self.layers)} layers x {'-'.join(map(str, (heads[0], heads[-1])[: len(heads)]))} heads"

    def comment(self) -> str:
        """Where a spec comes from, for its first lines."""
        from sparsify import __version__
        from sparsify.imports.formats import FORMATS

        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        lines = [
            f"Imported by sparsify {__version__} from {self.path.name} (sha256 {digest}), {self.shape()}.",
            f"{FORMATS[self.format].source}.",
        ]
        if self.by_kv_head:
            lines.append("The gates of KV heads are taken as those of query heads, as nobody said how many there are.")
        return "\n".join(part for line in [*lines, *self.notes] for part in textwrap.wrap(line, 110))

    def for_heads(
        self, heads: int | Mapping[int, int], model: str = "the model", kv_heads: Mapping[int, int] | None = None
    ) -> Imported:
        """The plan of a model with so many query heads, in every layer or by layer: entries of KV heads are repeated.

        kv_heads: how many each layer has, where that is known. Raises InputError for the first layer that isn't as
        planned.
        """
        by_layer = dict.fromkeys(range(len(self.layers)), heads) if isinstance(heads, int) else heads
        if not by_layer:
            raise InputError(f"{self.path}: the plan is for layers, but no attention of {model} has a layer's number")
        if len(self.layers) != max(by_layer) + 1:
            what = f"the plan is for {len(self.layers)} layers, but {model} has {max(by_layer) + 1}"
            raise InputError(f"{self.path}: {what}")
        found = []
        for layer, planned in enumerate(self.layers):
            if layer not in by_layer:
                raise InputError(f"{self.path}: layer {layer} is planned, but has no attention in {model}")
            shared = (kv_heads or {}).get(layer, len(planned))
            if self.by_kv_head and shared != len(planned):
                what = f"layer {layer} is planned for {len(planned)} KV heads, but has {shared} in {model}"
                raise InputError(f"{self.path}: {what}")
            group, rest = divmod(by_layer[layer], len(planned))
            if rest or (group != 1 and not self.by_kv_head) or not group:
                unit = "KV heads" if self.by_kv_head else "query heads"
                what = (
                    f"layer {layer} is planned for {len(planned)} {unit}, but {model} has {by_layer[layer]} query heads"
                )
                raise InputError(f"{self.path}: {what}{' there' if isinstance(heads, Mapping) else ''}")
            found.append(tuple(name for name in planned for _ in range(group)))
        return replace(self, layers=tuple(found), by_kv_head=False)
