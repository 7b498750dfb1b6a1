"""The cases that the Triton target's numerics are tested on: shared by the interpreter's tests and the GPU's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from strategies import BIASES, SINKS
from triton_list_cases import MADE, Made

from sparsify import bias as biases
from sparsify import patterns as p
from sparsify.codegen.oracle import environment, kept, oracle_lse
from sparsify.codegen.slots import gathered, scattered, tokens
from sparsify.codegen.target import Launch, empty_lse
from sparsify.codegen.triton import TritonTarget
from sparsify.program import Program
from sparsify.text import parse_pred

FLOATS = {"float32": torch.float32, "half": torch.bfloat16}
MINIMA = (("float32", (2,)), ("float32", (2, 139)), ("float32", (1, 70)), ("minima", (1, 2, 70, 70)))
C = p.causal()
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One launch: a pattern (one, or one a head; text is a raw predicate with loads) on drawn tensors."""

    name: str
    pattern: Any
    heads: tuple[int, int] = (2, 1)
    lengths: tuple[int, int] = (70, 70)
    sizes: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    batch: int = 1
    q_offset: int | None = None
    loads: tuple[tuple[str, tuple[int, ...]], ...] = ()
    softcap: float | None = None
    bias: str = ""  # a name in BIASES
    sink: str = "none"  # a name in SINKS
    scale: float | None = None
    layout: str = "model"  # (B, N, H, D) seen as (B, H, N, D); or "plain", "strided", "transposed"
    seed: int = 0
    unread: tuple[int, int] | None = None  # keys in tiles that must be skipped

    def launch(self, device: str = "cpu") -> Launch:
        g = torch.Generator().manual_seed(self.seed)
        (hq, hkv), (nq, nk), (d, dv) = self.heads, self.lengths, self.sizes
        dtype = getattr(torch, self.dtype)
        q, k, v = (
            _tensor(g, (self.batch, h, n, size), dtype, self.layout, device)
            for h, n, size in ((hq, nq, d), (hkv, nk, d), (hkv, nk, dv))
        )
        loads = tuple(_load(g, kind, shape).to(device) for kind, shape in self._loads())
        rules = self.pattern if isinstance(self.pattern, tuple) else (self.pattern,) * hq
        keeps = [parse_pred(rule) if isinstance(rule, str) else rule.keep() for rule in rules]
        fields = {"softcap": self.softcap, "bias": BIASES.get(self.bias, ()), "sink": SINKS[self.sink]}
        program = Program.of(keeps, loads=len(loads), target="triton", **fields)
        offset = nk - nq if self.q_offset is None else self.q_offset
        return Launch(program, q, k, v, loads, offset, d**-0.5 if self.scale is None else self.scale)

    def poison(self, launch: Launch) -> None:
        """NaN where nothing must be read."""
        if self.unread is not None:
            launch.v[:, :, slice(*self.unread)] = torch.nan

    def _loads(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Its own, or those that the drawn biases and sinks name."""
        if self.loads or (not self.bias and self.sink == "none"):
            return self.loads
        heads, (nq, nk) = self.heads[0], self.lengths
        kind = "float32" if self.dtype == "float32" else "half"
        shapes = (heads,), (heads, nq + nk - 1), (self.batch, nk), (self.batch, heads, nq, nk)
        return tuple((kind, shape) for shape in shapes)


def _tensor(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> torch.Tensor:
    """Drawn values in a given layout; what lies between the elements of a strided one is NaN."""
    b, h, n, d = shape
    values = torch.randn(shape, generator=g).to(dtype).to(device)
    if layout == "model":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        wide = torch.full((b, h, 2 * n, d + 3), torch.nan, dtype=dtype, device=device)
        view = wide[:, :, ::2, 1 : d + 1]
        view.copy_(values)
        return view
    return values


def _load(g: torch.Generator, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    if kind == "bool":
        return torch.rand(shape, generator=g) > 0.3
    if kind == "first half":
        return (torch.arange(shape[-1]) < shape[-1] // 2).expand(shape)
    if kind == "quarters":
        return (torch.arange(shape[-1]) * 4 // shape[-1]).expand(shape).contiguous()
    if kind == "minima":  # rows of nothing else, too
        values = torch.randn(shape, generator=g)
        lowest = torch.finfo(torch.float32).min
        return values.masked_fill(values > 0.5, lowest).index_fill(-2, torch.arange(0, shape[-2], 5), lowest)
    if kind in FLOATS:
        values = torch.randn(shape, generator=g)
        return values.masked_fill(values < -1.5, -torch.inf if len(shape) > 2 else -2.0).to(FLOATS[kind])
    values = torch.randint(0, 4, shape, generator=g).sort(dim=-1).values
    return values.to(getattr(torch, kind)) + (shape[-1] // 2 if len(shape) == 1 else 0)


def errors(case: Case | Made, device: str = "cpu") -> tuple[float, float, float]:
    """The largest error against the float64 oracle: the kernel's, PyTorch's own in the same dtype, and that of the lse,
    a part of its size where that is above 1."""
    launch = case.launch(device)
    (expected, lse), theirs = oracle_lse(launch), _torch(launch)
    case.poison(launch)
    launch = replace(launch, lse=empty_lse(launch.q).fill_(torch.nan))
    found = TritonTarget().run(launch)
    assert found.shape == expected.shape and found.dtype == launch.q.dtype
    assert found.stride() == launch.empty_output().stride()
    return _gap(found, expected), _gap(theirs, expected), _lse_gap(launch.lse.double(), lse)


def _lse_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    return _gap(
        (found / expected.abs().clamp(min=1)).nan_to_num(), (expected / expected.abs().clamp(min=1)).nan_to_num()
    )


def _gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.isfinite().all()
    return (found.double() - expected).abs().max().item() if found.numel() else 0.0


def _torch(launch: Launch) -> torch.Tensor:
    """PyTorch's attention of the same inputs in their dtype; rows that keep nothing are 0."""
    group, program, keep = launch.q.shape[1] // launch.k.shape[1], launch.program, kept(launch)
    q, k, v = launch.q, *(t.repeat_interleave(group, dim=1) for t in (launch.k, launch.v))
    if program.keys is not None:
        held = tokens(program.keys, "k", k.shape[2], environment(launch))
        k, v = gathered(k, *held), gathered(v, *held)
    if program.queries is not None:
        placed = tokens(program.queries, "q", q.shape[2], environment(launch))
        return scattered(_rows(launch, gathered(q, *placed), k, v, keep), *placed, q.shape[2])
    return _rows(launch, q, k, v, keep)


def _rows(launch: Launch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(keep.shape, dtype=launch.q.dtype, device=keep.device).masked_fill(~keep, -torch.inf)
    env = environment(launch)
    bias = bias + biases.evaluate(launch.program.bias, env).to(bias.dtype)
    cap, sink = launch.program.softcap, launch.program.sink
    scores = q @ k.transpose(-1, -2) * launch.scale
    scores = (scores if cap is None else cap * torch.tanh(scores / cap)) + bias  # as model code spells it
    if sink is not None:
        logit = biases.evaluate(sink, env).to(scores).expand(*scores.shape[:3], 1)
        out = torch.softmax(torch.cat([scores, logit], -1), dim=-1)[..., :-1] @ v
    elif cap is None:
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))  # CUDA's kernels take no odd strides
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=launch.scale)
    else:
        out = torch.softmax(scores, dim=-1) @ v
    return out.nan_to_num(nan=0.0).masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0.0)


