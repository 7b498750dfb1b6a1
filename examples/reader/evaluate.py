"""How well a reader reads: bits per byte of held-out text, and bits per answer byte of long-range recall."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from examples.reader.corpus import ANSWER, Text, distant_document, held_out_files

Logits = Callable[[torch.Tensor], torch.Tensor]  # bytes (1, N) int64 -> logits (1, N, 256)
BITS = 1 / np.log(2.0)


def held_out_windows(length: int, count: int) -> Iterator[torch.Tensor]:
    """`count` evenly spread pieces (1, length) of the held-out modules."""
    data = Text(held_out_files()).data
    for start in np.linspace(0, len(data) - length - 1, count).astype(int):
        yield torch.from_numpy(data[start : start + length].astype(np.int64))[None]


def recall_documents(length: int, count: int, seed: int = 7) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` documents (1, length) of held-out code with facts asked for far behind, and where the answers are."""
    text = Text(held_out_files())
    for number in range(count):
        document = distant_document(np.random.default_rng([seed, number]), text, length)
        yield torch.from_numpy(document.data.astype(np.int64))[None], torch.from_numpy(document.kind == ANSWER)


def bits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Bits (N - 1,) that each byte but the first costs."""
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none") * BITS


def bits_per_byte(model: Logits, length: int, count: int) -> float:
    """The mean over held-out text."""
    return float(np.mean([bits(model(tokens), tokens).mean().item() for tokens in held_out_windows(length, count)]))


def bits_per_answer(model: Logits, length: int, count: int) -> float:
    """The mean over the answer bytes of recall documents; about 5.2 is a guess, 0 is perfect memory."""
    costs = [bits(model(tokens), tokens)[where[1:]] for tokens, where in recall_documents(length, count)]
    return torch.cat(costs).mean().item()
