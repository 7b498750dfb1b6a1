"""Train the reader: a small byte-level Llama that reads Python and remembers what it read.

    python train.py --minutes 90 --out model

A run is cut in stages of growing context (`STAGES`), so that most of its bytes are cheap and its
last ones are as long as what the demo reads.  The learning rate stays flat and is brought to zero
over the last third of the run, or as soon as a file called `stop` appears in the output folder.
Everything is measured in progress, the larger of the share of `--steps` and of `--minutes` gone.
A run that is ended by SIGTERM saves first; `--resume` takes it up again.

With glibc, these three settings keep freed memory in the process and save a third of the time:
`MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from corpus import ANSWER, TEXT, Document, TrainingMix
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

#: (progress at which the stage begins, how many documents of each length, share of drills).
STAGES = (
    (0.0, {512: 16}, 0.15),
    (0.15, {1024: 8}, 0.15),
    (0.3, {1024: 8}, 0.03),
    (0.4, {4096: 1, 512: 8}, 0.03),
)
#: The share of the run, at its end, over which the learning rate falls to zero.
COOLDOWN = 0.35
WARMUP_STEPS = 100
#: How much more an answer weighs in the loss than a byte of text.
ANSWER_WEIGHT = 2.0
#: What a resumed run must know of the one it takes up.
RESUMED = ("step", "read", "seconds", "cooling_since", "recent")
#: Bytes that one thread takes at a time.
PART = 2048


def reader_config() -> LlamaConfig:
    """The model: six thin layers, so that there are many heads to specialise."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


@dataclass
class Run:
    """A training run: the model, its optimizers, and how far it has come."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    steps: int
    minutes: float
    step: int = 0
    read: int = 0
    seconds: float = 0.0
    cooling_since: float | None = None
    recent: dict[str, float] = field(default_factory=dict)

    def progress(self) -> float:
        """How much of the run is over, from 0 to 1."""
        return max(self.step / self.steps, self.seconds / (60 * self.minutes))

    def rate(self) -> float:
        """The learning rate now, as a share of its peak."""
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        if self.cooling_since is None:
            return warm
        span = max(1e-9, min(1 - self.cooling_since, self.cooling_since * COOLDOWN / (1 - COOLDOWN)))
        return max(0.0, 1 - (self.progress() - self.cooling_since) / span)

    def stage(self) -> tuple[dict[int, int], float]:
        """The documents of the next step (how many of each length), and its share of drills."""
        return [stage[1:] for stage in STAGES if self.progress() >= stage[0]][-1]

    def note(self, kinds: torch.Tensor, bits: torch.Tensor) -> None:
        """Remember how well text and answers are predicted (bits per byte, lately)."""
        for name, kind in (("text", TEXT), ("answer", ANSWER)):
            if (kinds == kind).any():
                now = float(bits[kinds == kind].mean())
                self.recent[name] = 0.98 * self.recent.get(name, now) + 0.02 * now


def make_optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def weights(documents: list[Document]) -> torch.Tensor:
    """How much each byte (but a document's first) weighs in the loss."""
    kinds = torch.from_numpy(np.stack([document.kind[1:] for document in documents]))
    return torch.where(kinds == ANSWER, ANSWER_WEIGHT, (kinds == TEXT).float())


def descend(model: LlamaForCausalLM, documents: list[Document]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The gradients of a part of a step, and the bits that each byte cost."""
    read = torch.from_numpy(np.stack([document.data for document in documents]).astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=read, use_cache=False).logits[:, :-1].float()
    costs = F.cross_entropy(logits.mT, read[:, 1:], reduction="none")
    loss = (costs * weights(documents)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return gradients, costs.detach().flatten() / np.log(2)


def draw(run: Run, mix: TrainingMix) -> list[list[Document]]:
    """The documents of a step, in parts that one thread takes at a time."""
    batch, drills = run.stage()
    parts = []
    for length, count in batch.items():
        documents = [mix.document(length, drills) for _ in range(count)]
        size = max(1, PART // length)
        parts += [documents[at : at + size] for at in range(0, count, size)]
    return parts


def train_step(run: Run, mix: TrainingMix, workers: ThreadPoolExecutor, peak: float) -> None:
    """One step of descent, its parts side by side (one thread each beats two threads for all)."""
    started = time.monotonic()
    parts = draw(run, mix)
    done = list(workers.map(lambda part: descend(run.model, part), parts))
    total = sum(weights(part).sum() for part in parts)
    for parameter, *pieces in zip(run.model.parameters(), *(d[0] for d in done), strict=True):
        parameter.grad = torch.stack(pieces).sum(0) / total
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * run.rate()
        optimizer.step()
    kinds = [torch.from_numpy(document.kind[1:]) for part in parts for document in part]
    run.note(torch.cat(kinds), torch.cat([d[1] for d in done]))
    run.step += 1
    run.read += sum(len(document.data) for part in parts for document in part)
    run.seconds += time.monotonic() - started


def save(run: Run, out: Path) -> None:
    """Write the model as Hugging Face reads it, and what `--resume` needs beside it."""
    run.model.save_pretrained(out)
    state = {name: getattr(run, name) for name in RESUMED}
    state["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    torch.save(state, out / "resume.pt.new")
    (out / "resume.pt.new").rename(out / "resume.pt")


def start(arguments: argparse.Namespace) -> Run:
    """A fresh run, or one taken up where it was saved."""
    torch.manual_seed(arguments.seed)
    out = arguments.out
    resumed = arguments.resume and (out / "resume.pt").exists()
    model = LlamaForCausalLM.from_pretrained(out) if resumed else LlamaForCausalLM(reader_config())
    model.train()
    run = Run(model, make_optimizers(model, arguments.rate), arguments.steps, arguments.minutes)
    if resumed:
        state = torch.load(out / "resume.pt")
        for optimizer, saved in zip(run.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state.items():
            setattr(run, name, value)
    return run


def report(run: Run) -> None:
    """Print how far the run has come, as a line of JSON."""
    line = {
        "step": run.step,
        "read": run.read,
        "minutes": round(run.seconds / 60, 2),
        "rate": round(run.rate(), 3),
        "context": max(run.stage()[0]),
    }
    line |= {name: round(value, 3) for name, value in run.recent.items()}
    print(json.dumps(line), flush=True)


def train(arguments: argparse.Namespace) -> None:
    """Train until the cooldown is over."""
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    run = start(arguments)
    mix = TrainingMix(arguments.seed + run.step)
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(os.cpu_count())
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    while run.rate() > 0 and not ended:
        stopped = run.progress() >= 1 - COOLDOWN or (out / "stop").exists()
        if run.cooling_since is None and stopped:
            run.cooling_since = run.progress()
        train_step(run, mix, workers, arguments.rate)
        if run.step % 25 == 0:
            report(run)
        if run.step % 250 == 0:
            save(run, out)
    save(run, out)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("model"))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="take up the run saved in --out")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
