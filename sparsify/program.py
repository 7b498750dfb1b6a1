"""A program: everything about one attention that is fixed before its tensors are known.

It is what the custom op carries as one canonical string (design D6), so graphs can be cached, exported, pickled and
sent to other processes: no handle into this process is in it. The kernel's source, name and hash follow from it, the
dtype, the head size and the machine.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.bias import Bias, from_data, to_data
from sparsify.bias import parts as bias_parts
from sparsify.errors import InputError
from sparsify.expr import Expr, Pred
from sparsify.ranges import Ranges, of_numbers
from sparsify.sizes import size_values
from sparsify.text import parse_pred, to_text
from sparsify.walk import loads, variables

VERSION = 3
MAX_RANK = 4  # of a load: how many dimensions every target can read
TARGETS = ("cpp", "triton", "null")


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
    target: which target runs it.
    """

    keep: tuple[Pred, ...]
    heads: tuple[int, ...]
    loads: int = 0
    softcap: float | None = None
    bias: Bias = ()
    sink: Bias | None = None
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
                "target": self.target,
            },
            separators=(",", ":"),
        )

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
        return [*self.keep, *bias_parts(self.bias), *bias_parts(self.sink or ())]


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
    return Program(**fields)
