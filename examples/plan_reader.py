"""A plan for the byte-level reader of the demo: heads that have to look far back do, and the rest look nearby.

    python -m examples.plan_reader        # about five minutes on two cores

The planner profiles modules that the reader was trained on, with facts planted in them, and plans for a half, a quarter
and an eighth of what dense prefill executes at the full context of 4096 bytes. Read on modules that neither it nor the
reader ever saw, and compared with the best single window with sinks at as much executed cost: bits per byte, and bits
and right answers of facts that are asked again far behind. At last the heads that the planner names as those of
retrieval are held to a window, and as many others instead.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from examples.demo import load
from examples.reader import evaluate
from examples.reader.corpus import ANSWER, Document, Text, distant_document, training_files
from sparsify.planner import Plan, plan
from sparsify.planner.memory import keep_freed
from sparsify.planner.probe import Probe
from sparsify.planner.readings import Readings
from sparsify.planner.samples import Sample
from sparsify.planner.terminal import summary
from sparsify.progress import Bar
from sparsify.spec import Spec

CONTEXT, BUDGETS = 4096, (0.5, 0.25, 0.125)
GAIN, RECALL = 0.5, 0.95  # of the window's loss at most; of the dense right answers at least, at a quarter
ROUNDS = 2  # of profiling again: facts that are copied with confidence show in no gradient until they are lost
KINDS = ("windows", "strides", "selectors")  # of candidates
LOCAL = {"sinks": 4, "window": 128}  # what a masked head is held to
console = Console(highlight=False)


def text_sample(text: Text, length: int, seed: int) -> Sample:
    """Bytes of code as they are."""
    data = text.slice(np.random.default_rng([1, seed]), length)
    return Sample.of_tokens(torch.from_numpy(data.astype(np.int64)))


def recall_sample(text: Text, length: int, seed: int) -> Sample:
    """Code with facts in its first quarter that are asked for in its last one."""
    document = distant_document(np.random.default_rng([2, seed]), text, length)
    tokens = torch.from_numpy(document.data.astype(np.int64))
    return Sample.of_tokens(tokens, needles=tuple(needles(document)), kind="recall")


def needles(document: Document) -> list[tuple[int, int, int]]:
    """Where each answer was first shown, where it is asked for, and its length."""
    answers = np.flatnonzero(np.diff(np.concatenate([[0], document.kind == ANSWER, [0]]).astype(int)))
    data, found = document.data.tobytes(), []
    for first, last in zip(answers[::2], answers[1::2], strict=True):
        fact = data.find(data[first:last])
        if 0 <= fact < first:
            found.append((fact, int(first), int(last - first)))
    return found


def readings() -> Readings:
    """Training text to profile, at half the context, and to search with at the whole of it; other pieces of it, of a
    length between the two, to choose from the front by."""
    text = Text([file for part in training_files() for file in part][::3])
    half = CONTEXT // 2
    profile = [text_sample(text, half, 1), recall_sample(text, half, 2), recall_sample(text, half, 3)]
    search = [text_sample(text, CONTEXT, 4), recall_sample(text, CONTEXT, 5)]
    length = CONTEXT * 3 // 4
    validation = [text_sample(text, length, 6), text_sample(text, length, 7), recall_sample(text, length, 8)]
    return Readings(tuple(profile), tuple(search), tuple(validation))


def make(budget: float, of: str, state: Path | None) -> Plan:
    """The plan."""
    with Bar() as progress:
        return plan(
            load(), readings(), lengths=CONTEXT, budget=budget, of=of, front=BUDGETS, kinds=KINDS,
            probes=6, rounds=ROUNDS, name="reader", state=state, progress=progress,
        )  # fmt: skip


class Reader:
    """The reader under a probe, which runs any spec without building its kernels."""

    def __init__(self, texts: int, documents: int) -> None:
        self.probe, self.texts, self.documents = Probe(load()), texts, documents
        self.logits(torch.zeros(1, CONTEXT, dtype=torch.long))  # so that its sites are known

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.probe(input_ids=tokens, use_cache=False).logits

    def read(self, spec: Any = None) -> tuple[float, float, float]:
        """Bits per byte, bits per recalled byte and the share of recalled bytes that are right, of held-out modules;
        None for dense attention."""
        sites = self.probe.sites
        patterns = {} if spec is None else dict(zip(sites, Spec.of(spec).resolve(list(sites.values())), strict=True))
        with self.probe.under(patterns):
            text = evaluate.bits_per_byte(self.logits, CONTEXT, self.texts)
            costs, right = [], []
            for tokens, where in evaluate.recall_documents(CONTEXT, self.documents):
                logits = self.logits(tokens)
                costs.append(evaluate.bits(logits, tokens)[where[1:]])
                right.append((logits[0, :-1].argmax(-1) == tokens[0, 1:])[where[1:]].float())
        return text, torch.cat(costs).mean().item(), torch.cat(right).mean().item()


def compare(found: Plan, reader: Reader) -> tuple[Table, bool]:
    """Planned mixtures beside the best window at as much executed cost, and whether they are good enough."""
    table = Table(title=f"reading held-out modules, context {CONTEXT}", title_justify="left")
    for column in ("", f"{found.of}", "bits per byte", "above dense", "bits per recalled byte", "right"):
        table.add_column(column, justify="left" if not column else "right")
    dense = reader.read()
    table.add_row("dense", "100.0%", f"{dense[0]:.4f}", "", f"{dense[1]:.3f}", f"{dense[2]:.1%}")
    mine, held = [point for point in found.front if not point.uniform], True
    for budget, point in zip(sorted(BUDGETS), mine, strict=True):
        windows = [one for one in found.front if one.uniform and one.cost <= point.cost * 1.02]
        window = min(windows, key=lambda one: one.measured)
        rows = [reader.read(found.spec(one)) for one in (point, window)]
        for one, (text, bits, right) in zip((point, window), rows, strict=True):
            numbers = f"{one.cost:.1%}", f"{text:.4f}", f"{text - dense[0]:+.4f}", f"{bits:.3f}", f"{right:.1%}"
            table.add_row(one.name, *numbers)
        held &= rows[0][0] - dense[0] <= GAIN * (rows[1][0] - dense[0])
        held &= budget != 0.25 or rows[0][2] >= RECALL * dense[2] > rows[1][2]
    return table, held


def masked(found: Plan, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """A spec that holds some heads to a window, and leaves the others as they are."""
    sites = []
    for number, site in enumerate(found.sites):
        mine = [head for place, head in heads if place == number]
        groups: dict[Any, str] = dict.fromkeys(mine, "local")
        sites.append({"match": site.address, "heads": groups | {"rest": "dense"} if groups else "dense"})
    return {"version": 1, "patterns": {"local": LOCAL}, "sites": sites}


def retrieval(found: Plan, reader: Reader, count: int = 4) -> tuple[Table, bool]:
    """What masking the named heads does to recall, and masking as many random others."""
    named = list(found.retrieval[:count])
    everyone = [(place, head) for place, site in enumerate(found.sites) for head in range(len(site.heads))]
    others = random.Random(0).sample([one for one in everyone if one not in found.retrieval], len(named))
    table = Table(title="recall of facts when a few heads are held to 4 sinks and 128 bytes", title_justify="left")
    for column in ("", "heads", "right"):
        table.add_column(column, justify="right" if column == "right" else "left")
    right = {}
    for name, heads in {"none": [], "those named": named, "as many others": others}.items():
        right[name] = reader.read(masked(found, heads) if heads else None)[2]
        shown = ", ".join(f"{found.sites[place].layer}.{head}" for place, head in heads)
        table.add_row(name, shown, f"{right[name]:.1%}")
    broken = right["those named"] < 0.5 * right["none"]
    return table, broken and right["as many others"] >= RECALL * right["none"]


def main(
    of: Annotated[str, typer.Option(help="What the budget is a share of.")] = "tiles",
    texts: Annotated[int, typer.Option(help="Pieces of held-out text to read.")] = 6,
    documents: Annotated[int, typer.Option(help="Recall documents to read.")] = 6,
    out: Annotated[Path | None, typer.Option(help="Where the plan goes, as JSON.")] = None,
    state: Annotated[Path | None, typer.Option(help="Where what was found is kept in between.")] = None,
    use: Annotated[Path | None, typer.Option(help="A plan that was made before.")] = None,
) -> None:
    """Plans, reads, compares; fails if the mixtures are not clearly better than one window."""
    keep_freed()
    found = make(min(BUDGETS), of, state) if use is None else Plan.load(use)
    if out is not None:
        found.save(out)
    console.print(summary(found))
    console.print(f"planned in {found.seconds:.0f} s")
    reader = Reader(texts, documents)
    shown, good = compare(found, reader)
    console.print(shown)
    who, named = retrieval(found, reader)
    console.print(who)
    sys.exit(0 if good and named else 1)


if __name__ == "__main__":
    typer.run(main)
