"""DuoAttention: a folder with `full_attention_heads.tsv`, a gate for each layer and KV head, and `config.json`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import InputError
from sparsify.imports.option import Option
from sparsify.imports.plan import Imported
from sparsify.imports.source import File

NAME, TITLE = "duo_attention", "DuoAttention: a folder with full_attention_heads.tsv and config.json"
SOURCE = (
    "DuoAttention (Xiao et al., arXiv 2410.10819; mit-han-lab/duo-attention): retrieval heads dense, others streaming"
)
GATES, CONFIG = "full_attention_heads.tsv", "config.json"
OPTIONS = {
    "sparsity": Option(
        float, None, "DuoAttention: the share of KV heads that stream, those of the lowest gates.", 0, 1
    ),
    "threshold": Option(
        float, None, "DuoAttention: the gate, retrieval heads: the mean score, from which a head is dense.", 0, 1
    ),
    "sinks": Option(int, None, "First keys that other heads keep."),
    "recent": Option(int, None, "Latest keys that other heads keep.", 1),
}


def folder_of(path: Path) -> Path | None:
    """The folder that a path means: itself, or that of one of the two files; None for another file."""
    if path.is_dir():
        return path
    return path.parent if path.suffix == ".tsv" or path.name == CONFIG else None


def is_meant(path: Path) -> bool:
    """Whether a path means a plan of this format, be it right or wrong: gates, or a folder or config that has them."""
    folder = folder_of(path)
    return path.suffix == ".tsv" or (folder is not None and os.path.exists(folder / GATES))


def plan(
    path: Path, sparsity: float | None, threshold: float | None, sinks: int | None, recent: int | None
) -> Imported:
    """What the folder says. Raises InputError naming file and place."""
    if sparsity is not None and threshold is not None:
        raise InputError("import: sparsity and threshold both say which heads are dense; give one")
    folder = folder_of(path)
    gates = File(path if path.suffix == ".tsv" or folder is None else folder / GATES)
    config = File((folder or path.parent) / CONFIG)
    said = _config(config)
    rows = [[min(max(gate, 0.0), 1.0) for gate in row] for row in gates.table()]
    if threshold is None and sparsity is None:
        sparsity, threshold = said["sparsity"], said["threshold"]
    full, how = _full(rows, sparsity, threshold)
    given = {
        "sinks": said["sinks"] if sinks is None else sinks,
        "recent": said["recent"] if recent is None else recent,
    }
    layers = tuple(tuple("dense" if one else "streaming" for one in row) for row in full)
    dense = sum(map(sum, full))
    notes = [
        f"Dense are {dense} of the {sum(map(len, rows))} KV heads: {how}.",
        "Streaming heads run the deployed rule at prefill, too, where the released code shows them their whole chunk.",
    ]
    forms = {"streaming": {"duo_streaming": given}}
    return Imported(NAME, gates.path, layers, forms, by_kv_head=True, notes=tuple(notes))


def _config(file: File) -> dict[str, Any]:
    """The sizes that the heads are deployed with, else those they were trained with, and which heads are dense."""
    value = file.json()
    if not isinstance(value, dict):
        raise file.error((), f"expected an object with 'sink_size' and 'recent_size', found {value!r}")
    found: dict[str, Any] = {}
    for name, key, low in (("sinks", "sink_size", 0), ("recent", "recent_size", 1)):
        deployed = f"deploy_{key}"
        key = key if value.get(deployed) is None else deployed
        if key not in value:
            raise file.error((), f"the field '{key}' is missing")
        found[name] = file.number(value[key], (key,), low)
        if not isinstance(found[name], int):
            raise file.error((key,), f"expected an integer of at least {low}, found {found[name]}")
    for key, default in (("sparsity", None), ("threshold", 0.5)):
        given = value.get(key)
        found[key] = default if given is None else file.number(given, (key,), 0, 1)
    return found


def _full(rows: Sequence[Sequence[float]], sparsity: float | None, threshold: float | None) -> tuple[Any, str]:
    """Which heads are dense: those from the quantile of all gates on, else those from the threshold on.

    The quantile is that of numpy, between two gates where it falls there; of equal gates the first heads are dense, so
    that as many are as there would be if all differed.
    """
    if sparsity is None:
        return [[gate >= threshold for gate in row] for row in rows], f"those with a gate of {threshold:g} or more"
    order = sorted((-gate, layer, head) for layer, row in enumerate(rows) for head, gate in enumerate(row))
    count = len(order) - math.ceil(round((len(order) - 1) * sparsity, 9))
    count = 0 if sparsity >= 1 else len(order) if sparsity <= 0 else count
    kept = {(layer, head) for _, layer, head in order[:count]}
    full = [[(layer, head) in kept for head in range(len(row))] for layer, row in enumerate(rows)]
    return full, f"those of the greatest gates at sparsity {sparsity:g}"
