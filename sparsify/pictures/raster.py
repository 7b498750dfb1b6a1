"""A predicate as a small grid of shares: how much of each cell is kept. No N x N mask is ever made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsify.expr import Pred
from sparsify.patterns.count import FULL, PARTIAL, tile_classes
from sparsify.sizes import size_values
from sparsify.walk import evaluate, variables

CELLS = 256  # at most, along each side
BUDGET = 2**24  # pairs evaluated for one head, about
CHUNK = 2**22


@dataclass(frozen=True)
class Raster:
    """share: float32 (rows, columns), the part of each cell's pairs that is kept; `exact` unless it was sampled.

    tile: queries and keys of one cell; kept: the number of pairs in all.
    """

    share: np.ndarray
    tile: tuple[int, int]
    kept: float
    exact: bool


def raster(keep: Pred, head: int, q_len: int, k_len: int) -> Raster:
    """The grid of one head; the queries are the last `q_len` of `k_len` positions.

    Cells that tile analysis proves empty or full are not looked at. Of the others every key is evaluated, for all
    queries of the cell or, where that is too much work, for some of them.
    """
    tile = _cell(q_len), _cell(k_len)
    classes = tile_classes(keep, q_len, k_len, head=head, tile=tile)
    share = (classes == FULL).astype(np.float32)
    rows, columns = np.nonzero(classes == PARTIAL)
    lines = max(1, min(tile[0], BUDGET // max(1, rows.size * tile[1])))
    env = {"h": head, "N": k_len, "Nq": q_len} | size_values(variables(keep), k_len)
    step = max(1, CHUNK // (lines * tile[1]))
    for start in range(0, rows.size, step):
        some = rows[start : start + step], columns[start : start + step]
        share[some] = _shares(keep, env, *some, tile, lines, q_len, k_len)
    heights = np.minimum(tile[0], q_len - np.arange(share.shape[0]) * tile[0])
    widths = np.minimum(tile[1], k_len - np.arange(share.shape[1]) * tile[1])
    kept = float(heights.astype(np.float64) @ share @ widths)
    return Raster(share, tile, kept, exact=lines == tile[0] or not rows.size)


def raster_of(mask: Any) -> Raster:
    """The grid of a mask: a bool array (queries, keys)."""
    kept = np.asarray(mask, dtype=bool)
    tile = _cell(kept.shape[0]), _cell(kept.shape[1])
    starts = [np.arange(0, size, step) for size, step in zip(kept.shape, tile, strict=True)]
    count = np.add.reduceat(np.add.reduceat(kept.astype(np.int64), starts[0], axis=0), starts[1], axis=1)
    heights, widths = (np.diff(first, append=size) for first, size in zip(starts, kept.shape, strict=True))
    return Raster((count / np.outer(heights, widths)).astype(np.float32), tile, float(kept.sum()), exact=True)


def _cell(length: int) -> int:
    """The smallest power of two that needs at most CELLS cells: aligned with every power-of-two block."""
    size = 1
    while -(-length // size) > CELLS:
        size *= 2
    return size


def _shares(
    keep: Pred, env: dict[str, Any], rows: np.ndarray, columns: np.ndarray, tile: tuple[int, int], lines: int,
    q_len: int, k_len: int,
) -> np.ndarray:  # fmt: skip
    """The kept share of some cells, from `lines` of the queries of each, spread differently from cell to cell."""
    first, spread = rows * tile[0], np.arange(lines)
    phase = (rows * 0.6180339887 + columns * 0.7548776662) % 1.0 if lines < tile[0] else np.zeros(rows.size)
    height = np.minimum(tile[0], q_len - first)
    q = first[:, None] + ((spread[None] + phase[:, None]) * height[:, None] / lines).astype(np.int64)
    if lines == tile[0]:
        q = first[:, None] + spread[None]
    q, k = q[:, :, None], columns[:, None, None] * tile[1] + np.arange(tile[1])
    inside = (q < q_len) & (k < k_len)
    kept = evaluate(keep, env | {"q": q + (k_len - q_len), "k": k}) & inside
    return kept.sum(axis=(1, 2)) / inside.sum(axis=(1, 2))
