"""The main job: a trained byte-level Llama reads Python's own standard library, dense and sparse, side by side.

    make demo        # or: python -m examples.demo --help

It prints what the backend found and rewrote, bits per byte (dense, the shipped per-head mixture, and one window for
all heads at the same number of kept pairs), prefill seconds beside dense SDPA and FlexAttention in one interleaved
run, the largest error against a float64 oracle, and where it saved the picture of what each head keeps.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM
from transformers.utils import logging

import sparsify
from examples.reader import attend, evaluate
from sparsify import pictures
from sparsify.patterns import Pattern, causal, sinks, window
from sparsify.patterns.count import kept_by_head
from sparsify.patterns.pattern import Both

HERE = Path(__file__).resolve().parent
MODEL = HERE / "reader" / "model"
SPEC = HERE / "reader.yaml"
TITLE = "What each head of the reader keeps"
Forward = Callable[[torch.Tensor], torch.Tensor]
console = Console()


def load(**options: object) -> LlamaForCausalLM:
    """The trained reader, in float32."""
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, **options).eval()


def forward(model: torch.nn.Module) -> Forward:
    """bytes (1, N) -> logits (1, N, 256)."""
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits


def with_spec(spec: object) -> Forward:
    """The reader compiled by sparsify under a spec."""
    return forward(torch.compile(load(), backend="sparsify", dynamic=False, options={"spec": spec, "strict": True}))


def layers_of(report: sparsify.Report) -> list[tuple[Pattern, ...]]:
    """What the spec makes each head of each layer keep, with the model's causal mask."""
    return [tuple(pattern & causal() for pattern in site.patterns) for site in report.sites]


def kept_share(layers: list[tuple[Pattern, ...]], length: int) -> float:
    """Kept pairs, as a share of the causal pairs."""
    kept = [kept_by_head(rule.keep(), head, length, length) for heads in layers for head, rule in enumerate(heads)]
    return statistics.mean(kept) / (length * (length + 1) // 2)


def uniform_window(share: float, length: int) -> Both:
    """One sinks-and-window rule, under the causal mask, that keeps this share of the causal pairs."""
    low, high = 1, length
    while low < high:
        middle = (low + high) // 2
        found = kept_share([((sinks(4) | window(middle)) & causal(),)], length)
        low, high = (middle + 1, high) if found < share else (low, middle)
    return Both(sinks(4) | window(low), causal())


def quality(length: int, texts: int, documents: int, readers: dict[str, tuple[Forward, float]]) -> Table:
    """Bits per byte of each reader, on the same texts."""
    table = Table(title=f"reading held-out modules of the standard library, context {length}", title_justify="left")
    for column in ("", "kept pairs", "bits per byte", "bits per recalled byte"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (read, share) in readers.items():
        with console.status(f"{name} reads"):
            text = evaluate.bits_per_byte(read, length, texts)
            recall = evaluate.bits_per_answer(read, length, documents)
        table.add_row(name, f"{share:.1%}", f"{text:.4f}", f"{recall:.4f}")
    return table


def prefill(length: int, layers: list[tuple[Pattern, ...]], sparse: Forward, rounds: int) -> Table:
    """Seconds of a whole forward pass: medians of interleaved rounds in this process."""
    tokens = next(evaluate.held_out_windows(length, 1))
    flex_model = attend.use(load(), "reader_flex", attend.flex(layers, length))
    readers = {
        "sparsify": sparse,
        "dense SDPA (inductor)": forward(torch.compile(load(), dynamic=False)),
        "FlexAttention, same masks (inductor)": forward(torch.compile(flex_model, dynamic=False)),
    }
    times: dict[str, list[float]] = {name: [] for name in readers}
    with console.status("compiling and timing prefill") as status:
        for name, read in readers.items():
            status.update(f"compiling: {name}")
            read(tokens)
        status.update(f"timing {rounds} interleaved rounds")
        for _ in range(rounds):
            for name, read in readers.items():
                start = time.perf_counter()
                read(tokens)
                times[name].append(time.perf_counter() - start)
    table = Table(title=f"prefill of {length} bytes, medians of {rounds} interleaved rounds", title_justify="left")
    for column in ("", "seconds", "sparsify is"):
        table.add_column(column, justify="left" if not column else "right")
    ours = statistics.median(times["sparsify"])
    for name, samples in times.items():
        found = statistics.median(samples)
        table.add_row(name, f"{found:.3f}", "" if name == "sparsify" else f"{found / ours:.2f}x as fast")
    return table


def largest_errors(length: int, layers: list[tuple[Pattern, ...]], sparse: Forward) -> tuple[float, float]:
    """The largest error of any logit against the float64 oracle: (sparsify's, PyTorch SDPA's under the same masks)."""
    tokens = next(evaluate.held_out_windows(length, 1))
    plain = attend.use(load(), "reader_masked", attend.masked(layers, length))
    truth = forward(copy.deepcopy(plain).double())(tokens)
    ours, theirs = ((read(tokens).double() - truth).abs().max().item() for read in (sparse, forward(plain)))
    return ours, theirs


def main(
    length: Annotated[int, typer.Option(help="Context length in bytes.")] = 4096,
    prefill_length: Annotated[int, typer.Option(help="Bytes of the timed prefill.")] = 8192,
    texts: Annotated[int, typer.Option(help="Pieces of held-out text to read.")] = 6,
    documents: Annotated[int, typer.Option(help="Recall documents to read.")] = 6,
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 5,
    spec: Annotated[Path, typer.Option(help="The spec to read under.")] = SPEC,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out"),
) -> None:
    """Reads real text with a trained model, dense and sparse, and says how well, how fast and how exactly."""
    logging.disable_progress_bar()
    tokens = next(evaluate.held_out_windows(length, 1))
    with torch.inference_mode():
        report = sparsify.explain(load(), input_ids=tokens, use_cache=False, spec=spec)
        console.print(report)
        layers = layers_of(report)
        share, sparse = kept_share(layers, length), with_spec(spec)
        uniform = uniform_window(share, length)
        one_window = {"version": 1, "patterns": {"one": uniform}, "sites": [{"match": "*", "heads": "one"}]}
        readers = {
            "dense": (forward(load()), 1.0),
            f"mixture ({spec.name})": (sparse, share),
            f"one rule: {uniform}".replace(" & causal()", ""): (
                with_spec(one_window),
                kept_share([(uniform,)], length),
            ),
        }
        console.print(quality(length, texts, documents, readers))
        console.print(prefill(prefill_length, layers, sparse, rounds))
        ours, theirs = largest_errors(1024, layers, sparse)
        console.print(f"largest error of a logit against the float64 oracle: {ours:.1e}")
        console.print(f"                         PyTorch SDPA, under the same masks: {theirs:.1e}")
    sites = {site.address: site.patterns for site in report.sites}
    for name in ("reader.html", "reader.png"):
        path = pictures.draw(sites, length, out / name, names=sparsify.load_spec(spec).patterns, title=TITLE)
        console.print(f"what each head keeps: {path}")


if __name__ == "__main__":
    typer.run(main)
