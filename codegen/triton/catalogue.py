"""The kernels that are built ahead of time for every chip: what spills or fails to build shows without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsify import patterns as p
from sparsify.bias import Bias, Term
from sparsify.expr import Load, Pred, Var
from sparsify.program import Layout, Program, Skip
from sparsify.text import parse_expr, parse_pred

if TYPE_CHECKING:
    from sparsify.codegen.target import Launch

ARCHS: tuple[int | str, ...] = (80, 90, 100, "gfx942")
BATCH, HEADS, KV_HEADS, LENGTH = 2, 32, 8, 4096
_CAUSAL = p.causal()
_GROUP = f"h//{HEADS // KV_HEADS}"
_TOKEN = f"_2[b, {_GROUP}, k]"


def _mixture() -> tuple[Pred, ...]:
    kinds = (
        _CAUSAL,
        p.window(512),
        (p.sinks(4) | p.window(1024)) & _CAUSAL,
        (p.window(128) | p.column_stride(8, block=64, offset="head")) & _CAUSAL,
    )
    return tuple(kinds[head % len(kinds)].keep() for head in range(HEADS))


PATTERNS: dict[str, p.Pattern] = {
    "dense": p.dense(),
    "causal": _CAUSAL,
    "window": p.window(512),
    "streaming": (p.sinks(4) | p.window(1024)) & _CAUSAL,
    "elastic": (p.sinks(64) | p.window("N/8 + 512")) & _CAUSAL,
    "dilated": p.dilated(8) & _CAUSAL,
    "same_block": p.same_block(1024, shift=512),
    "block_window": p.block_window(64, 16) & _CAUSAL,
    "column_stride": (p.block_window(64, 4) | p.column_stride(8, block=64, offset="head")) & _CAUSAL,
    "global_tokens": (p.global_tokens([0, 1, 511, 2048]) | p.window(256, ahead=255)),
    "expr": p.expr("k <= q and (q - k) % 7 < 2"),
}
# What the loads of a program are: the dtype ("": that of the queries) and the axes; "d" is distances of q and k.
LOADS: dict[str, tuple[tuple[str, str], ...]] = {
    "padding": (("bool", "bk"),),
    "documents": (("int64", "bk"),),
    "bool_tensor": (("bool", "b1qk"),),
    "float_tensor": (("", "b1qk"),),
    "alibi": (("float32", "h"),),
    "relative": (("", "hd"),),
    "sink": (("", "h"),),
    "blocks64": (("int32", "bHrc"), ("int32", "bHr")),
    "blocks128": (("int32", "bhrc"), ("int32", "bhr")),
    "lines": (("int32", "bhrc"), ("int32", "bhr")) * 2,
    "pages": (("int32", "bH1c"), ("int32", "bH1")),
    "tokens": (("int32", "bH1c"), ("int32", "bH1")),
    "sorted": (("int32", "bhrc"), ("int32", "bhr"), ("int64", "bHk")),
}
LISTED = ("blocks64", "blocks128", "lines", "pages", "tokens", "sorted", "neighborhood", "skip")
DECODED = ("pages", "tokens")


@dataclass(frozen=True)
class Entry:
    """A kernel: a program in a dtype at a head size, for `q_len` queries; with `lse` it writes that, too."""

    name: str
    program: Program
    dtype: str
    head_dim: int
    q_len: int = LENGTH
    lse: bool = False

    def launch(self) -> Launch:
        """A call of it on tensors without memory, laid out as a model lays them out."""
        import torch

        from sparsify.codegen.target import Launch, empty_lse

        dtype, group = getattr(torch, self.dtype), HEADS // KV_HEADS
        meta: dict[str, Any] = {"device": "meta"}
        q = torch.empty(BATCH, self.q_len, HEADS, self.head_dim, dtype=dtype, **meta).transpose(1, 2)
        k, v = (
            torch.empty(BATCH, LENGTH, HEADS // group, self.head_dim, dtype=dtype, **meta).transpose(1, 2) for _ in "kv"
        )
        sizes = {"b": BATCH, "h": HEADS, "H": KV_HEADS, "q": self.q_len, "k": LENGTH, "1": 1, "r": 64, "c": 64}
        sizes["d"] = self.q_len + LENGTH - 1
        loads = tuple(
            torch.empty([sizes[axis] for axis in axes], dtype=getattr(torch, kind or self.dtype), **meta)
            for kind, axes in LOADS.get(self.name, ())
        )
        lse = empty_lse(q) if self.lse else None
        return Launch(self.program, q, k, v, loads, LENGTH - self.q_len, self.head_dim**-0.5, lse)


def _program(keeps: Pred | tuple[Pred, ...], **fields: Any) -> Program:
    return Program.of(keeps if isinstance(keeps, tuple) else (keeps,) * HEADS, target="triton", **fields)


def _bias(load: str, integer: str = "1") -> Bias:
    read = parse_expr(load)
    assert isinstance(read, Load)
    return (Term(loads=(read,), integer=parse_expr(integer)),)


def programs() -> dict[str, Program]:
    """Every kind of program by name: all static patterns, a mixture, and each way to change or mask the scores."""
    causal = _CAUSAL.keep()
    return {name: _program(pattern.keep()) for name, pattern in PATTERNS.items()} | {
        "mixture": _program(_mixture()),
        "padding": _program(parse_pred("k <= q and _0[b, k]"), loads=1),
        "documents": _program(parse_pred("k <= q and _0[b, q] == _0[b, k]"), loads=1),
        "bool_tensor": _program(parse_pred("k <= q and _0[b, 0, q, k]"), loads=1),
        "float_tensor": _program(causal, loads=1, bias=_bias("_0[b, 0, q, k]")),
        "alibi": _program(causal, loads=1, bias=_bias("_0[h]", "k - q")),
        "relative": _program(p.dense().keep(), loads=1, bias=_bias("_0[h, k - q + Nq - 1]")),
        "sink": _program(p.window(128).keep(), loads=1, sink=_bias("_0[h]")),
        "softcap": _program(causal, softcap=50.0),
        "skip": _program(causal, skips=(Skip(1e-3),) * HEADS),
        "neighborhood": _neighborhood(),
        **{name: _program(parse_pred(rule), loads=4) for name, rule in _listed().items()},
        "sorted": _program(parse_pred(_sorted()), loads=3, keys=Layout(Var("N"), parse_expr(_TOKEN))),
    }


def _list(head: str, row: int, unit: int, first: int = 0) -> str:
    """The text of a list, in loads `_first` and the next."""
    place = f"b, {head}, {f'(q - N + Nq)//{row}' if row else '0'}"
    return f"listed(_{first}[{place}, 0], _{first + 1}[{place}], k//{unit})"


def _listed() -> dict[str, str]:
    """Lists of blocks at prefill, of pages and of tokens at decode, and blocks with columns (vertical-slash)."""
    return {
        "blocks64": f"{_list(_GROUP, 64, 64)} and k <= q",
        "blocks128": f"({_list('h', 128, 128)} or k < 64 or q - k < 512) and k <= q",
        "lines": f"({_list('h', 64, 64)} or {_list('h', 64, 1, 2)}) and k <= q",
        "pages": f"({_list(_GROUP, 0, 16)} or k < 4 or q - k < 64) and k <= q",
        "tokens": f"{_list(_GROUP, 0, 1)} and k <= q",
    }


def _sorted() -> str:
    """Blocks of keys that are sorted inside segments of 64, and the own segment by the tokens (PBS-Attn)."""
    return f"({_list('h', 64, 64)} and k//64 < q//64) or (k//64 == q//64 and {_TOKEN} <= q)"


def _neighborhood(side: int = 64, window: int = 13) -> Program:
    """What lies near in a square of tokens, laid out in boxes of 8 x 8."""
    y, x = f"{{0}}//{8 * side}*8 + {{0}} % 64//8", f"{{0}}//64 % {side // 8}*8 + {{0}} % 8"
    near = " and ".join(f"abs({c.format('q')} - ({c.format('k')})) <= {window // 2}" for c in (y, x))
    queries, keys = (Layout(Var("N"), parse_expr(f"({y.format(p)})*{side} + {x.format(p)}")) for p in "qk")
    return _program(parse_pred(near), queries=queries, keys=keys)


def entries() -> Iterator[Entry]:
    """The catalogue: every program in bf16 at head sizes 64 and 128; some in fp16 and fp32, wide, odd or decoding.

    Those with lists, layouts and skips are there in every dtype.
    """
    found = programs()
    for name, program in found.items():
        if name in LISTED:
            continue
        for head_dim in (64, 128):
            yield Entry(name, program, "bfloat16", head_dim)
    for name in ("causal", "streaming", "mixture", "softcap", *(name for name in LOADS if name not in LISTED)):
        for head_dim in (64, 128):
            yield Entry(name, found[name], "float16", head_dim)
            yield Entry(name, found[name], "float32", head_dim)
    for name, head_dim in itertools.product(LISTED, (64, 128)):
        for dtype in ("bfloat16", "float16", "float32"):
            yield Entry(name, found[name], dtype, head_dim, q_len=1 if name in DECODED else LENGTH)
    for dtype in ("bfloat16", "float32"):
        yield Entry("streaming", found["streaming"], dtype, 256)
        yield Entry("streaming", found["streaming"], dtype, 80)
        yield Entry("decode", found["streaming"], dtype, 128, q_len=1)
        yield Entry("decode_lse", found["streaming"], dtype, 128, q_len=1, lse=True)
        yield Entry("softcap_lse", found["softcap"], dtype, 128, lse=True)
