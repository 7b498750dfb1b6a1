"""Counting what a predicate keeps: whole tiles by their class, partial tiles pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify.expr import Pred
from sparsify.patterns.interior import by_intervals
from sparsify.patterns.spans import band_pieces
from sparsify.patterns.tiles import analyse, bands
from sparsify.sizes import size_values
from sparsify.walk import evaluate, loads, variables

EMPTY, PARTIAL, FULL = 0, 1, 2
TILE = 64
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many there are


@dataclass(frozen=True)
class Positions:
    """Where the queries and keys of a launch stand. q_slots, k_slots: how many slots each have. offset: the position of
    the first query. q_len, k_len: the variables Nq and N of predicates."""

    q_slots: int
    k_slots: int
    offset: int
    q_len: int
    k_len: int

    @classmethod
    def plain(cls, q_len: int, k_len: int, offset: int) -> Positions:
        """Those of queries and keys in their own order."""
        return cls(q_len, k_len, offset, q_len, k_len)


def corners(keep: Pred, head: int, at: Positions, rows: int, some: np.ndarray | None = None) -> dict[str, Any]:
    """The variables of tile rules for all query tiles of a head, or for `some` of them."""
    q0 = np.arange(0, at.q_slots, rows, dtype=np.int64) if some is None else some * rows
    env: dict[str, Any] = {"b": 0, "h": head, "N": at.k_len, "Nq": at.q_len}
    env |= {"q0": q0 + at.offset, "q1": np.minimum(q0 + rows, at.q_slots) - 1 + at.offset}
    return env | size_values(variables(keep), at.k_len)


def tile_classes(
    keep: Pred, q_len: int, k_len: int, q_offset: int | None = None, head: int = 0,
    tile: tuple[int, int] = (TILE, TILE), rows: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The class of every tile of one head: an int8 array (query tiles, key tiles) of EMPTY, PARTIAL, FULL.

    Sound: EMPTY keeps nothing and FULL keeps everything. Edge tiles are cut at q_len and k_len. Loads from tensors
    and the batch are not known here, so tiles that depend on one are PARTIAL. rows: the query tiles to look at, all by
    default.
    """
    offset = k_len - q_len if q_offset is None else q_offset
    rows = np.arange(-(-q_len // tile[0]), dtype=np.int64) if rows is None else rows
    env = _grid(corners(keep, head, Positions.plain(q_len, k_len, offset), tile[0], rows), k_len, tile[1])
    rule = analyse(keep).of_any_batch()
    classes = np.full((rows.size, env["k0"].size), PARTIAL, dtype=np.int8)
    classes[np.broadcast_to(evaluate(rule.full, env), classes.shape)] = FULL
    classes[np.broadcast_to(evaluate(rule.empty, env), classes.shape)] = EMPTY
    return classes


def executed(
    keep: Pred, length: int, head: int = 0, tile: tuple[int, int] = (TILE, TILE), samples: int = 64
) -> tuple[float, float]:
    """(visited, whole): how many tiles of a length x length square one head visits, and how many of those are FULL.

    Beyond `samples` query tiles it is an estimate from as many, spread evenly.
    """
    rows, share = _spread(-(-length // tile[0]), samples)
    classes = tile_classes(keep, length, length, 0, head, tile, rows)
    return float(np.count_nonzero(classes != EMPTY)) * share, float(np.count_nonzero(classes == FULL)) * share


def visited(keep: Pred, length: int, tile: tuple[int, int] = (TILE, TILE), samples: int = 64) -> float:
    """What `executed` says first of head 0. Where each query keeps all of its bands' keys no tile is looked at."""
    rows, share = _spread(-(-length // tile[0]), samples)
    env = corners(keep, 0, Positions.plain(length, length, 0), tile[0], rows)
    if by_intervals(keep) and not loads(keep) and "b" not in variables(keep):
        found = band_pieces([(bands(keep), env)], rows.size, length, tile[1])
        return float(found.lengths.sum()) * share
    empty = evaluate(analyse(keep).of_any_batch().empty, _grid(env, length, tile[1]))
    count = np.count_nonzero(~np.broadcast_to(np.asarray(empty), (rows.size, -(-length // tile[1]))))
    return float(count) * share


def _grid(env: dict[str, Any], k_len: int, width: int) -> dict[str, Any]:
    """The same for all key tiles: query tiles down, key tiles across."""
    k0 = np.arange(0, k_len, width, dtype=np.int64)[None, :]
    sides = {"q0": env["q0"][:, None], "q1": env["q1"][:, None], "k0": k0, "k1": np.minimum(k0 + width, k_len) - 1}
    return env | sides


def _spread(tiles: int, samples: int) -> tuple[np.ndarray, float]:
    """Query tiles, all of them or about `samples` spread evenly, and how many each of them stands for."""
    rows = np.arange(tiles, dtype=np.int64)
    if tiles > samples:
        rows = np.unique((np.arange(samples) * GOLDEN % 1 * tiles).astype(np.int64))
    return rows, tiles / max(1, rows.size)


def kept_pairs(keep: Pred, heads: int, q_len: int, k_len: int, q_offset: int | None = None) -> int:
    """How many of the heads * q_len * k_len pairs are kept."""
    if not heads or not q_len or not k_len:
        return 0
    if "h" not in variables(keep):
        return heads * kept_by_head(keep, 0, q_len, k_len, q_offset)
    return sum(kept_by_head(keep, head, q_len, k_len, q_offset) for head in range(heads))


def kept_by_head(keep: Pred, head: int, q_len: int, k_len: int, q_offset: int | None = None) -> int:
    """How many of the q_len * k_len pairs one head keeps."""
    return int(kept_by_row(keep, head, q_len, k_len, q_offset).sum())


def kept_by_row(keep: Pred, head: int, q_len: int, k_len: int, q_offset: int | None = None) -> np.ndarray:
    """How many of the k_len keys each of the q_len queries of one head keeps: (q_len,) int64."""
    offset = k_len - q_len if q_offset is None else q_offset
    classes = tile_classes(keep, q_len, k_len, offset, head)
    widths = np.minimum(np.arange(0, k_len, TILE) + TILE, k_len) - np.arange(0, k_len, TILE)
    kept = np.repeat((classes == FULL).astype(np.int64) @ widths, TILE).reshape(-1, TILE)
    rows, columns = np.nonzero(classes == PARTIAL)
    env = {"h": head, "N": k_len, "Nq": q_len} | size_values(variables(keep), k_len)
    inside = np.arange(TILE)
    for start in range(0, rows.size, 4096):  # 4096 tiles of 64 x 64 are 16 million pairs at a time
        some = rows[start : start + 4096]
        q = some[:, None, None] * TILE + inside[None, :, None]
        k = columns[start : start + 4096, None, None] * TILE + inside[None, None, :]
        found = evaluate(keep, env | {"q": q + offset, "k": k})
        np.add.at(kept, some, np.count_nonzero(found & (q < q_len) & (k < k_len), axis=2))
    return kept.reshape(-1)[:q_len]
