"""Expected outputs kept in files: `tests/golden/NAME.txt` holds cases, each an input and what came of it.

    input
    -----
    output
    =====

`pytest --accept` rewrites the outputs by what is found; look at the difference before you commit it.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
SPLIT, END = "\n-----\n", "\n=====\n"


def cases(name: str) -> list[tuple[str, str]]:
    """The (input, output) pairs of a file."""
    found = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split(END)
    return [tuple(case.split(SPLIT)) for case in found if case]  # type: ignore[misc]


def ids(text: str) -> str:
    """A short test name from an input or an output."""
    return text.strip().replace("\n", " ")[-40:]


def check(name: str, given: str, expected: str, found: str, accept: bool) -> None:
    """Asserts that the output is the expected one, or writes it down."""
    if accept and found != expected:
        pairs = [(text, found if text == given else output) for text, output in cases(name)]
        (FOLDER / f"{name}.txt").write_text("".join(f"{a}{SPLIT}{b}{END}" for a, b in pairs), encoding="utf-8")
        return
    assert found == expected
