"""How much of a site's score matrix its programs keep."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from sparsify.expr import TRUE, And, Or, Pred, conjunction, disjunction
from sparsify.patterns.count import kept_pairs
from sparsify.walk import loads, substitute, variables


def density_of(rules: Sequence[Pred], q_len: int, k_len: int, q_offset: int) -> float:
    """The share of all triples that the rules of a site's heads keep: the most, whatever loads and the batch say."""
    heads = [(rule, head if "h" in variables(rule) else 0) for head, rule in enumerate(map(at_most, rules))]
    kept = sum(_kept(rule, head, q_len, k_len, q_offset) for rule, head in heads)
    return kept / max(1, len(heads) * q_len * k_len)


@functools.lru_cache(maxsize=1024)
def _kept(rule: Pred, head: int, q_len: int, k_len: int, q_offset: int) -> int:
    """The kept pairs of one head; layers mostly ask for the same."""
    return kept_pairs(substitute(rule, {"h": head}), 1, q_len, k_len, q_offset)


@functools.lru_cache(maxsize=1024)
def at_most(rule: Pred) -> Pred:
    """What a rule keeps at most, whatever the tensors hold that it reads and whichever batch it is asked for."""
    if isinstance(rule, And | Or):
        join = conjunction if isinstance(rule, And) else disjunction
        return join(map(at_most, rule.parts))
    return TRUE if loads(rule) or "b" in variables(rule) else rule
