"""`Spec`: which pattern each head of each site gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from pathlib import Path as File
from typing import Any

from sparsify.addresses import folded, shape_of
from sparsify.errors import SpecError
from sparsify.files import write_whole
from sparsify.patterns import Pattern
from sparsify.patterns.select import selections
from sparsify.spec.document import VERSION, checked
from sparsify.spec.dump import form_of, yaml_text
from sparsify.spec.forms import Builder, reserved
from sparsify.spec.reader import file_text, read_text
from sparsify.spec.rules import Rule, SiteInfo
from sparsify.spec.source import Source, shown

LISTED = 6  # addresses in an error
ROOT = "(the model itself, matched by '*')"  # an attention in no module within the model has the address ""
_NAME = re.compile(r"[A-Za-z_][\w.-]*")


@dataclass(frozen=True, init=False)
class Spec:
    """Named patterns, and rules of which the first that matches a site gives each of its heads a pattern.

        Spec(patterns={"mine": MyPattern()}, sites=[{"match": "model.*", "heads": {"0-3": "dense", "rest": "mine"}}])

    `patterns` and `sites` hold what the sections of a file hold, and a pattern may be a `Pattern` object wherever a
    form may stand. Frozen, hashable, comparable. Raises SpecError naming the field, what was found and what is allowed.
    """

    patterns: Mapping[str, Pattern] = field(hash=False)
    rules: tuple[Rule, ...]

    def __init__(self, patterns: Mapping[str, Any] | None = None, sites: Sequence[Mapping[str, Any]] = ()) -> None:
        self._read({"version": VERSION, "patterns": dict(patterns or {}), "sites": list(sites)}, Source(), {})

    @classmethod
    def of(cls, value: str | File | Mapping[str, Any] | Spec) -> Spec:
        """The spec that a path, a dictionary (as a file holds it) or a Spec means."""
        if isinstance(value, Spec):
            return value
        if isinstance(value, str | File):
            return load_spec(value)
        if not isinstance(value, Mapping):
            raise SpecError(f"spec: expected a path, a dictionary or a Spec, found {shown(value)}")
        return cls._of(value, Source(), {})

    @classmethod
    def read(cls, text: str, name: str, patterns: Mapping[str, Pattern] | None = None) -> Spec:
        """The spec in a YAML or JSON text; `name` stands for the file in errors. See `load_spec`."""
        value, source = read_text(text, name)
        return cls._of(value, source, _named(patterns))

    @classmethod
    def _of(cls, value: Any, source: Source, extra: Mapping[str, Pattern]) -> Spec:
        spec = cls.__new__(cls)
        spec._read(value, source, extra)
        return spec

    def _read(self, value: Any, source: Source, extra: Mapping[str, Pattern]) -> None:
        document = checked(value, source)
        for name in document.patterns:
            _check_name(name, source, extra)
        builder = Builder(source, {**document.patterns, **extra})
        patterns = {name: builder.named(name, ("patterns", name)) for name in builder.forms}
        object.__setattr__(self, "patterns", patterns)
        rules = tuple(Rule.read(rule, number, builder) for number, rule in enumerate(document.sites))
        object.__setattr__(self, "rules", rules)

    def resolve(self, sites: Sequence[SiteInfo], complete: bool = True) -> list[tuple[Pattern, ...] | None]:
        """For each site the pattern of each of its query heads, or None where no rule matches.

        With `complete`, `sites` are all that the model has, and a rule that none of them uses is an error; leave it
        off for one of several graphs and give all their sites to `unmatched_rules`. Raises SpecError.
        """
        found = []
        for site in sites:
            rule = self.rule(site)
            found.append(None if rule is None else rule.patterns(site))
        unmatched = unmatched_rules(self, sites) if complete else []
        if unmatched:
            raise SpecError(unmatched[0])
        return found

    def rule(self, site: SiteInfo) -> Rule | None:
        """The first rule that matches the site."""
        return next((rule for rule in self.rules if rule.accepts(site)), None)

    def learned(self) -> tuple[str, ...]:
        """The names of the modules that its selections ask for."""
        found = (one for rule in self.rules for group in rule.groups for one in selections(group.pattern))
        names = (getattr(one.choice.selector, "learned", None) for one in found)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def to_dict(self) -> dict[str, Any]:
        """The spec as a file holds it, `Spec.of(spec.to_dict()) == spec`; your own classes stay objects."""
        inline = {id(g.pattern): form_of(g.pattern) for rule in self.rules for g in rule.groups if g.name is None}
        patterns = {name: form_of(pattern) for name, pattern in self.patterns.items()}
        return {"version": VERSION, "patterns": patterns, "sites": [rule.to_dict(inline) for rule in self.rules]}

    def save(self, path: str | File, comment: str = "") -> None:
        """Writes the spec as JSON (a path that ends in .json) or YAML, which begins with the lines of `comment`.

        The file is there whole or not at all, and so are the folders above it. Raises SpecError for what a file can't
        hold, InputError where it can't be written.
        """
        value = self.to_dict()
        _refuse_objects(value, str(path))
        file = File(path)
        text = json.dumps(value, indent=2) + "\n" if file.suffix == ".json" else yaml_text(value, comment)
        write_whole(file, text, "spec")

    def __hash__(self) -> int:
        return hash((tuple(self.patterns.items()), self.rules))


def load_spec(path: str | File, patterns: Mapping[str, Pattern] | None = None) -> Spec:
    """Reads a spec from a YAML or JSON file. Raises SpecError naming file, line, column, field and what is allowed.

    `patterns` gives the file further names, for patterns of your own classes: the file says `heads: mine`, and you
    call `load_spec("spec.yaml", patterns={"mine": MyPattern()})`.
    """
    return Spec.read(file_text(path), str(path), patterns)


def _named(patterns: Mapping[str, Pattern] | None) -> Mapping[str, Pattern]:
    for name, pattern in (patterns or {}).items():
        if not isinstance(pattern, Pattern):
            raise SpecError(f"load_spec: patterns['{name}']: expected a Pattern, found {shown(pattern)}")
        _check_name(name, Source("load_spec"), {})
    return patterns or {}


def unmatched_rules(spec: Spec, sites: Iterable[SiteInfo], modules: Sequence[str] = ()) -> list[str]:
    """For each rule that no site uses, what is wrong with it; `sites` are all those of the model.

    Where they are those of one graph only, `modules` are the paths of all the model's modules: a rule that fits one of
    them may have its sites in another graph, and is passed over; so is one for a phase that no site is in.
    """
    sites = list(sites)
    here = {site.phase for site in sites}
    first = [next((rule.number for rule in spec.rules if rule.accepts(site)), None) for site in sites]
    messages = []
    for rule in spec.rules:
        absent = rule.phase is not None and rule.phase not in here
        if rule.number in first or (absent and sites) or any(fnmatchcase(path, rule.match) for path in modules):
            continue
        if any(rule.accepts(site) and all(spec.rules[n].phase for n in _before(spec, rule, site)) for site in sites):
            continue  # it is used in the other phase
        taken = sorted({n for site, n in zip(sites, first, strict=True) if rule.accepts(site) and n is not None})
        if taken:
            earlier = ", ".join(f"sites[{n}]" for n in taken)
            what = f"the rule is never used: earlier rules ({earlier}) take every site that it matches"
        else:
            what = f"the rule matches no site; {_listed(sites, rule.match)}"
        messages.append(str(rule.source.error(("sites", rule.number), what)))
    return messages


def _before(spec: Spec, rule: Rule, site: SiteInfo) -> list[int]:
    """The earlier rules that take a site from a rule."""
    return [one.number for one in spec.rules if one.number < rule.number and one.accepts(site)]


def _listed(sites: Sequence[SiteInfo], match: str) -> str:
    """The addresses that there are with what they are, those of layers as one, the nearest to `match` first."""
    if not sites:
        return "the model has none"
    groups: dict[tuple[str, str], list[SiteInfo]] = {}
    for site in sites:
        groups.setdefault((shape_of(site.address), site.where()), []).append(site)
    shown = {}
    for (_, where), group in groups.items():
        address, uses = folded([site.address for site in group]) or ROOT, 1 + max(site.use for site in group)
        used = f" used {uses} times" if uses > 1 else ""
        shown[f"{address} {where}{used}"] = max(_likeness(match, site.address) for site in group)
    names = sorted(shown, key=lambda name: -shown[name])
    more = f", and {len(names) - LISTED} more like these" if len(names) > LISTED else ""
    return f"the model has {len(sites)}: {', '.join(names[:LISTED])}{more}"


def _likeness(match: str, address: str) -> float:
    return SequenceMatcher(None, match, address).ratio()


def _check_name(name: str, source: Source, extra: Mapping[str, Pattern]) -> None:
    path = ("patterns", name)
    if name in reserved():
        raise source.error(path, f"'{name}' is a word of the spec's own; choose another name", at_key=True)
    if not _NAME.fullmatch(name):
        raise source.error(
            path, "a pattern's name starts with a letter and has letters, digits, _ . - only", at_key=True
        )
    if name in extra:
        raise source.error(path, f"'{name}' is also given to load_spec; choose another name", at_key=True)


def _refuse_objects(value: Any, path: str) -> None:
    if isinstance(value, Pattern):
        raise SpecError(f"{path}: {value} is a pattern of your own class, which a file can't hold; give it a name by "
                        "load_spec(..., patterns={...})")  # fmt: skip
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_objects(part, path)