def _static() -> list[Case]:
    """Every static pattern, alone and composed, at odd sizes."""
    rules = {
        "dense": p.dense(),
        "causal": C,
        "window": p.window(20),
        "window_ahead": p.window(9, ahead=12),
        "streaming": (p.sinks(4) | p.window(20)) & C,
        "elastic": (p.sinks(3) | p.window("N/8 + 9")) & C,
        "dilated": p.dilated(3) & C,
        "dilated_elastic": p.dilated("N/4"),
        "same_block": p.same_block(24, shift=5),
        "block_window": p.block_window(16, 2) & C,
        "column_stride": (p.column_stride(3, block=32, offset="head") | p.window(5)) & C,
        "column_holes": p.column_stride(2, block=64, offset=1),
        "global_tokens": p.global_tokens([0, 7, 33]) | p.window(9, ahead=3),
        "many_globals": p.global_tokens(range(1, 70, 7)) & C,
        "neighborhood": p.neighborhood([7, 9], [3, 4], [2, 1], start=3) | p.global_tokens("0-2"),
        "expr": p.expr("k <= q and (q - k) % 7 < 2 or q * k % 5 == 1"),
        "expr_negative": p.expr("(k - q) // 5 % 3 == 1 or k < (3 if q > 20 else q // 2)"),
        "nothing": p.window(5) & ~p.window(5),
        "except": C & ~p.window(10),
        "far": p.window(2**40) & C,
    }
    return [Case(name, rule, lengths=(70, 131), seed=i) for i, (name, rule) in enumerate(rules.items())]


