"""What the reader reads: CPython's own standard library, and documents that reward a memory.

Three sources, all made from the running interpreter and a seed, nothing downloaded:

* **held-out text**: the modules in `HELD_OUT`, never trained on; they are what the demo reads;
* **training text**: every other module of the standard library, its test-suite included;
* **recall documents**: real code with facts planted in it (`#: name = value`, both random) and
  asked for again up to a whole context later.  Random strings and slices of code are planted and
  repeated in the same way.  No amount of local context predicts an answer, so some heads of a
  model trained on them have to look all the way back.
"""

from __future__ import annotations

import string
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

#: Modules the model never saw, by their path below `Lib/` (the same in CPython 3.11 to 3.13).
HELD_OUT = (
    "argparse.py",
    "calendar.py",
    "configparser.py",
    "difflib.py",
    "fractions.py",
    "ftplib.py",
    "mailbox.py",
    "shlex.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
    "zipapp.py",
)

#: What a byte of a document is: ordinary text, unpredictable, or an answer found far back.
TEXT, NOISE, ANSWER = 0, 1, 2

#: Shares of the training documents: plain code, planted facts, repeated passages.
SHARES = (0.5, 0.3, 0.2)

ALPHANUMERIC = np.frombuffer((string.ascii_lowercase + string.digits).encode(), np.uint8)
SKIPPED_FOLDERS = {"site-packages", "encodings", "__pycache__"}


def stdlib() -> Path:
    """The running interpreter's `Lib/`."""
    return Path(sysconfig.get_path("stdlib"))


def held_out_files(root: Path | None = None) -> list[Path]:
    """The held-out modules of a standard library (the running one's)."""
    return [(root or stdlib()) / name for name in HELD_OUT]


def is_held_out(path: Path) -> bool:
    """Whether a file is a held-out module, a namesake of one anywhere, or the tests of one."""
    return path.name.removeprefix("test_") in HELD_OUT


