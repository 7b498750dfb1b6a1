"""What a user asks of a plan, read and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.errors import InputError, PatternError, SparsifyError, nearest
from sparsify.patterns.reuse import Reuse
from sparsify.planner.heads import OF
from sparsify.planner.plan import DENSE, Candidate
from sparsify.ranges import Ranges, read_ranges
from sparsify.spec.source import shown

PROFILES = (
    "influence", "effect", "output", "recall", "echo", "induction", "retrieval", "local", "gates", "moa",
)  # fmt: skip
FRONT = (0.75, 0.5, 0.35, 0.25, 0.125)
LEAST = {"samples": 1, "probes": 1, "rounds": 0, "per_layer": 1, "validate_length": 2, "seed": 0}
OPEN = ("per_layer", "validate_length")  # those that may be None, for any or the usual one
_BOUND = re.compile(r"\s*loss\s*\+\s*([0-9.eE+-]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Budget:
    """share: of the dense cost; or None, and the quality bound: the loss may be `above` what dense attention loses, or
    that share of it where `relative`."""

    text: str
    share: float | None = None
    above: float = 0.0
    relative: bool = False

    @classmethod
    def read(cls, value: Any) -> Budget:
        """From 0.5, "50%", "loss +1%" or "loss +0.01". Raises InputError."""
        text = str(value).strip()
        bound = _BOUND.fullmatch(text)
        try:
            if bound:
                above = float(bound[1]) / (100 if bound[2] else 1)
                if not 0 < above < math.inf:
                    raise ValueError
                return cls(text, None, above, bool(bound[2]))
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
            if isinstance(value, bool) or not 0 < share <= 1:
                raise ValueError
            return cls(text, share)
        except ValueError:
            allowed = "a share of the dense cost above 0 and at most 1, such as 0.5, or a bound such as 'loss +1%'"
            raise InputError(f"plan: budget: expected {allowed}, found {value!r}") from None

    def limit(self, dense: float) -> float:
        """The most that may be lost above dense attention, which itself loses `dense`."""
        return self.above * dense if self.relative else self.above


@dataclass(frozen=True)
class Settings:
    """How a plan is made.

    lengths: that are profiled, in tokens. of: what the budget is a share of. profile: one of `PROFILES`. candidates:
    those that heads may get, None for the usual ones of these `kinds` (with `shape`, that of a grid of tokens).
    per_layer: how many distinct rules a layer may have at most, None for any number. joined: whether the heads of a KV
    group have one rule; by default where the budget is one of memory, which they share. dense_layers: those that keep
    everything. reuse: the layers that select, each with the later ones that take its choices ({2: "3-5"}).
    samples: pieces of text a length for the profile; recall: the share of them with planted facts, None for a quarter
    where attention is causal. probes: of a sample's output (influence). rounds: how often the profile is made again on
    the way to a tight budget. front: the budgets of the front. validate_length: that is validated at, None for one that
    is not profiled. seed: of drawn tokens (echo, induction).
    """

    lengths: tuple[int, ...]
    budget: Budget
    of: str = "time"
    profile: str = "influence"
    candidates: tuple[Candidate, ...] | None = None
    kinds: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None
    per_layer: int | None = None
    joined: bool | None = None
    dense_layers: Ranges = ()
    reuse: tuple[tuple[int, Ranges], ...] = ()
    machine: Any = None
    samples: int = 4
    recall: float | None = None
    probes: int = 8
    rounds: int = 2
    front: tuple[float, ...] = FRONT
    validate_length: int | None = None
    seed: int = 0

    @classmethod
    def read(cls, *, lengths: Sequence[int] | int, budget: Any = 0.5, **given: Any) -> Settings:
        """Checks what was given. Raises InputError naming the field, what was found and what is allowed."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise InputError(f"plan: unknown setting '{name}'; {nearest(name, cls.__dataclass_fields__)}")
        found = (lengths,) if isinstance(lengths, int) else lengths
        if not _list_of(found, lambda one: _is_integer(one, 2)) or not found:
            raise InputError(f"plan: lengths: expected integers of at least 2, such as 1024,2048, found {lengths!r}")
        _one_of("of", given.get("of", "time"), OF)
        _one_of("profile", given.get("profile", "influence"), PROFILES)
        for name, least in LEAST.items():
            value = given.get(name, least)
            if not (_is_integer(value, least) or (value is None and name in OPEN)):
                raise InputError(f"plan: {name}: expected an integer of at least {least}, found {value!r}")
        recall = given.get("recall")
        if recall is not None and not (_is_number(recall) and 0 <= recall <= 1):
            raise InputError(f"plan: recall: expected a share from 0 to 1, found {recall!r}")
        _check_heads_get(given)
        bound = Budget.read(budget)
        front = given.get("front", FRONT)
        shares = _list_of(front, lambda one: _is_number(one) and 0 < one <= 1)
        if not shares or (bound.share is None and not front):
            least = "shares of the dense cost" + (", one at least for a bound on the loss" if not front else "")
            raise InputError(f"plan: front: expected {least}, found {front!r}")
        if "dense_layers" in given:
            given["dense_layers"] = _layers(given["dense_layers"])
        if given.get("reuse"):
            given["reuse"] = _reuse(given["reuse"])
            if given.get("per_layer") is not None:
                raise InputError("plan: reuse: goes without a limit on the rules of a layer (per_layer)")
        lists = {name: tuple(given[name]) for name in ("candidates", "kinds", "shape", "front") if given.get(name)}
        return cls(tuple(sorted(set(found))), bound, **given | lists)

    @property
    def shared_rules(self) -> bool:
        """Whether the heads of a KV group have one rule."""
        return self.of == "memory" if self.joined is None else self.joined

    @property
    def least_met(self) -> float:
        """The budget that has to be met: the user's own or, of a bound on the loss, the mildest of the front."""
        return max(self.budgets()) if self.budget.share is None else self.budget.share

    def budgets(self) -> tuple[float, ...]:
        """Those of the front with the user's own, the mildest first."""
        own = () if self.budget.share is None else (self.budget.share,)
        return tuple(sorted({*self.front, *own}, reverse=True))