def _mixed() -> list[Case]:
    """Heads that differ, shapes, layouts, loads, masks, caps and scales."""
    mixture = (C, p.window(9), (p.sinks(4) | p.window("N/8 + 3")) & C, p.dense(), p.same_block(16), C)
    documents = "k <= q and _0[b, k] == _0[b, q] and k < _1[b]"
    return [
        Case("mixture", mixture, heads=(6, 2), batch=2),
        Case("gqa", (p.sinks(4) | p.window(20)) & C, heads=(6, 2), batch=2, layout="strided"),
        Case("odd_heads", C, sizes=(33, 7), layout="strided"),
        Case("one_wide", C, sizes=(1, 1), lengths=(37, 37)),
        Case("wide_heads", p.window(30), sizes=(200, 65), lengths=(33, 50)),
        Case("decode1", (p.sinks(4) | p.window(20)) & C, lengths=(1, 131), heads=(4, 2)),
        Case("decode5", mixture, lengths=(5, 100), heads=(6, 2), layout="transposed"),
        Case("one_key", C, lengths=(1, 1)),
        Case("more_queries", C, lengths=(90, 40)),
        Case("before", p.window(9), q_offset=-20),
        Case("after", p.window(30), q_offset=50),
        Case("no_keys", C, lengths=(5, 0)),
        Case("padding", "k <= q and _0[b, k]", batch=2, loads=(("bool", (2, 70)),)),
        Case("left_padding", "k <= q and k >= _0[b]", batch=2, loads=(("int64", (2,)),)),
        Case("documents", documents, batch=2, loads=(("int64", (2, 70)), ("int32", (2,)))),
        Case("from_end", "q >= 0 and _0[b, q - k]", lengths=(40, 40), loads=(("bool", (1, 40)),)),
        Case("not_loaded", "k <= q and not _0[h, q // 2, k]", loads=(("bool", (2, 35, 70)),)),
        Case("bool_tensor", "k <= q and _0[b, 0, q, k]", batch=2, loads=(("bool", (2, 1, 70, 70)),)),
        Case("softcap", C, softcap=5.0),
        Case("softcap_tensor", p.window(20), softcap=0.5, bias="tensor", q_offset=0),
        *(Case(f"bias_{name}", p.window(40), heads=(4, 2), batch=2, bias=name, q_offset=0) for name in BIASES),
        *(Case(f"sink_{name}", p.window(9), heads=(2, 1), sink=name, q_offset=0) for name in SINKS if name != "none"),
        Case("minima", C, bias="tensor", loads=MINIMA, q_offset=0),
        Case("bias_softcap", mixture, heads=(6, 2), bias="alibi", softcap=5.0, q_offset=0),
        Case("bias_flipped", (p.sinks(4) | p.window(20)) & C, bias="sum", sink="by head", scale=-0.3, q_offset=0),
        Case("bias_decode", C, lengths=(3, 70), heads=(4, 2), bias="alibi both ways", sink="by head"),
        Case("bias_data", "k <= q and _1[b, k]", bias="alibi", loads=(("float32", (2,)), ("bool", (1, 70)))),
        Case("scale", C, scale=0.7),
        Case("scale_negative", C, scale=-0.3),
        Case("scale_zero", (p.sinks(4) | p.window(20)) & C, scale=0.0),
    ]


