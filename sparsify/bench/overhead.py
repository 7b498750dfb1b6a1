"""`sparsify bench --overhead`: what sparsify takes beside computing: eager calls, the passes' part of compiling, and
what is built again when a sequence grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import fx

from sparsify import backend
from sparsify.bench.cases import PATTERNS
from sparsify.bench.cold import cold_caches, cold_kernels
from sparsify.bench.tables import new_table, short
from sparsify.codegen.cpp import launch
from sparsify.functional import attention
from sparsify.options import Options
from sparsify.patterns import Pattern

HEADS, HEAD_DIM = 8, 64
CALLS = 2000
COLD_CALLS, COLD_BYTES = 30, 2**28  # between two of them more is read than caches hold
LAYERS, TOKENS = 32, 256
LLAMA = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
SPEC = {"version": 1, "patterns": {"near": {"sinks": 4, "window": 64}}, "sites": [{"match": "*", "heads": "near"}]}


@dataclass(frozen=True)
class Call:
    """Microseconds of one eager call on one query and one key of 8 heads, median; sdpa: those of PyTorch's own.

    cold, sdpa_cold: the same where what was read meanwhile left nothing in caches, as in decoding.
    """

    name: str
    us: float
    cold: float
    sdpa: float
    sdpa_cold: float


@dataclass(frozen=True)
class Compiling:
    """Compiling a model of `LAYERS` layers: seconds of the passes, and of Inductor on what they leave it."""

    name: str
    passes: float
    inductor: float

    @property
    def share(self) -> float:
        """The passes' seconds as a part of Inductor's."""
        return self.passes / self.inductor


@dataclass(frozen=True)
class Growth:
    """What is made anew as a sequence grows by one token at a time: graphs compiled and kernels built at each length.

    Dynamo compiles twice by itself, for the first length and then for any.
    """

    name: str
    graphs: tuple[int, ...]
    kernels: tuple[int, ...]

    @property
    def later(self) -> int:
        """How much is made after the second length."""
        return sum(self.graphs[2:]) + sum(self.kernels[2:])


@dataclass(frozen=True)
class Overhead:
    """All of it."""

    calls: tuple[Call, ...]
    compiling: tuple[Compiling, ...]
    growth: tuple[Growth, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure(tell: Callable[[str], None] = lambda _: None) -> Overhead:
    """Measures everything, with empty caches. Takes a minute or two, most of it Inductor's."""
    tell("eager calls")
    calls = eager_calls()
    with cold_caches(), cold_kernels():
        tell(f"compiling {LAYERS} layers")
        compiling = tuple(_compiled(name, spec) for name, spec in (("no spec", None), ("one pattern", SPEC)))
        tell("growing sequences")
        growth = growing()
    return Overhead(calls, compiling, growth)


def eager_calls(calls: int = CALLS) -> tuple[Call, ...]:
    """Calls with one pattern for all heads, with one a head, and with a mask."""
    q, k, v = (torch.randn(1, HEADS, 1, HEAD_DIM) for _ in "qkv")
    alike, unlike = PATTERNS["window512"](HEADS), list(PATTERNS["mixture"](HEADS))
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    given: dict[str, tuple[Pattern | list[Pattern], torch.Tensor | None]] = {
        "one pattern": (alike[0], None),
        "a pattern a head": (unlike, None),
        "a pattern and a mask": (alike[0], mask),
    }
    found = []
    with torch.inference_mode():
        for name, (pattern, asked) in given.items():
            ours = _medians(partial(attention, q, k, v, pattern, mask=asked), calls)
            theirs = _medians(partial(F.scaled_dot_product_attention, q, k, v, attn_mask=asked), calls)
            found.append(Call(name, *ours, *theirs))
    return tuple(found)


def _medians(run: Callable[[], object], calls: int) -> tuple[float, float]:
    """Microseconds of a call after another one, and of one after much else."""
    large = torch.ones(COLD_BYTES // 4)
    _times(run, 100)
    usual, cold = _times(run, calls), _times(run, min(calls, COLD_CALLS), large.sum)
    return statistics.median(usual) * 1e6, statistics.median(cold) * 1e6


def _times(run: Callable[[], object], calls: int, between: Callable[[], object] = lambda: None) -> list[float]:
    samples = []
    for _ in range(calls):
        between()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def llama() -> torch.nn.Module:
    """A Llama of many narrow layers, with random weights."""
    import transformers

    config = transformers.LlamaConfig(**LLAMA, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


def _compiled(name: str, spec: Any) -> Compiling:
    """One compilation through the backend, its two halves timed."""
    taken, options = [0.0, 0.0], Options.read({"spec": spec, "crossover": False})

    def timed(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        capture = backend.captured(gm, inputs, options)
        between = time.perf_counter()
        compiled = backend.compile_rest(capture.module, inputs, "inductor", None)
        taken[0] += between - start
        taken[1] += time.perf_counter() - between
        return compiled

    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(llama(), backend=timed)(torch.zeros(1, TOKENS, dtype=torch.long))
    return Compiling(name, *taken)


def growing(lengths: Sequence[int] = range(TOKENS, TOKENS + 4)) -> tuple[Growth, ...]:
    """Attention called eagerly and inside torch.compile, and a model through the backend, a token longer each time."""
    pattern = PATTERNS["streaming"](HEADS)[0]

    def one(n: int) -> list[torch.Tensor]:
        return [torch.randn(1, HEADS, n, HEAD_DIM) for _ in "qkv"]

    torch._dynamo.reset()
    counts = [0]

    def counted(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts[0] += 1
        return backend.sparsify_backend(gm, inputs, options={"inner": "eager", "spec": SPEC, "crossover": False})

    model = _Layer().eval()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, pattern), backend=counted)
    run = torch.compile(model, backend=counted)
    ways: dict[str, Callable[[int], object]] = {
        "sparsify.attention": lambda n: attention(*one(n), pattern),
        "compiled": lambda n: compiled(*one(n)),
        "a model": lambda n: run(torch.randn(1, n, 2 * HEAD_DIM)),
    }
    found = []
    with torch.inference_mode():
        for name, call in ways.items():
            graphs, kernels = [], []
            for n in lengths:
                before = counts[0], len(launch._BUILT)
                call(n)
                graphs.append(counts[0] - before[0])
                kernels.append(len(launch._BUILT) - before[1])
            found.append(Growth(name, tuple(graphs), tuple(kernels)))
    return tuple(found)


class _Layer(torch.nn.Module):
    """Causal self-attention over (1, N, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(2 * HEAD_DIM, 6 * HEAD_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tables(found: Overhead) -> list[Table]:
    """One for eager calls, one for compiling and one for growing."""
    calls = new_table("an eager call, one query and one key of 8 heads", "us", "cold", "SDPA", "cold")
    for call in found.calls:
        calls.add_row(call.name, *map(short, (call.us, call.cold, call.sdpa, call.sdpa_cold)))
    compiling = new_table(f"compiling a Llama of {LAYERS} layers, in s", "passes", "Inductor", "share")
    for one in found.compiling:
        compiling.add_row(one.name, f"{one.passes:.2f}", f"{one.inductor:.1f}", f"{one.share:.1%}")
    growth = new_table("a sequence that grows by one token", "graphs compiled", "kernels built")
    for grown in found.growth:
        growth.add_row(grown.name, *(", ".join(map(str, made)) for made in (grown.graphs, grown.kernels)))
    return [calls, compiling, growth]
