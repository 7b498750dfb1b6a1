"""Which keys a predicate keeps of a block of query rows: columns that matter, and a mask where not all of them do."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsify.expr import And, Load, Or, Pred, Test
from sparsify.patterns.count import EMPTY, FULL, TILE, tile_classes
from sparsify.sizes import size_values
from sparsify.walk import evaluate, loads, variables

ELEMENTS = 1 << 22  # scores that are held at a time
KEPT_BYTES = 1 << 28  # masks that are kept for the next sample
MOST_ROWS = 128
_MASKS: OrderedDict[Any, torch.Tensor] = OrderedDict()


@dataclass(frozen=True)
class Where:
    """The lengths of an attention: queries, keys, and the position of the first query."""

    q_len: int
    k_len: int
    offset: int


@dataclass(frozen=True)
class Block:
    """Keys for the rows `first` to `last` (excluded). columns: which; None for no key at all.

    mask: bool, broadcastable to (B, heads, rows, columns); None where all of the columns are kept by all of the rows.
    """

    first: int
    last: int
    columns: slice | torch.Tensor | None
    mask: torch.Tensor | None = None


def rows_at_a_time(batch: int, heads: int, k_len: int) -> int:
    """How many query rows: few enough that their scores take no more than their share of memory, whatever N is."""
    most = max(1, ELEMENTS // max(1, batch * heads * k_len))
    return min(MOST_ROWS, max(TILE, most // TILE * TILE))


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(0, step), (step, 2 step), ... up to `length`."""
    for first in range(0, length, step):
        yield first, min(first + step, length)


def block(
    keep: Pred, heads: Sequence[int], at: Where, rows: tuple[int, int], env: Mapping[str, Any], device: torch.device
) -> Block:
    """What `keep` says for these heads and rows. env: the tensors of its loads, and `b` (B, 1, 1, 1)."""
    names = variables(keep)
    by_head = "h" in names
    asked = tuple(heads) if by_head else (0,)
    found = [_classes(keep, at, head, *rows) for head in asked]
    tiles = np.flatnonzero((np.stack(found) != EMPTY).any(0))
    if not tiles.size:
        return Block(*rows, None)
    columns = _columns(tiles, at.k_len, device)
    if all((classes[tiles] == FULL).all() for classes in found):
        return Block(*rows, columns)
    if loads(keep) or "b" in names:
        return Block(*rows, columns, _mask(keep, asked, at, rows, tiles, env, device))
    key = (keep, asked, at, rows, device)
    if key not in _MASKS:
        _MASKS[key] = _mask(keep, asked, at, rows, tiles, env, device)
        while sum(mask.numel() for mask in _MASKS.values()) > KEPT_BYTES and len(_MASKS) > 1:
            _MASKS.popitem(last=False)
    return Block(*rows, columns, _MASKS[key])


@functools.lru_cache(maxsize=1 << 15)
def _classes(keep: Pred, at: Where, head: int, first: int, last: int) -> np.ndarray:
    """The class of each key tile for the rows."""
    tile = (last - first, TILE)
    return tile_classes(keep, last - first, at.k_len, at.offset + first, head, tile)[0]


def _columns(tiles: np.ndarray, k_len: int, device: torch.device) -> slice | torch.Tensor:
    """The keys of some tiles: a slice where they are neighbours."""
    if tiles[-1] - tiles[0] + 1 == tiles.size:
        return slice(int(tiles[0]) * TILE, min((int(tiles[-1]) + 1) * TILE, k_len))
    return torch.from_numpy(_numbers(tiles, k_len)).to(device)


def _numbers(tiles: np.ndarray, k_len: int) -> np.ndarray:
    found = (tiles[:, None] * TILE + np.arange(TILE)).reshape(-1)
    return found[found < k_len]


def _mask(
    keep: Pred, heads: Sequence[int], at: Where, rows: tuple[int, int], tiles: np.ndarray, env: Mapping[str, Any],
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    known: dict[str, Any] = {"N": at.k_len, "Nq": at.q_len} | size_values(variables(keep), at.k_len) | dict(env)
    known["h"] = torch.tensor(heads, device=device).view(-1, 1, 1)
    known["q"] = torch.arange(*rows, device=device).view(-1, 1) + at.offset
    known["k"] = torch.from_numpy(_numbers(tiles, at.k_len)).to(device)
    found = torch.as_tensor(_evaluated(keep, known), device=device)
    return found.expand(*(1,) * (4 - found.dim()), *found.shape)


def _evaluated(keep: Pred, env: Mapping[str, Any]) -> Any:
    """`evaluate`, but what is asked of a table of units, `_i[b, _j[h], q // m, k // n]`, is looked up axis by axis: of
    all pairs at once that would take an index for each."""
    match keep:
        case And(parts) | Or(parts):
            found = [_evaluated(part, env) for part in parts]
            return functools.reduce(operator.and_ if isinstance(keep, And) else operator.or_, found)
        case Test(Load(source, (_, Load() as which, row, unit))):
            table = env[source][:, evaluate(which, env).flatten()]
            rows, units = (evaluate(part, env).flatten() for part in (row, unit))
            return table.index_select(2, rows).index_select(3, units)
    return evaluate(keep, env)
