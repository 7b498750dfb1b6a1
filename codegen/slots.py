"""The tokens that slots hold, as tensors: for the oracle and the interpreter, which gather rows by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsify.walk import evaluate

if TYPE_CHECKING:
    import torch

    from sparsify.program import Layout


def slot_count(layout: Layout | None, length: int, env: Mapping[str, Any]) -> int:
    """How many slots there are for so many tokens."""
    return length if layout is None else int(evaluate(layout.slots, env))


def tokens(layout: Layout, name: str, length: int, env: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, filled) of every slot, each (B or 1, H or 1, slots); the token of an empty slot is 0.

    `name` is the slot's variable, q or k; `env` gives b and h as they broadcast to (B, H, 1, 1), N, Nq and loads.
    """
    import torch

    slots = slot_count(layout, length, env)
    device = env["b"].device
    here = dict(env) | {name: torch.arange(slots, device=device)}
    here |= {axis: env[axis].reshape(-1, 1, 1) if axis == "b" else env[axis].reshape(1, -1, 1) for axis in ("b", "h")}
    filled = torch.as_tensor(evaluate(layout.filled, here), device=device)
    filled = filled.broadcast_to(torch.broadcast_shapes(filled.shape, (1, 1, slots)))
    clipped = {k: v for k, v in here.items() if k != name} | {name: torch.where(filled, here[name], 0)}
    token = torch.as_tensor(evaluate(layout.token, clipped), device=device)
    token = token.expand(*((1,) * (3 - token.dim())), *token.shape)
    return torch.where(filled, token, 0), filled


def asked(slots: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """The slots with the first one, which holds a token, in place of empty ones: loads have nothing for these."""
    import torch

    return torch.where(filled, slots, 0)


def gathered(tensor: torch.Tensor, token: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Rows of (B, H, N, D) by the tokens (B or 1, H or 1, slots) of slots: (B, H, slots, D), 0 in empty ones."""
    batch, heads, _, size = tensor.shape
    index = token.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, size)
    return tensor.gather(2, index) * filled[..., None]


def scattered(slots: torch.Tensor, token: torch.Tensor, filled: torch.Tensor, length: int) -> torch.Tensor:
    """The other way: (B, H, slots, D) to (B, H, length, D), 0 where no slot holds a token."""
    batch, heads, _, size = slots.shape
    index = token.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, size)
    out = slots.new_zeros(batch, heads, length, size)
    return out.scatter_add_(2, index, slots * filled[..., None])