def training_files(root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The training modules of a standard library: (the library proper, its tests)."""
    root = root or stdlib()
    proper, tests = [], []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if is_held_out(path) or SKIPPED_FOLDERS.intersection(folders):
            continue
        tested = any("test" in folder for folder in folders)
        (tests if tested else proper).append(path)
    return proper, tests


class Text:
    """Source files joined into one stream of bytes, to cut pieces from."""

    def __init__(self, files: list[Path]) -> None:
        """Join the files, each followed by a zero byte."""
        joined = b"".join(file.read_bytes() + b"\0" for file in files)
        self.data = np.frombuffer(joined, np.uint8)

    @cached_property
    def lines(self) -> np.ndarray:
        """Where lines begin."""
        return np.flatnonzero(self.data[:-1] == ord("\n")) + 1

    def slice(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """`size` bytes from a random place."""
        start = rng.integers(len(self.data) - size)
        return self.data[start : start + size]

    def passage(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Whole lines from a random place, `size` bytes or a little more."""
        start = self.lines[rng.integers(len(self.lines) - size - 1)]
        end = self.lines[np.searchsorted(self.lines, start + size)]
        return self.data[start:end]


@dataclass(frozen=True)
class Document:
    """Bytes, and for each what it is (`TEXT`, `NOISE` or `ANSWER`)."""

    data: np.ndarray
    kind: np.ndarray

    def labels(self) -> np.ndarray:
        """Targets for a loss: the bytes, and -100 where nothing could predict them."""
        return np.where(self.kind == NOISE, -100, self.data.astype(np.int64))


@dataclass(frozen=True)
class Plant:
    """Bytes that a document shows once and repeats later; the repeat's `cue` is unpredictable."""

    data: np.ndarray
    cue: slice
    answer: slice
    novel: bool  # whether the first showing is random (or ordinary text)

    def shown(self) -> Document:
        """The plant where it first appears."""
        kind = np.full(len(self.data), TEXT, np.uint8)
        if self.novel:
            kind[self.cue] = kind[self.answer] = NOISE
        return Document(self.data, kind)

    def asked(self) -> Document:
        """The plant where it is repeated."""
        kind = np.full(len(self.data), TEXT, np.uint8)
        kind[self.cue], kind[self.answer] = NOISE, ANSWER
        return Document(self.data, kind)


#: A document, and the place in a longer one where it belongs.
Event = tuple[int, Document]


def letters(rng: np.random.Generator, low: int, high: int) -> bytes:
    """A random word of `low` to `high` lower-case letters and digits."""
    return rng.choice(ALPHANUMERIC, rng.integers(low, high + 1)).tobytes()


def fact(rng: np.random.Generator) -> Plant:
    """A random name with a random value."""
    name, value = letters(rng, 4, 8), letters(rng, 6, 12)
    line = b"#: %s = %s\n" % (name, value)
    start = len(line) - len(value) - 1
    cue, answer = slice(3, 3 + len(name)), slice(start, start + len(value))
    return Plant(np.frombuffer(line, np.uint8), cue, answer, novel=True)


def block(rng: np.random.Generator) -> Plant:
    """A run of random words."""
    words = b" ".join(letters(rng, 2, 9) for _ in range(rng.integers(4, 20)))
    line = np.frombuffer(b"#> " + words + b"\n", np.uint8)
    return Plant(line, slice(3, 8), slice(8, len(line)), novel=True)


def excerpt(rng: np.random.Generator, text: Text) -> Plant:
    """A few lines of real code."""
    data = text.passage(rng, int(rng.integers(80, 320)))
    cue = min(24, len(data) // 2)
    return Plant(data, slice(0, cue), slice(cue, len(data)), novel=False)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> int:
    """A whole number whose logarithm is uniform."""
    return int(np.exp(rng.uniform(np.log(low), np.log(max(high, low + 1)))))


def scattered(rng: np.random.Generator, plants: list[Plant], length: int) -> list[Event]:
    """Each plant shown at a random place and asked for twice, nearer or farther behind it."""
    events = []
    for plant in plants:
        place = int(rng.integers(0, length * 9 // 10))
        events.append((place, plant.shown()))
        for _ in range(2):
            distance = log_uniform(rng, 64, length - place)
            events.append((place + distance, plant.asked()))
    return events


def compose(rng: np.random.Generator, text: Text, events: list[Event], length: int) -> Document:
    """Put documents at (or soon after) their places in `length` bytes of code."""
    pieces: list[Document] = []
    size = 0
    for place, document in [*sorted(events, key=lambda event: event[0]), (length, None)]:
        if place > size:
            code = text.passage(rng, place - size)
            pieces.append(Document(code, np.full(len(code), TEXT, np.uint8)))
            size += len(code)
        if document is not None:
            pieces.append(document)
            size += len(document.data)
    return Document(
        np.concatenate([piece.data for piece in pieces])[:length],
        np.concatenate([piece.kind for piece in pieces])[:length],
    )


def recall_document(rng: np.random.Generator, text: Text, length: int) -> Document:
    """Code with facts planted in it, from two of them to a table of nothing else."""
    facts = [fact(rng) for _ in range(log_uniform(rng, 2, length / 48))]
    return compose(rng, text, scattered(rng, facts, length), length)


def copy_document(rng: np.random.Generator, text: Text, length: int) -> Document:
    """Code in which random runs of words, and slices of code, come three times."""
    count = log_uniform(rng, 2, length / 160)
    plants = [block(rng) if rng.random() < 0.6 else excerpt(rng, text) for _ in range(count)]
    return compose(rng, text, scattered(rng, plants, length), length)


def drill_document(rng: np.random.Generator, length: int) -> Document:
    """One random run of letters over and over: the shortest way to teach looking back."""
    run = rng.choice(ALPHANUMERIC, log_uniform(rng, 12, length / 3))
    data = np.resize(run, length)
    kind = np.full(length, ANSWER, np.uint8)
    kind[: len(run) + 2] = NOISE
    return Document(data, kind)


def distant_document(rng: np.random.Generator, text: Text, length: int, facts: int = 12) -> Document:
    """Code with facts shown in its first quarter and asked for, once each, in its last."""
    events = []
    for plant in [fact(rng) for _ in range(facts)]:
        events.append((int(rng.uniform(0, 0.22) * length), plant.shown()))
        events.append((int(rng.uniform(0.75, 0.97) * length), plant.asked()))
    return compose(rng, text, events, length)


class TrainingMix:
    """Endless training documents: plain code, planted facts, repeated passages."""

    def __init__(self, seed: int, root: Path | None = None) -> None:
        """Read the standard library."""
        proper, tests = training_files(root)
        self.rng = np.random.default_rng(seed)
        self.library, self.tests = Text(proper), Text(tests)

    def document(self, length: int, drills: float = 0.0) -> Document:
        """One document of exactly `length` bytes; a share `drills` of them is no text at all."""
        if self.rng.random() < drills:
            return drill_document(self.rng, length)
        text = self.library if not len(self.tests.data) or self.rng.random() < 0.75 else self.tests
        source = self.rng.choice(3, p=SHARES)
        if source == 0:
            return Document(text.slice(self.rng, length), np.full(length, TEXT, np.uint8))
        return (recall_document if source == 1 else copy_document)(self.rng, text, length)
