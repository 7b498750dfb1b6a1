"""Readings: the samples that a plan is profiled on, searched with and validated on; what validates shares no
text with the others, unless a user gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsify.errors import InputError
from sparsify.planner.samples import Sample, Stream, Tokenizer, of_bytes
from sparsify.planner.settings import Settings

TOGETHER = 4  # rows that make one sample
SEEN = 0.7  # the share of a text that is profiled and searched with, where none is given to validate with


@dataclass(frozen=True)
class Readings:
    """profile: what losses are profiled on. search: what choices are measured on. validation: what decides."""

    profile: tuple[Sample, ...]
    search: tuple[Sample, ...]
    validation: tuple[Sample, ...]


def readings(
    data: Any, held_out: Any, settings: Settings, tokenizer: Tokenizer | None, causal: bool, longest: int | None
) -> Readings:
    """From `Readings` as they are, texts, or tokens: (N,) a stream, (rows, N) texts of one length.

    held_out: more of the same, to validate with; else the end of `data`. longest: that the model can read. Raises
    InputError for data that are none or too few, and for lengths beyond the model's.
    """
    for length in settings.lengths:
        if longest is not None and length > longest:
            raise InputError(f"plan: lengths: found {length}; the model reads at most {longest} tokens")
    if isinstance(data, Readings):
        for part, samples in vars(data).items():
            if not samples:
                raise InputError(f"plan: data: {part}: expected one sample at least, found none")
            wrong = next((one for one in samples if not isinstance(one, Sample)), None)
            if wrong is not None:
                raise InputError(f"plan: data: {part}: expected Samples, found {type(wrong).__name__}")
        return data
    if isinstance(data, torch.Tensor) and data.dim() == 2:
        return _rows(data, held_out)
    seen = _stream(data, tokenizer, "data")
    seen, unseen = seen.split(SEEN) if held_out is None else (seen, _stream(held_out, tokenizer, "held_out"))
    recall = settings.recall if settings.recall is not None else (0.25 if causal else 0.0)
    profile = [
        sample for length in settings.lengths for sample in seen.samples(length, settings.samples, 0.0, recall, 1)
    ]
    search = seen.samples(max(settings.lengths), max(2, settings.samples), 0.5, recall, 2)
    other = _unseen_length(settings, longest, len(unseen.tokens))
    validation = unseen.samples(other, max(4, settings.samples), 0.0, recall, 3)
    return Readings(tuple(profile), tuple(search), tuple(validation))


def _stream(data: Any, tokenizer: Tokenizer | None, name: str) -> Stream:
    tokenizer = tokenizer or of_bytes()
    if isinstance(data, torch.Tensor | np.ndarray):
        _check_integers(data, name)
        found = Stream(np.asarray(data).reshape(-1), tokenizer)
    elif isinstance(data, str):
        found = Stream.of([data], tokenizer)
    elif isinstance(data, Sequence) and data and all(isinstance(text, str) for text in data):
        found = Stream.of(data, tokenizer)
    else:
        what = "texts, tokens or Readings" if name == "data" else "texts or tokens"
        raise InputError(f"plan: {name}: expected {what}, found {_shown(data)}")
    if not len(found.tokens):
        raise InputError(f"plan: {name}: no text")
    return found


def _check_integers(data: torch.Tensor | np.ndarray, name: str) -> None:
    """Raises InputError for tokens that are no integers."""
    if torch.as_tensor(data[:0]).dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise InputError(f"plan: {name}: expected tokens, which are integers, found {data.dtype}")


def _rows(data: torch.Tensor, held_out: Any) -> Readings:
    """Samples as they are."""
    _check_integers(data, "data")
    if held_out is not None:
        if not (isinstance(held_out, torch.Tensor) and held_out.dim() == 2):
            what = "expected rows of tokens, a tensor (rows, N), as data are"
            raise InputError(f"plan: held_out: {what}, found {_shown(held_out)}")
        _check_integers(held_out, "held_out")
    if held_out is None:
        cut = max(1, int(len(data) * SEEN))
        data, held_out = data[:cut], data[cut:]
    if len(data) < 2 or not len(held_out):
        raise InputError(f"plan: data: {len(data)} rows are too few to profile, search and validate with; give more")
    half = max(1, len(data) // 2)
    parts = data[:half], data[half:], held_out
    return Readings(*(tuple(Sample.of_tokens(rows) for rows in part.split(TOGETHER)) for part in parts))


def _unseen_length(settings: Settings, longest: int | None, tokens: int) -> int:
    """Half as long again as the longest that was profiled, where the model and the text allow; else three quarters of
    it."""
    if settings.validate_length is not None:
        if longest is not None and settings.validate_length > longest:
            what = f"the model reads at most {longest} tokens"
            raise InputError(f"plan: validate_length: found {settings.validate_length}; {what}")
        return settings.validate_length
    most = max(settings.lengths)
    wanted = most * 3 // 2
    if (longest is None or wanted <= longest) and wanted <= tokens:
        return wanted
    return min(most * 3 // 4, tokens)


def _shown(value: Any) -> str:
    return "nothing" if value is None or (hasattr(value, "__len__") and not len(value)) else type(value).__name__
