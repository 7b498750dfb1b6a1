"""Runs the passes in order: it knows none of them by name. It checks the graph after each, times it and counts ops."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from sparsify.errors import SparsifyError
from sparsify.passes.nodes import op
from sparsify.passes.site import Site


@dataclass
class Capture:
    """A captured graph on its way through the passes.

    module: the graph; example_inputs: what the compiler was given with it.
    names: the path of each module by its key in `nn_module_stack`, as far as the model is known; home: the path of the
    module whose code the graph is; classes: the class of each module of the model by its path, in the model's order.
    checks, remembered: what verification compares, and the graph that computes it (`RememberMasks`).
    kept: what graphs of the model keep between calls, shared by all of them.
    failure: the pass that raised an exception, and which; the graph is then as it was given.
    frozen: an operator that the graph has lost and must keep in training: nothing of it may be rewritten then.
    sites: in graph order. notes: what a reader of the report should know.
    """

    module: fx.GraphModule
    example_inputs: list[Any]
    names: Mapping[str, str] = field(default_factory=dict)
    home: str = ""
    classes: Mapping[str, type] = field(default_factory=dict)
    frozen: str = ""
    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)
    checks: list[Any] = field(default_factory=list)
    remembered: fx.GraphModule | None = None
    kept: dict[Any, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def open_sites(self) -> list[Site]:
        """The sites that no pass has refused or left to Inductor so far."""
        return [site for site in self.sites if site.open]


class Pass(Protocol):
    """A step over a capture: a frozen dataclass whose fields are its options."""

    def __call__(self, capture: Capture) -> None: ...


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: seconds, and how many calls of each op it added or removed."""

    name: str
    seconds: float
    changes: dict[str, int]


class PassError(Exception):
    """A pass raised what it should not; the message names it, the cause is the exception."""


def run(passes: Iterable[Pass], capture: Capture) -> None:
    """Runs each pass, lints the graph after it and records what it did.

    Raises PassError for an exception that is no SparsifyError; the graph may then be half way.
    """
    with _without_collection():
        _run(passes, capture)
    capture.module.recompile()


def _run(passes: Iterable[Pass], capture: Capture) -> None:
    before = _ops(capture.graph)
    for step in passes:
        start = time.perf_counter()
        try:
            step(capture)
            capture.graph.lint()
        except SparsifyError:
            raise
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise PassError(f"{type(step).__name__} failed ({type(error).__name__}: {first})") from error
        seconds, after = time.perf_counter() - start, _ops(capture.graph)
        changes = {name: after[name] - before[name] for name in sorted(before | after) if after[name] != before[name]}
        capture.records.append(PassRecord(type(step).__name__, seconds, changes))
        before = after


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Graphs are many small objects that all live on: looking for garbage among them took a tenth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _ops(graph: fx.Graph) -> Counter[str]:
    return Counter(op(node) or getattr(node.target, "__name__", str(node.target)) for node in graph.nodes)
