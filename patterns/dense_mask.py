"""The definition of every pattern: its predicate evaluated at each (h, q, k). Shares no code with tile analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify.expr import Pred
from sparsify.sizes import size_values
from sparsify.walk import evaluate, variables

if TYPE_CHECKING:
    import torch


def position_env(heads: int, q_len: int, k_len: int, q_offset: int | None, device: Any = None) -> dict[str, Any]:
    """b, h, q, k, N as integer tensors that broadcast to (batch, heads, q_len, k_len); b is filled in by the caller."""
    import torch

    offset = k_len - q_len if q_offset is None else q_offset
    return {
        "h": torch.arange(heads, device=device).view(-1, 1, 1),
        "q": torch.arange(q_len, device=device).view(-1, 1) + offset,
        "k": torch.arange(k_len, device=device),
        "N": k_len,
        "Nq": q_len,
    }


def dense_mask(keep: Pred, heads: int, q_len: int, k_len: int, q_offset: int | None = None) -> torch.Tensor:
    """A bool tensor (heads, q_len, k_len), True where `keep` holds."""
    import torch

    env = position_env(heads, q_len, k_len, q_offset)
    value = evaluate(keep, env | size_values(variables(keep), k_len))
    return torch.as_tensor(value).expand(heads, q_len, k_len).clone()
