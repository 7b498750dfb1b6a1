"""Rules: which sites one is for, and the pattern of each head there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from sparsify.errors import SpecError
from sparsify.patterns import Pattern
from sparsify.ranges import Ranges, contains, counted, of_numbers, read_ranges, text_of
from sparsify.spec.document import RuleModel
from sparsify.spec.forms import Builder
from sparsify.spec.source import Path, Source
from sparsify.walk import variables

REST = "rest"


@dataclass(frozen=True)
class SiteInfo:
    """One attention of a model, as a spec sees it.

    address: the module path, such as `model.layers.3.self_attn`; layer: the layer's number, where it has one, of so
    many `layers`, where that is known; use: which attention of that module it is, from 0.
    kind: self or cross attention; causal: whether the model's own mask is causal; phase: decode is one query;
    heads, kv_heads: how many.
    """

    address: str
    layer: int | None
    kind: Literal["self", "cross"]
    causal: bool
    heads: int
    kv_heads: int
    use: int = 0
    phase: Literal["prefill", "decode"] = "prefill"
    layers: int | None = None

    @property
    def kinds(self) -> tuple[str, str]:
        """The words that a rule's `kind` may use for it."""
        return self.kind, "causal" if self.causal else "bidirectional"

    def where(self) -> str:
        """`(self, causal)`: what to know of an address when choosing a rule for it."""
        return f"({', '.join((*self.kinds, *(['decode'] if self.phase == 'decode' else [])))})"


@dataclass(frozen=True)
class Group:
    """Some heads (None: all that no other group of the rule names) and their pattern, with its name if it has one."""

    heads: Ranges | None
    pattern: Pattern
    name: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rule:
    """`groups` for the sites that `match`, `layers`, `kinds`, `phase` and `uses` all accept (None, () accept any)."""

    match: str
    layers: Ranges | None
    kinds: tuple[str, ...]
    phase: str | None
    uses: Ranges | None
    groups: tuple[Group, ...]
    number: int = field(default=0, compare=False)
    source: Source = field(default_factory=Source, compare=False, repr=False)

    @classmethod
    def read(cls, model: RuleModel, number: int, builder: Builder) -> Rule:
        """The rule of a checked document. Raises SpecError."""
        path = ("sites", number)
        source = builder.source
        layers = None if model.layers is None else _ranges(model.layers, (*path, "layers"), source, from_end=True)
        uses = None if model.uses is None else _ranges(model.uses, (*path, "uses"), source)
        kinds = [model.kind] if isinstance(model.kind, str) else model.kind or []
        groups = _groups(model.heads, (*path, "heads"), builder)
        return cls(model.match, layers, tuple(dict.fromkeys(kinds)), model.phase, uses, groups, number, source)

    def accepts(self, site: SiteInfo) -> bool:
        """Whether the rule is for this site."""
        return (
            fnmatchcase(site.address, self.match)
            and (self.layers is None or self._has_layer(site))
            and set(self.kinds) <= set(site.kinds)
            and self.phase in (None, site.phase)
            and (self.uses is None or contains(self.uses, site.use))
        )

    def _has_layer(self, site: SiteInfo) -> bool:
        return site.layer is not None and contains(counted(self.layers or (), site.layers), site.layer)

    def patterns(self, site: SiteInfo) -> tuple[Pattern, ...]:
        """The pattern of each query head of the site. Raises SpecError when heads are missing or out of range."""
        named = [(group.heads, group.pattern) for group in self.groups if group.heads is not None]
        rest = next((group.pattern for group in self.groups if group.heads is None), None)
        for ranges, _ in named:
            if ranges[-1][1] >= site.heads:
                raise self.fail(f"found head {ranges[-1][1]}, but {_described(site)}")
        found = [next((p for ranges, p in named if contains(ranges, h)), rest) for h in range(site.heads)]
        missing = of_numbers(h for h, pattern in enumerate(found) if pattern is None)
        if missing:
            what = f"{_plural(missing)} {'has' if _count(missing) == 1 else 'have'} no pattern, but {_described(site)}"
            raise self.fail(f"{what}; name them too, or add a group '{REST}'")
        return tuple(found)  # type: ignore[arg-type]

    def tells_heads_apart(self) -> bool:
        """Whether it matters which head is which: heads are named, or a pattern depends on the head's number."""
        return any(group.heads is not None or "h" in variables(group.pattern.keep()) for group in self.groups)

    def fail(self, what: str, part: str = "heads") -> SpecError:
        """An error at one of the rule's fields."""
        return self.source.error(("sites", self.number, part), what)

    def to_dict(self, forms: Mapping[int, Any]) -> dict[str, Any]:
        """The rule as in a file; `forms` gives the form of each unnamed pattern by its id."""
        fields = {
            "match": self.match,
            "layers": self.layers and text_of(self.layers),
            "kind": self.kinds[0] if len(self.kinds) == 1 else list(self.kinds) or None,
            "phase": self.phase,
            "uses": self.uses and text_of(self.uses),
        }
        shown = {REST if g.heads is None else text_of(g.heads): g.name or forms[id(g.pattern)] for g in self.groups}
        alone = len(shown) == 1 and REST in shown
        return {k: v for k, v in fields.items() if v is not None} | {"heads": shown[REST] if alone else shown}


def _groups(value: Any, path: Path, builder: Builder) -> tuple[Group, ...]:
    if not isinstance(value, Mapping) or not value or not any(map(_is_heads, value)):
        return (_group(None, value, path, builder),)
    groups: list[Group] = []
    for key, form in value.items():
        where = (*path, str(key))
        ranges = None if key == REST else _ranges(key, where, builder.source, at_key=True)
        for other in groups:
            twice = _overlap(ranges, other.heads)
            if twice:
                raise builder.source.error(where, f"{_plural(twice)} already in '{text_of(other.heads)}'", at_key=True)
        groups.append(_group(ranges, form, where, builder))
    return tuple(groups)


def _is_heads(key: object) -> bool:
    return key == REST or isinstance(key, int) or (isinstance(key, str) and key.strip()[:1] in "-0123456789")


def _group(heads: Ranges | None, form: Any, path: Path, builder: Builder) -> Group:
    name = form if isinstance(form, str) else None
    return Group(heads, builder.pattern(form, path), name)


def _ranges(value: object, path: Path, source: Source, at_key: bool = False, from_end: bool = False) -> Ranges:
    try:
        return read_ranges(value, from_end)
    except ValueError as error:
        raise source.error(path, f"{error}, found {value!r}", at_key) from None


def _overlap(left: Ranges | None, right: Ranges | None) -> Ranges:
    if left is None or right is None:
        return ()
    common = [(max(a, c), min(b, d)) for a, b in left for c, d in right]
    return tuple(sorted((low, high) for low, high in common if low <= high))


def _count(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)


def _plural(ranges: Ranges) -> str:
    return f"head{'' if _count(ranges) == 1 else 's'} {text_of(ranges)}"


def _described(site: SiteInfo) -> str:
    where = f"'{site.address}'" if site.address else "the model itself"
    return f"{where} has heads 0-{site.heads - 1}" if site.heads > 1 else f"{where} has head 0 only"