def _split() -> list[Case]:
    """Few queries over many keys, which splits share; groups whose heads share a tile, and some that can't."""
    mixture = (
        C,
        p.window(9),
        (p.sinks(4) | p.window("N/8 + 3")) & C,
        p.dense(),
        p.same_block(16),
        p.window(5) & ~p.window(5),
    )
    holes = "k <= q and (_0[b, k] or k < 3)"
    return [
        Case("split", C, lengths=(1, 701), heads=(4, 1)),
        Case("split_window", (p.sinks(4) | p.window(300)) & C, lengths=(3, 701), heads=(6, 2), layout="strided"),
        Case("split_mixture", mixture, lengths=(5, 700), heads=(6, 2), batch=2),
        Case("split_holes", holes, lengths=(2, 701), heads=(6, 3), batch=2, loads=(("bool", (2, 701)),)),
        Case("split_stride", p.column_stride(3, block=32, offset="head") & C, lengths=(2, 203), heads=(2, 1)),
        Case("split_far_stride", p.column_stride(3, block=32, offset="head") & C, lengths=(2, 4700), heads=(2, 1)),
        Case("far_stride", (p.window(9) | p.column_stride(5, block=16)) & C, lengths=(40, 2500), heads=(2, 1)),
        Case("split_bias", C, lengths=(3, 700), heads=(4, 2), bias="sum", sink="by head", q_offset=0),
        Case(
            "split_minima",
            p.dense(),
            lengths=(1, 700),
            bias="tensor",
            q_offset=0,
            loads=(*MINIMA[:3], ("minima", (1, 2, 1, 700))),
        ),
        Case("split_softcap", C, lengths=(2, 700), heads=(8, 2), softcap=5.0, sizes=(24, 40)),
        Case("split_nothing", p.window(5) & ~p.window(5), lengths=(2, 700), heads=(4, 2)),
    ]


def _data() -> list[Case]:
    """Tiles that data makes empty or full, and indices whose runs are hard to bound."""
    padding = (("bool", (2, 130)),)
    documents = (("int64", (2, 130)), ("int32", (2, 40)))
    return [
        Case(
            "skip_padding",
            "k <= q and _0[b, k]",
            lengths=(33, 256),
            loads=(("first half", (1, 256)),),
            unread=(128, 256),
        ),
        Case(
            "skip_documents",
            "k <= q and _0[b, q] == _0[b, k]",
            lengths=(64, 256),
            loads=(("quarters", (1, 256)),),
            unread=(0, 192),
        ),
        Case("skip_rows", "k <= q and _0[0, 1, q] == _0[-1, 1, k]", lengths=(9, 130), loads=(("int32", (2, 2, 130)),)),
        Case("inner_axis", "k <= q and _0[k, h]", lengths=(40, 130), loads=(("bool", (130, 2)),)),
        Case("run_of_thirds", "_0[b, k // 3] != 1", batch=2, lengths=(40, 130), loads=documents),
        Case("run_from_end", "k <= q and _0[b, max(k - 2, 0 - N)]", batch=2, lengths=(40, 130), loads=padding),
        Case(
            "run_shifted", "_0[b, min(k + 3, N - 1)] > 1 or _0[b, q] == 2", batch=2, lengths=(40, 130), loads=documents
        ),
        Case("run_of_runs", "_0[b, _1[b, q - 90]] == _0[b, k]", batch=2, lengths=(40, 130), loads=documents),
        Case("row_limits", "k <= q and k < 9*_1[b, q - 90] + 40", batch=2, lengths=(40, 130), loads=documents),
        Case("full_by_data", "_0[b, k] or k == q", batch=2, lengths=(40, 130), loads=padding),
    ]


def _halves() -> list[Case]:
    """Both 16-bit dtypes over the kinds that differ in them."""
    found = {case.name: case for case in _static() + _mixed() + _split()}
    names = ("dense", "streaming", "same_block", "column_stride", "mixture", "gqa", "odd_heads", "decode1", "documents")
    names += (
        "bool_tensor",
        "bias_tensor",
        "softcap",
        "before",
        "bias_alibi",
        "bias_sum",
        "sink_by head",
        "split_window",
        "split_holes",
        "split_bias",
    )
    return [replace(found[name], dtype=dtype) for dtype in DTYPES[1:] for name in names]


CASES: list[Case | Made] = [*_static(), *_mixed(), *_split(), *_data(), *_halves(), *MADE]
# A kernel may be twice as far from the oracle as PyTorch is, plus what one rounding of an output near 1 costs.
FLOOR = {"float32": 1e-6, "bfloat16": 2.0**-9, "float16": 2.0**-12}
LSE_ERROR = 1e-5  # sums are made in float32 whatever the dtype, and compared where 1 or less with 1
