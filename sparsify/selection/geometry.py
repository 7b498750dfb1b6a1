"""Where queries, rows and units stand: positions, what a row can see, what is forced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify.patterns.selector import Selector

NEVER, ALWAYS = 2**62, 2**61  # a position that no query reaches, and the reach of a query that sees every key


class Rows(NamedTuple):
    """Rows of queries, all (B, R) int64: positions of the first and last valid query (NEVER and -1 where there is
    none), and the last key position that the row sees."""

    first: Tensor
    last: Tensor
    horizon: Tensor


class Places(NamedTuple):
    """Everything about positions that the steps share.

    valid: (B, M) keys that may be used, by their slots, or None for all.
    seat, horizon: (B, N) each query's position, and the last key position that it sees; -1 where it is not valid.
    inside: (B, U, unit) which tokens of each unit are keys that may be used.
    reach: (B, R, U) units of which the row sees a token.
    start: (B, 1) the first key that may be used.
    token: (B, U, unit) which token each slot of a unit holds, where keys are sorted; None where slots are tokens.
        Positions of keys are slots then, and horizons end before the query's own segment.
    """

    valid: Tensor | None
    seat: Tensor
    horizon: Tensor
    rows: Rows
    inside: Tensor
    reach: Tensor
    start: Tensor
    token: Tensor | None = None


def places(
    selector: Selector, position: Tensor, valid: Tensor | None, keys: int, causal: bool, order: Tensor | None = None
) -> Places:
    """The places of queries at `position` (B, N) among keys of which `valid` (B, M) may be used.

    order: (B, M), the token of each slot, where the selector has an order of the keys.
    """
    seat = torch.where(usable(position, valid, keys, causal), position, -1)
    horizon = seat if causal else torch.where(seat >= 0, ALWAYS, -1)
    token = None
    if order is not None:
        horizon = torch.where(seat >= 0, seat // selector.permute.segment * selector.permute.segment - 1, -1)
        token = split(order, selector.unit.k, NEVER)
        valid = None if valid is None else valid.expand(order.shape[0], -1).gather(1, order)
    blocks = split(seat, selector.unit.q, -1)
    rows = Rows(
        torch.where(blocks >= 0, blocks, NEVER).amin(-1), blocks.amax(-1), split(horizon, selector.unit.q, -1).amax(-1)
    )
    inside = inside_of(valid, keys, selector.unit.k, seat.device)
    edge = edges(inside, "touch")
    start = edge if token is None else torch.where(inside, token, NEVER).amin(-1)
    return Places(valid, seat, horizon, rows, inside, seen(rows.horizon, edge), start.amin(-1, keepdim=True), token)


def usable(position: Tensor, valid: Tensor | None, keys: int, causal: bool) -> Tensor:
    """Queries that take part: not before the first key, and one of several not where the key is padding."""
    usable = position >= 0
    if valid is None or not causal or position.shape[1] == 1:
        return usable
    batch = torch.broadcast_shapes(valid.shape[:1], position.shape[:1])[0]
    own = valid.expand(batch, -1).gather(1, position.clamp(0, keys - 1).expand(batch, -1))
    return usable & (own | (position >= keys))


def split(x: Tensor, size: int, fill: float | bool) -> Tensor:
    """(..., n) as blocks (..., ceil(n / size), size), the last filled up."""
    if size == 1:
        return x.unsqueeze(-1)
    if x.dtype == torch.bool:  # Inductor can't pad what is compared on the way: its C++ for AVX2 doesn't compile
        return split(x.float(), size, float(fill)) > 0.5
    n = x.shape[-1]
    blocks = blocks_in(n, size)
    return pad(x, (0, blocks * size - n), value=fill).unflatten(-1, (blocks, size))


def blocks_in(n: int, size: int) -> int:
    """How many blocks n tokens fill. Blocks are cut by this number, never by -1, so that symbolic sizes stay simple and
    no guard is made on them."""
    return (n + size - 1) // size


def inside_of(valid: Tensor | None, keys: int, size: int, device: torch.device) -> Tensor:
    """(B, blocks, size): which tokens of each block of keys may be used."""
    if valid is None:
        valid = torch.ones(1, keys, dtype=torch.bool, device=device)
    return split(valid, size, False)


def edges(inside: Tensor, causal: str) -> Tensor:
    """(B, blocks): the position that a query must have reached to see the block, its first or its last usable token."""
    blocks, size = inside.shape[-2:]
    token = torch.arange(blocks * size, device=inside.device).view(blocks, size)
    if causal == "touch":
        return torch.where(inside, token, NEVER).amin(-1)
    return torch.where(inside.any(-1), torch.where(inside, token, -1).amax(-1), NEVER)


def seen(horizon: Tensor, edge: Tensor) -> Tensor:
    """(B, queries, blocks): whose edge a query has reached."""
    return edge.unsqueeze(-2) <= horizon.unsqueeze(-1)


def forced_units(selector: Selector, at: Places) -> Tensor:
    """(B, R, U): sinks and local units, as far as the row sees them."""
    force, size = selector.force, selector.unit.k
    unit = torch.arange(at.reach.shape[-1], device=at.reach.device)
    forced = torch.zeros_like(at.reach)
    if at.token is not None:
        first = at.inside & (at.token < (at.start + force.sink).unsqueeze(-1))
        return first.any(-1).unsqueeze(-2) & at.reach
    if force.sink:
        first = at.start // size
        end = first + force.sink if force.of == "units" else (at.start + force.sink - 1) // size + 1
        forced = forced | ((unit >= first) & (unit < end)).unsqueeze(-2)
    if force.local:
        first, last = at.rows.first, at.rows.last // size
        begin = (
            first // size - force.local + 1 if force.of == "units" else (first - force.local + 1).clamp(min=0) // size
        )
        forced = forced | ((unit >= begin.unsqueeze(-1)) & (unit <= last.unsqueeze(-1)))
    return forced & at.reach


def dense_rows(selector: Selector, at: Places) -> Tensor:
    """(B, R): the last rows that have a valid query, as many as `force.last_rows`."""
    some = (at.rows.last >= 0).long()
    return some.bool() & (some.flip(-1).cumsum(-1).flip(-1) <= selector.force.last_rows)
