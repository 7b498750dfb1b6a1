"""A program: everything about one attention that is fixed before its tensors are known.

It is what the custom op carries as one canonical string, so graphs can be cached, exported, pickled and
sent to other processes: no handle into this process is in it. The kernel's source, name and hash follow from it, the
dtype, the head size and the machine.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.bias import Bias, from_data, to_data
from sparsify.bias import parts as bias_parts
from sparsify.errors import InputError
from sparsify.expr import TRUE, Expr, Pred
from sparsify.ranges import Ranges, of_numbers
from sparsify.sizes import size_values
from sparsify.text import parse_expr, parse_pred, to_text
from sparsify.walk import loads, variables

VERSION = 4
MAX_RANK = 4  # of a load: how many dimensions every target can read
TARGETS = ("cpp", "triton", "null")


@dataclass(frozen=True)
class Layout:
    """Which token each slot holds, where slots are not the tokens in their order.

    Predicates and biases then speak of slots, and a kernel reads row `token` where it needs slot q or k: nothing is
    moved. A query that no slot holds gives 0.

    slots: how many there are, over N and Nq. token: over the slot (q in a layout of queries, k in one of keys), b, h,
    N, Nq and loads. filled: over the same; where it is false the slot holds nothing, and `token` means nothing. A
    program's predicates drop the keys of such slots themselves; all that a kernel owes them is not to read their rows.
    """

    slots: Expr
    token: Expr
    filled: Pred = TRUE

    def to_data(self) -> list[str]:
        """As plain values, for `from_data`."""
        return [to_text(self.slots), to_text(self.token), to_text(self.filled)]

    @classmethod
    def from_data(cls, data: Sequence[str]) -> Layout:
        return cls(parse_expr(data[0]), parse_expr(data[1]), parse_pred(data[2]))

    def parts(self) -> list[Expr | Pred]:
        """Its expressions and predicate."""
        return [self.slots, self.token, self.filled]


@dataclass(frozen=True)
class Skip:
    """A part of a key tile may be left out where all its weights are below `share` of the largest so far (BLASST).

    share: of the weight of the row's running maximum; divided by the number of keys with `by_length`, and never more
    than 1. What a part is, and how soon a maximum counts, is the target's: they may leave out different pairs.
    """

    share: float
    by_length: bool = False

    def below(self, k_len: int) -> float:
        """The logarithm (base 2) of the share for so many keys."""
        return math.log2(min(1.0, self.share / max(1, k_len)) if self.by_length else self.share)


@dataclass(frozen=True)
class Program:
    """What each head keeps, and how scores are changed on the way.

    keep: the distinct predicates over b, h, q (absolute), k, N (keys), Nq (queries), sizes and loads `_0[...]`, ...
    heads: for each query head, the index in `keep` of its predicate.
    loads: how many tensors the loads `_0`, `_1`, ... name.
    softcap: scores become softcap * tanh(score / softcap) after scaling and before biases and masks (Gemma 2).
    bias: what is added to the scaled and capped scores, over the same names as `keep`.
    sink: None, or a logit over b, h and q that joins each row's softmax without a value: the sum of the row's weights
    gains exp(sink), so they come to less than 1 (gpt-oss). A row that keeps no key gives 0 all the same.
    queries, keys: the layout of queries and of keys, None where slot i holds token i. With one of queries, all of the
    attention's positions are in the launch: its first query is token 0.
    skips: for each query head what may be left out by its weight, None for nothing; () for no head.
    target: which target runs it.
    """

    keep: tuple[Pred, ...]
    heads: tuple[int, ...]
    loads: int = 0
    softcap: float | None = None
    bias: Bias = ()
    sink: Bias | None = None
    queries: Layout | None = None
    keys: Layout | None = None
    skips: tuple[Skip | None, ...] = ()
    target: str = "cpp"

    def __post_init__(self) -> None:
        assert self.target in TARGETS, self
        assert all(0 <= rule < len(self.keep) for rule in self.heads), self

    @classmethod
    def of(cls, keeps: Sequence[Pred], **fields: object) -> Program:
        """The program of one predicate per query head, equal predicates stored once."""
        distinct = tuple(dict.fromkeys(keeps))
        return cls(distinct, tuple(distinct.index(keep) for keep in keeps), **fields)  # type: ignore[arg-type]

    def text(self) -> str:
        """The canonical string."""
        return json.dumps(
            {
                "version": VERSION,
                "keep": [to_text(keep) for keep in self.keep],
                "heads": self.heads,
                "loads": self.loads,
                "softcap": self.softcap,
                "bias": to_data(self.bias),
                "sink": None if self.sink is None else to_data(self.sink),
                "queries": self.queries and self.queries.to_data(),
                "keys": self.keys and self.keys.to_data(),
                "skips": [skip and [skip.share, skip.by_length] for skip in self.skips],
                "target": self.target,
            },
            separators=(",", ":"),
        )

    @staticmethod
    def forget_parsed() -> None:
        """Texts that were parsed are parsed anew, as by a new process."""
        _parse.cache_clear()

    @classmethod
    def parse(cls, text: str) -> Program:
        """Reads `text()` back (cached: one program is launched many times)."""
        return _parse(text)

    def rule_of(self, head: int) -> Pred:
        """The predicate of a query head."""
        return self.keep[self.heads[head]]

    def heads_of(self, number: int) -> Ranges:
        """The query heads that have predicate `number` of `keep`."""
        return of_numbers(head for head, rule in enumerate(self.heads) if rule == number)

    def uses(self, *names: str) -> bool:
        """Whether any predicate or bias mentions one of these variables."""
        return any(variables(part) & set(names) for part in self.parts())

    def sizes(self) -> list[str]:
        """The size variables of all predicates, in a fixed order: the scalars that a kernel takes."""
        names = frozenset().union(*(variables(part) for part in self.parts()))
        return sorted(name for name in names if name.startswith("size("))

    def size_values(self, n: int) -> list[int]:
        """The values of `sizes()` at sequence length n."""
        values = size_values(frozenset(self.sizes()), n)
        return [values[name] for name in self.sizes()]

    def load_ranks(self) -> dict[str, int]:
        """How many indices each load takes, by source name."""
        return {load.source: len(load.index) for part in self.parts() for load in loads(part)}

    def parts(self) -> list[Expr | Pred]:
        """Every expression and predicate in the program."""
        layouts = [part for layout in (self.queries, self.keys) if layout for part in layout.parts()]
        return [*self.keep, *bias_parts(self.bias), *bias_parts(self.sink or ()), *layouts]

    def skip_of(self, head: int) -> Skip | None:
        """What may be left out of a query head."""
        return self.skips[head] if self.skips else None


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Program:
    fields = json.loads(text)
    version = fields.pop("version")
    if version != VERSION:
        raise InputError(f"program version {version} can't be read by this sparsify (it reads {VERSION})")
    fields["keep"] = tuple(parse_pred(keep) for keep in fields["keep"])
    fields["heads"] = tuple(fields["heads"])
    fields["bias"] = from_data(fields["bias"])
    fields["sink"] = None if fields["sink"] is None else from_data(fields["sink"])
    for name in ("queries", "keys"):
        fields[name] = fields[name] and Layout.from_data(fields[name])
    fields["skips"] = tuple(skip and Skip(*skip) for skip in fields["skips"])
    return Program(**fields)