def _check_heads_get(given: Mapping[str, Any]) -> None:
    """Raises InputError for candidates, kinds, a shape or `joined` of another kind."""
    candidates, kinds, shape, joined = (given.get(name) for name in ("candidates", "kinds", "shape", "joined"))
    if candidates is not None:
        if not _list_of(candidates, lambda one: isinstance(one, Candidate)):
            raise InputError(f"plan: candidates: expected a list of Candidate, found {shown(candidates)}")
        if DENSE not in (one.name for one in candidates):
            raise InputError(f"plan: candidates: expected one named '{DENSE}' among them, which drops nothing")
        for one in candidates:
            _check_form(one)
    if kinds is not None and not _list_of(kinds, lambda one: isinstance(one, str)):
        raise InputError(f"plan: kinds: expected a list of names such as ('windows', 'strides'), found {shown(kinds)}")
    if shape is not None and not (shape and _list_of(shape, lambda one: _is_integer(one, 1))):
        raise InputError(f"plan: shape: expected integers of at least 1, such as (64, 64), found {shown(shape)}")
    if joined is not None and not isinstance(joined, bool):
        raise InputError(f"plan: joined: expected True, False or None, found {shown(joined)}")


def _check_form(one: Candidate) -> None:
    try:
        one.pattern()
    except SparsifyError as error:
        raise InputError(f"plan: candidates: {str(error).removeprefix('candidate: ')}") from None


def _list_of(value: Any, good: Callable[[Any], bool]) -> bool:
    """Whether it is a list or tuple of such values, or an empty one."""
    return isinstance(value, list | tuple) and all(map(good, value))


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layers(value: Any) -> Ranges:
    if value in (None, "", ()):
        return ()
    try:
        return read_ranges(value)
    except ValueError as error:
        raise InputError(f"plan: dense_layers: {error}, found {value!r}") from None


def _reuse(value: Any) -> tuple[tuple[int, Ranges], ...]:
    try:
        return Reuse.from_data({"layers": value}).layers
    except PatternError as error:
        raise InputError(f"plan: {error}") from None


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"plan: {name}: found {value!r}; {nearest(str(value), allowed)}")
