"""Real prose that every machine with Python has: the docstrings of its standard library, one text a module."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path

SHORTEST = 2200  # characters: about 512 tokens


def modules(seed: int = 0) -> list[str]:
    """The docstrings of each module that has enough of them, modules in an order of `seed`."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(file.parts)]
    texts = [text for file in files if len(text := _prose(file)) >= SHORTEST]
    random.Random(seed).shuffle(texts)
    return texts


def _prose(file: Path) -> str:
    source = file.read_text(encoding="utf-8", errors="ignore")
    if len(source) < SHORTEST:
        return ""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a file that is there to be wrong
        return ""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n".join(text for text in found if text and len(text) > 60)
