"""What heads attend to and what they keep of it, as small grids: values that `look` makes and the evidence draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GAMMA = 0.45  # attention spans decades: shares are drawn by this power


@dataclass(frozen=True)
class SitePicture:
    """The heads of one site on one text of `queries` and `keys` tokens; a cell is of `cell` tokens each way.

    attention: uint8 (H, rows, columns), 255 * s**GAMMA of the share s of the attention of a cell's queries that is on
    its keys, so that a row's shares sum to 1. kept: uint8 (H, rows, columns), 255 times the share of a cell's pairs
    that the plan keeps. dropped: uint8 (H, rows, columns), 255 times the share of a cell's attention that it drops.
    recall: float (H,), the share of all attention that is kept.
    """

    queries: int
    keys: int
    cell: int
    attention: np.ndarray
    kept: np.ndarray
    dropped: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class Pictures:
    """One picture a site, in the order of the plan's sites. text: what the model read, in words."""

    sites: tuple[SitePicture, ...]
    text: str = ""
