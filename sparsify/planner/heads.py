"""The heads of a model in one row, as profiles and solvers number them, and what they cost under patterns."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify import cost
from sparsify.errors import InputError, nearest
from sparsify.expr import Pred
from sparsify.passes.density import at_most
from sparsify.patterns import Pattern, causal, dense
from sparsify.patterns.pattern import K, Q
from sparsify.patterns.select import Choice, selections
from sparsify.patterns.selector import Selector
from sparsify.planner.probe import Assignment, Key
from sparsify.spec import SiteInfo

OF = ("time", "tiles", "pairs", "memory")


@dataclass(frozen=True)
class Own(Pattern):
    """What a model's own mask keeps at most, as a pattern: to count with."""

    pred: Pred

    def keep(self) -> Pred:
        return self.pred


@dataclass(frozen=True)
class Found:
    """A site as the probe found it: its `SiteInfo`, what the model itself keeps there, its head size and dtype."""

    info: SiteInfo
    own: Pred
    head_dim: int
    dtype: str

    @property
    def key(self) -> Key:
        return self.info.address, self.info.use

    def counted(self, pattern: Pattern | None) -> Pattern:
        """A pattern with the model's own mask, to be counted; None for the mask alone."""
        own = causal() if self.own == (Q >= K) else Own(at_most(self.own))
        return own if pattern is None else pattern & own


@dataclass(frozen=True)
class Heads:
    """All query heads, site by site. `heads.sites[heads.site[i]]` is the site of head i."""

    sites: tuple[Found, ...]

    @functools.cached_property
    def site(self) -> np.ndarray:
        """The site of each head."""
        return np.repeat(np.arange(len(self.sites)), [found.info.heads for found in self.sites])

    @functools.cached_property
    def number(self) -> np.ndarray:
        """The number of each head in its site."""
        return np.concatenate([np.arange(found.info.heads) for found in self.sites])

    def __len__(self) -> int:
        return len(self.site)

    def by_site(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Values of all heads, site by site."""
        ends = np.cumsum([found.info.heads for found in self.sites])
        return [tuple(values[end - found.info.heads : end]) for end, found in zip(ends, self.sites, strict=True)]

    def assignment(self, patterns: Sequence[Pattern | None]) -> Assignment:
        """The pattern of every head, as the probe takes it."""
        return {found.key: of for found, of in zip(self.sites, self.by_site(patterns), strict=True)}

    def uniform(self, pattern: Pattern | None) -> Assignment:
        """One pattern for all heads."""
        return self.assignment([pattern] * len(self))

    def groups(self, joined: bool) -> np.ndarray:
        """The unit of each head: the head itself or, `joined`, its KV group."""
        if not joined:
            return np.arange(len(self))
        sizes = [(found.info.heads, found.info.kv_heads) for found in self.sites]
        firsts = np.cumsum([0, *(kv for _, kv in sizes)])
        return np.concatenate(
            [first + np.arange(heads) // (heads // kv) for first, (heads, kv) in zip(firsts, sizes, strict=False)]
        )


def kinds(found: Sequence[Found]) -> Iterator[tuple[Found, list[int]]]:
    """The sites that cost the same, each group as its first one and the places of all."""
    groups: dict[Any, list[int]] = {}
    for place, one in enumerate(found):
        key = one.own, one.head_dim, one.dtype, one.info.heads, one.info.kv_heads
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        yield found[places[0]], places


@dataclass(frozen=True)
class Costs:
    """Predicts what patterns cost at some lengths on a machine, as shares of the model's whole dense cost there.

    of: `time` predicted by the simulator; `tiles`, the pairs of the tiles that run; `pairs`, those that are kept, each
    with what it takes to choose them; `memory` of the keys and values that the last query still needs.
    """

    heads: Heads
    lengths: tuple[int, ...]
    of: str = "time"
    machine: Any = None

    def __post_init__(self) -> None:
        if self.of not in OF:
            raise InputError(f"plan: of: found '{self.of}'; {nearest(str(self.of), OF)}")

    def shares(self, patterns: Sequence[Pattern | None]) -> np.ndarray:
        """(lengths, heads, patterns): each head alone under each pattern, None being the dense one."""
        found = np.empty((len(self.lengths), len(self.heads), len(patterns)))
        for number, length in enumerate(self.lengths):
            for site, places in kinds(self.heads.sites):
                each = np.stack([self._heads(site, pattern, length) for pattern in patterns], 1)
                found[number][np.isin(self.heads.site, places)] = np.tile(each, (len(places), 1))
            found[number] /= sum(self._heads(site, None, length).sum() for site in self.heads.sites)
        return found

    def share(self, patterns: Sequence[Pattern | None], length: int) -> float:
        """That of one pattern a head, at one length: what sites really cost together."""
        mine = theirs = 0.0
        for site, given in zip(self.heads.sites, self.heads.by_site(patterns), strict=True):
            mine += self._site(site, given, length)
            theirs += self._site(site, (None,) * site.info.heads, length)
        return mine / theirs

    def seconds(self, site: Found, patterns: Sequence[Pattern | None], length: int) -> float:
        """The predicted time of one site."""
        return self._estimate(site, tuple(patterns), length).seconds

    def _site(self, site: Found, patterns: tuple[Pattern | None, ...], length: int) -> float:
        if self.of == "time":
            return self.seconds(site, patterns, length)
        return sum(float(self._heads(site, pattern, length)[head]) for head, pattern in enumerate(patterns))

    def _heads(self, site: Found, pattern: Pattern | None, length: int) -> np.ndarray:
        """(heads of the site,): what each head costs where all have one pattern, which may depend on the head."""
        found = self._estimate(site, (pattern,) * site.info.heads, length)
        if self.of == "time":
            return np.array([one.seconds for one in found.heads])
        if self.of == "memory":
            return np.array([one.kv_bytes for one in found.heads]) * site.info.kv_heads / site.info.heads
        pairs = [one.visited if self.of == "tiles" else one.pairs for one in found.heads]
        return np.array(pairs) + choosing(pattern, length)

    def _estimate(self, site: Found, patterns: tuple[Pattern | None, ...], length: int) -> cost.Estimate:
        return _estimated(site, patterns, length, self._machine)

    @functools.cached_property
    def _machine(self) -> cost.Machine:
        return cost.machine(self.machine)  # of a name, a file is read


@functools.lru_cache(maxsize=1 << 14)
def _estimated(site: Found, patterns: tuple[Pattern | None, ...], length: int, machine: cost.Machine) -> cost.Estimate:
    given = [site.counted(pattern) for pattern in patterns]
    sizes: Mapping[str, Any] = {"kv_heads": site.info.kv_heads, "head_dim": site.head_dim, "dtype": site.dtype}
    return cost.estimate(given, length=length, machine=machine, **sizes)


def choosing(pattern: Pattern | None, length: int) -> float:
    """The products that a pattern's selections take for themselves, in pairs of a query and a key."""
    total = 0.0
    for one in () if pattern is None else selections(pattern):
        selector = Choice.parse(one.text).selector
        if isinstance(selector, Selector):
            views = [length if view == "token" else -(-length // unit) for view, unit in (
                (selector.score.qview, selector.unit.q), (selector.score.kview, selector.unit.k))]  # fmt: skip
            total += views[0] * views[1]
    return total


DENSE = dense()
