"""Candidates: what a head may get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import InputError, SparsifyError, nearest
from sparsify.patterns.reuse import Reuse
from sparsify.planner.plan import DENSE, Candidate
from sparsify.spec.reader import file_text, read_text

ALPHAS = tuple(range(-2048, 8193, 1024))
BETAS = tuple(eighth / 8 for eighth in range(9))
SHORTEST, LONGEST = 2048, 8192  # MoA's N_min and the N that its first condition names


def elastic(longest: int = 16384) -> Iterator[Candidate]:
    """MoA's rules: spans alpha + beta N over alpha from -2048 to 8192 and beta from 0 to 1, 48 of which are within the
    length from 2048 to `longest` tokens; one sink block of 64."""
    for alpha in ALPHAS:
        for beta in BETAS:
            within = alpha + beta * LONGEST <= LONGEST and alpha + beta * longest <= longest
            if within and alpha + beta * SHORTEST > 0:
                name = f"elastic{alpha:+d}{beta:+g}N"
                yield Candidate(name, {"moa_head": {"alpha": alpha, "beta": beta, "max_new": 0}})


def told_apart(found: Sequence[Candidate], lengths: Sequence[int]) -> tuple[Candidate, ...]:
    """Without the spans that are no other than an earlier one, or than all keys, at any of these lengths."""
    seen: set[tuple[int, ...]] = {tuple(lengths)}
    kept = []
    for one in found:
        rule = one.form.get("moa_head") if isinstance(one.form, Mapping) else None
        if rule is not None:
            spans = tuple(_blocks(rule["alpha"] + rule["beta"] * length, length) for length in lengths)
            if spans in seen:
                continue
            seen.add(spans)
        kept.append(one)
    return tuple(kept)


def _blocks(span: float, length: int) -> int:
    """A span as it is run: whole blocks of 64, two of them at least."""
    return min(length, max(128, -(-int(span) // 64) * 64))


def windows(causal: bool, longest: int) -> Iterator[Candidate]:
    """The last 32, 64, ... keys and 4 sinks, a few without, the sinks alone; to both sides so many in all, with both
    ends, or the ends alone."""
    yield Candidate("first", {"sinks": 4}) if causal else Candidate("ends", ENDS)
    size = 32 if causal else 4
    while size < longest:
        if causal:
            yield Candidate(f"window{size}", {"sinks": 4, "window": size})
            if size <= 64:
                yield Candidate(f"local{size}", {"window": size})
        else:
            span = {"size": size // 2 + 1, "ahead": size // 2}
            yield Candidate(f"window{size}", {"any": [ENDS, {"window": span}]})
        size *= 2


ENDS = {"expr": "k < 1 or k >= N - 1"}  # the tokens that encoders let heads rest on


def strides(causal: bool, longest: int, by_pair: bool) -> Iterator[Candidate]:
    """Blocks of 64 in vertical strides beside a local window (S2-Attention); blocks by themselves, to both sides.

    by_pair: also every so many keys of the query's own residue, which are an even sample for a head that averages, with
    or without the first token. They meet every tile, so they are for budgets of pairs.
    """
    for every in (4, 8, 16) if causal else ():
        if 64 * every < longest:
            blocked = {"window": 256, "column_stride": {"every": every}, "block": 64}
            yield Candidate(f"stride{every}", {"any": [{"sinks": 1}, blocked]})
    for size in () if causal else (32, 64, 128):
        if size < longest:
            yield Candidate(f"block{size}", {"any": [ENDS, {"same_block": size}]})
    for every in (2, 4, 8, 16, 32) if by_pair else ():
        yield Candidate(f"dilated{every}", {"dilated": every})
        yield Candidate(f"first_dilated{every}", {"sinks": 1, "dilated": every})


def selectors(causal: bool, longest: int) -> Iterator[Candidate]:
    """The best blocks of keys by their means, at several budgets, chosen for each block of queries; of short texts to
    both sides also small blocks."""
    unit = 64 if longest >= 2048 else 16
    keep = 2
    while keep * unit <= longest // 2:
        yield _best(keep, unit, unit, causal)
        keep *= 2
    if not causal and unit == 16:
        keep = 4
        while keep * 4 <= longest // 2:
            yield _best(keep, unit, 4, causal)
            keep *= 2


def _best(keep: int, queries: int, unit: int, causal: bool) -> Candidate:
    """The best `keep` units for so many queries, their own among them, with sinks, or with ends and neighbours."""
    near = [{"sinks": 4}] if causal else [ENDS, {"window": {"size": 2, "ahead": 1}}]
    chosen = {
        "budget": {"rule": "topk", "value": keep},
        "unit": {"q": queries, "k": unit},
        "score": {"qview": "mean", "kview": "mean"},
        "force": {"local": 1, "counted": True} if unit == queries else {"local": 0},
        "phase": "prefill",
    }
    return Candidate(f"top{keep}x{unit}", {"any": [*near, {"select": chosen}]})


def neighborhoods(shape: Sequence[int]) -> Iterator[Candidate]:
    """The nearest tokens of a grid, an eighth, a quarter and a half of each dimension (NATTEN)."""
    for part in (8, 4, 2):
        window = [max(2, min(size, -(-size // part))) for size in shape]
        name = "near" + "x".join(map(str, window))
        yield Candidate(name, {"neighborhood": {"shape": list(shape), "window": window}})


KINDS = ("elastic", "windows", "strides", "selectors", "neighborhoods")


def default(
    causal: bool,
    longest: int,
    of: str = "time",
    kinds: Sequence[str] | None = None,
    shape: Sequence[int] | None = None,
) -> tuple[Candidate, ...]:
    """Dense, and the candidates of these kinds: all that fit the attention, if none are named.

    longest: the longest length that is profiled. of: what the budget is one of. shape: of a grid of tokens, for
    neighborhoods. Raises InputError.
    """
    for kind in kinds or ():
        if kind not in KINDS:
            raise InputError(f"plan: candidates: unknown kind '{kind}'; {nearest(kind, KINDS)}")
    wanted = set(kinds or KINDS)
    if kinds and "neighborhoods" in wanted and shape is None:
        raise InputError("plan: candidates: neighborhoods need the shape of the grid of tokens, such as 64,64")
    found = [Candidate(DENSE, "dense")]
    if "elastic" in wanted and causal:
        found += elastic()
    if "windows" in wanted:
        found += windows(causal, longest)
    if "strides" in wanted:
        found += strides(causal, longest, of == "pairs")
    if "selectors" in wanted:
        found += selectors(causal, longest)
    if "neighborhoods" in wanted and shape is not None:
        found += neighborhoods(shape)
    return tuple(found)


def sharing(found: Sequence[Candidate], reuse: Reuse) -> tuple[Candidate, ...]:
    """The candidates whose selections are shared by layers."""
    return tuple(Candidate(one.name, _shared(one.form, reuse.to_data())) for one in found)


def _shared(form: Any, reuse: Mapping[str, Any]) -> Any:
    if isinstance(form, list):
        return [_shared(part, reuse) for part in form]
    if not isinstance(form, Mapping):
        return form
    inner = {key: _shared(part, reuse) if key in ("any", "all") else part for key, part in form.items()}
    return inner | {"select": {**form["select"], "reuse": dict(reuse)}} if "select" in form else inner


def read(path: str | Path) -> tuple[Candidate, ...]:
    """Dense, and those of a YAML or JSON file: a mapping `candidates` of names to patterns, as a spec writes them.

    Raises InputError naming the file and what is wrong.
    """
    value, _ = read_text(file_text(path), str(path))
    forms = value.get("candidates") if isinstance(value, Mapping) else None
    if not isinstance(forms, Mapping) or not forms:
        raise InputError(
            f"{path}: candidates: expected this field with a mapping of names to patterns, such as"
            " {candidates: {near: {window: 64}}}"
        )
    found = [Candidate(DENSE, "dense")]
    for name, form in forms.items():
        if name == DENSE:
            continue
        one = Candidate(str(name), form)
        try:
            one.pattern()
        except SparsifyError as error:
            raise InputError(f"{path}: candidates.{name}: {str(error).removeprefix('candidate: ')}") from None
        found.append(one)
    return tuple(found)
