"""Samples: what a model reads while it is profiled, searched with and validated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsify.errors import InputError

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Sample:
    """One input of a model.

    inputs: its keyword arguments, batch first. length: in tokens. tokens: (B, N) those of the text, if there is one.
    weights: (B, N) how much each position's prediction counts, None for all alike. needles: of planted facts,
    (place of the fact, place where it is asked again, length), each in tokens; row 0 is meant. kind: text or recall.
    """

    inputs: Mapping[str, Any]
    length: int
    tokens: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    needles: tuple[tuple[int, int, int], ...] = ()
    kind: str = "text"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_tokens(cls, tokens: torch.Tensor, **fields: Any) -> Sample:
        """From tokens (N,) or (B, N), for a model that takes `input_ids`."""
        tokens = tokens if tokens.dim() == 2 else tokens[None]
        return cls({"input_ids": tokens}, tokens.shape[1], tokens, **fields)

    def digest(self) -> str:
        """A hash of all that is in it."""
        found = hashlib.sha256(repr((self.kind, self.length, self.needles)).encode())
        given = dict(self.inputs), dict(self.extra), self.tokens, self.weights
        for path, value in torch.utils._pytree.tree_flatten_with_path(given)[0]:
            found.update(repr(path).encode())
            if isinstance(value, torch.Tensor | np.ndarray):
                found.update(repr((value.dtype, tuple(value.shape))).encode())
                tensor = torch.as_tensor(value).detach().cpu().contiguous()
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.update(repr(value).encode())
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class Tokenizer:
    """How a model reads text. encode: text to tokens, without special ones. first, last: those around a piece."""

    encode: Tokenize
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    def piece(self, tokens: np.ndarray) -> torch.Tensor:
        """Tokens (N,) with the special ones around them."""
        return torch.from_numpy(np.concatenate([self.first, tokens, self.last]).astype(np.int64))

    @property
    def around(self) -> int:
        return len(self.first) + len(self.last)


def of_bytes() -> Tokenizer:
    """For a model of bytes, which needs none."""
    return Tokenizer(lambda text: list(text.encode("utf-8")))


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """The texts in files and folders of files, in order. Raises InputError naming what can't be read, or is empty."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"plan: data: '{path}' is no file and no folder")
    texts = [file.read_bytes().decode("utf-8", errors="replace") for file in files]
    if not any(text.strip() for text in texts):
        raise InputError(f"plan: data: no text in {', '.join(map(str, paths))}")
    return texts


class Stream:
    """Tokens of texts in one row, and pieces of it."""

    def __init__(self, tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> None:
        self.tokens, self.tokenizer = np.asarray(tokens, dtype=np.int64), tokenizer

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> Stream:
        """All texts, one after another."""
        return cls(np.concatenate([np.asarray(tokenizer.encode(text), dtype=np.int64) for text in texts]), tokenizer)

    def split(self, share: float) -> tuple[Stream, Stream]:
        """The first `share` of it, and the rest."""
        at = int(len(self.tokens) * share)
        return Stream(self.tokens[:at], self.tokenizer), Stream(self.tokens[at:], self.tokenizer)

    def pieces(self, length: int, count: int, phase: float = 0.0) -> list[np.ndarray]:
        """`count` pieces of `length` tokens with the special ones, spread evenly; phase: moves them, from 0 to 1 of the
        distance of two. Raises InputError for a text that is too short for one."""
        size = length - self.tokenizer.around
        if len(self.tokens) < size or size < 2:
            raise InputError(
                f"plan: data: {len(self.tokens)} tokens of text are too few for one piece of {length}; give more text"
            )
        room = len(self.tokens) - size
        starts = [int((number + phase) / max(1, count) * (room + 1)) for number in range(count)]
        return [self.tokens[min(start, room) : min(start, room) + size] for start in starts]

    def samples(self, length: int, count: int, phase: float = 0.0, planted: float = 0.0, seed: int = 0) -> list[Sample]:
        """`count` samples; a share `planted` of them, the last ones, has facts to remember."""
        pieces, whole = self.pieces(length, count, phase), round(count * (1 - planted))
        rng = np.random.default_rng([seed, length])
        texts = [Sample.of_tokens(self.tokenizer.piece(piece)) for piece in pieces[:whole]]
        return texts + [self._recall(piece, rng) for piece in pieces[whole:]]

    def _recall(self, piece: np.ndarray, rng: np.random.Generator) -> Sample:
        found, needles = plant(piece, np.unique(self.tokens), rng)
        first = len(self.tokenizer.first)
        moved = tuple((first + fact, first + asked, size) for fact, asked, size in needles)
        return Sample.of_tokens(self.tokenizer.piece(found), needles=moved, kind="recall")


FACT, CUE = 24, 8  # tokens of a planted fact, and how many of its first ones are given when it is asked again


def plant(
    piece: np.ndarray, words: np.ndarray, rng: np.random.Generator, facts: int = 6
) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...]]:
    """A piece with runs of random tokens in its first quarter, each of which comes again in its last one.

    Nothing near the second time predicts a run, so heads that look far back have to copy it, as passkeys do
    (DuoAttention) and repeated blocks (RazorAttention). Also gives, for each, where what can be copied is, where it is
    asked for, and its length.
    """
    found, size = piece.copy(), len(piece)
    span = min(FACT, size // 32)
    facts = max(1, min(facts, size // (8 * span))) if span >= 4 else 0
    cue, needles = max(1, span * CUE // FACT), []
    for number in range(facts):
        run = rng.choice(words, span)
        fact = int((number + rng.random() * 0.5) * (size // 4) / facts)
        asked = int(size * 3 // 4 + (number + rng.random() * 0.5) * (size // 4) / facts)
        found[fact : fact + span] = run
        found[asked : asked + span] = run
        needles.append((fact + cue, asked + cue, span - cue))
    return found, tuple(needles)


def of_hugging_face(tokenizer: Any) -> Tokenizer:
    """As a tokenizer of transformers reads text, with the special tokens that it puts around one."""
    inner, whole = (tokenizer("text", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return Tokenizer(_encoder(tokenizer), tuple(whole[:at]), tuple(whole[at + len(inner) :]))


def _encoder(tokenizer: Any) -> Tokenize:
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
