"""`sparsify.attention` and `sparsify.kept`: the library's function form, for whoever writes their own model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.compiler import is_dynamo_compiling

from sparsify import op
from sparsify.codegen import Launch
from sparsify.codegen.oracle import kept_tokens
from sparsify.errors import InputError
from sparsify.functional_plan import least_tokens, plan
from sparsify.op import DTYPES
from sparsify.patterns import Pattern
from sparsify.patterns.grid import grids as grids_of
from sparsify.program import Program
from sparsify.runtime import ready
from sparsify.selection.compensate import attention_compensated
from sparsify.selection.site import select
from sparsify.sizes import LIMIT

DROPPED = -1e30  # what is added to a score that is not to count, or less

GridFields = tuple[type[Pattern], tuple[object, ...]]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the pairs that a pattern keeps: softmax(scale * q·kᵀ, over kept keys) · v.

    q is (B, Hq, Nq, D), k and v are (B, Hkv, Nk, D), Hq a multiple of Hkv; float32, bfloat16 or float16; any strides.
    v may have a head size of its own, which the output then has. `pattern` is one pattern, or one per query head.
    `mask` is as in `scaled_dot_product_attention` (bool: True keeps; floating: added to the scaled scores;
    broadcastable to (B, Hq, Nq, Nk)) and is combined with the pattern. `scale` defaults to 1/sqrt(D). `q_offset` is
    the absolute position of the first query, by default Nk - Nq.

    A pattern that chooses keys from the data (`topk`, `select`, ...) chooses among those that the pattern's causal part
    and the mask let all queries see: combine it with `causal()`, as what a mask says of single queries is left out
    after the choice. Where it is causal, a query at the position of a key that the mask drops for all is taken for
    padding: it has no part in the choice, and a block of such queries alone keeps no key. Its phase must be that of the
    call (one query is decode); it can't take part in `reuse`, nor be `learned`, as both are between the layers of a
    model.

    Returns (B, Hq, Nq, D) in q's dtype. A query that keeps no key gives 0. With `return_lse` a pair: that, and float32
    (B, Hq, Nq), the natural logarithm of the sum of exp(score) over a query's kept keys, -inf where there are none; by
    it attention over two sets of keys is merged. Runs eagerly, under `torch.compile(fullgraph=True)` and inside the
    sparsify backend; patterns may be built there, too, but for `~` and `expr`, which Dynamo can't follow. Raises
    InputError for what does not fit.
    """
    q_offset = None if not is_dynamo_compiling() and _is_usual(q_offset, q, k) else q_offset
    alone = mask is None and q_offset is None and not return_lse and not is_dynamo_compiling()
    if alone and (out := ready.by_pattern(q, k, v, pattern, scale)) is not NotImplemented:
        return out
    _check(q, k, v, mask, scale, q_offset)
    if q.shape[2] == 0 or k.shape[2] == 0:
        out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_full(q.shape[:-1], -math.inf, dtype=torch.float32)
        return (out, lse) if return_lse else out
    text, loads, dropped, *numbers = planned(q, k, pattern, mask, scale, q_offset, laid_out=True)
    if dropped:
        out, lse = attention_compensated(q, k, v, loads, *numbers, text, dropped)
    elif return_lse:
        out, lse = op.attention_lse(q, k, v, loads, *numbers, text)
    else:
        out, lse = op.called(q, k, v, loads, *numbers, text), None
        if alone and not loads and not _grids(pattern, k.shape[2]):
            op.remember(q, k, v, numbers[1], text, pattern)
    return (out, lse) if return_lse else out


def kept(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
) -> torch.Tensor:
    """The pairs that `attention` keeps with these arguments: bool (B, Hq, Nq, Nk).

    To look at a pattern, one that chooses keys from the data above all, or to test one; it takes memory for every pair.
    What the kernels skip by themselves (`online`) is in it, the one key of a `compensation` isn't. Keys that a floating
    mask holds at -1e30 or less aren't kept; a query all of whose keys are at the dtype's lowest value has none here,
    though `attention` averages over them, as dense attention does. Raises InputError.
    """
    _check(q, k, k, mask, scale, q_offset)
    if q.shape[2] == 0 or k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    text, loads, _, *numbers = planned(q, k, pattern, mask, scale, q_offset, laid_out=False)
    found = kept_tokens(Launch(Program.parse(text), q, k, k, tuple(loads), *numbers))
    return found if mask is None or mask.dtype == torch.bool else found & (mask > DROPPED)


def planned(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern | Sequence[Pattern],
    mask: torch.Tensor | None,
    scale: float | None,
    q_offset: int | None,
    laid_out: bool,
) -> tuple:
    """The program, its loads, what is dropped and joins as one key, the position of the first query, and the scale."""
    rules, found = _rules(pattern, q.shape[1]), _grids(pattern, k.shape[2])
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = mask.view(1) if mask is not None and not mask.dim() else mask
    rows_asked = mask is not None or any("chosen(" in rule for rule in rules)
    loads, where = _loads(mask, q_offset if rows_asked else None, q.device)
    whole = laid_out and q.shape[2] == k.shape[2] and q_offset in (None, 0)
    grids = (found, int(k.shape[2])) if found and whole else ((), 0)
    heads, kv_heads = len(rules), len((None,) * k.shape[1])  # under Dynamo constants, as a program's heads are
    by_head = 1 if whole and q.shape[2] >= least_tokens(rules, kv_heads) else 0  # a branch is a guard to Dynamo
    one_query = 1 if q.shape[2] == 1 else 0
    text, asks, dropped = plan(rules, where, grids, heads, kv_heads, bool(one_query), q.device.type, bool(by_head))
    usable = [mask if mask.dtype == torch.bool else mask > DROPPED] if mask is not None and asks else []
    for ask in asks:
        loads += select(q, k, usable, None, offset, factor, ask)
    return text, loads, dropped, offset, factor


def _is_usual(q_offset: object, q: object, k: object) -> bool:
    """Whether the position of the first query is given as what it is by default. Nothing is checked yet; numbers that
    somebody traces are left as they are, as comparing them would be a guard."""
    if type(q_offset) is not int or type(q) is not torch.Tensor or type(k) is not torch.Tensor:
        return False
    usual = k.shape[2] - q.shape[2] if q.dim() == k.dim() == 4 else None
    return type(usual) is int and q_offset == usual


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    q_offset: int | None,
) -> None:
    _check_tensors(q, k, v)
    _check_mask(mask, q, k)
    _check_numbers(scale, q_offset)
    given = (q, k, v) if mask is None else (q, k, v, mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise InputError("attention: gradients are not supported yet; call it under torch.no_grad()")


def _loads(mask: torch.Tensor | None, q_offset: int | None, device: torch.device) -> tuple[list[torch.Tensor], tuple]:
    """The mask, and behind it the position of the first query where that may not be Nk - Nq; and a `Where`."""
    loads = [] if mask is None else [mask]
    row = "q - N + Nq" if q_offset is None else f"q - _{len(loads)}[0]"
    if q_offset is not None:
        loads.append(torch.full((1,), q_offset, dtype=torch.int64, device=device))
    if mask is None:
        return loads, (len(loads), None, None, row)
    names = ("b", "h", row, "k")[4 - mask.dim() :]
    index = ", ".join([name if size != 1 else "0" for name, size in zip(names, mask.shape, strict=True)])
    return loads, (len(loads), "keep" if mask.dtype == torch.bool else "add", index, row)


def _rules(pattern: Pattern | Sequence[Pattern], heads: int) -> tuple[str, ...]:
    """The rule of each head. Raises InputError when their number doesn't fit."""
    if isinstance(pattern, Pattern):
        return (pattern.rule,) * heads
    if not isinstance(pattern, list | tuple) or not all(isinstance(p, Pattern) for p in pattern):
        hint = " (write causal(), with brackets)" if callable(pattern) else ""
        raise InputError(f"attention: pattern: expected one pattern, or one a head, found {pattern!r}{hint}")
    if len(pattern) != heads:
        found = f"found {len(pattern)} patterns"
        raise InputError(f"attention: pattern: expected one pattern, or one for each of {heads} heads, {found}")
    return tuple([p.rule for p in pattern])


def _grids(pattern: Pattern | Sequence[Pattern], keys: int | torch.SymInt) -> tuple[GridFields, ...]:
    """The grids in all heads' patterns, as plain values. Raises InputError where the keys are not their tokens."""
    found: tuple[GridFields, ...] = ()
    traced = torch.compiler.is_compiling()
    for one in [pattern] if isinstance(pattern, Pattern) else pattern:
        mine = _own_grids(one) if traced else one.__dict__.get("grids")
        if mine is None:
            mine = _own_grids(one)
            one.__dict__["grids"] = mine  # a pattern never changes, and is asked at every call
        wrong = one.fits(int(keys)) if mine else ""
        if wrong:
            raise InputError(f"attention: pattern: {wrong}")
        found += mine
    return found


def _own_grids(pattern: Pattern) -> tuple[GridFields, ...]:
    return tuple([(type(g), tuple([getattr(g, name) for name in g.__match_args__])) for g in grids_of(pattern)])


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"attention: {name}: expected a tensor, found {type(tensor).__name__}")
        _check_layout(name, tensor)
        if tensor.dim() != 4:
            shape = tuple(tensor.shape)
            raise InputError(f"attention: {name}: expected (batch, heads, length, head size), found the shape {shape}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"attention: {name}: expected float32, bfloat16 or float16, found {tensor.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"attention: q, k and v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise InputError(f"attention: q, k and v must be on one device, found {q.device}, {k.device}, {v.device}")
    _check_size("batch", ("q", q.shape[0]), ("k", k.shape[0]))
    _check_size("batch", ("k", k.shape[0]), ("v", v.shape[0]))
    _check_size("heads", ("k", k.shape[1]), ("v", v.shape[1]))
    _check_size("length", ("k", k.shape[2]), ("v", v.shape[2]))
    _check_size("head size", ("q", q.shape[3]), ("k", k.shape[3]))
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise InputError("attention: the head size must be at least 1, found 0")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"attention: the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")


def _check_layout(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        hint = "" if tensor.layout == torch.jagged else f"; give {name}.to_dense()"
        raise InputError(f"attention: {name}: expected a strided tensor, found the layout {tensor.layout}{hint}")


def _check_size(what: str, one: tuple[str, int], other: tuple[str, int]) -> None:
    if one[1] != other[1]:
        raise InputError(
            f"attention: {what}: {one[0]} and {other[0]} must agree, found {one[1]} and {other[1]} "
            "(q is (B, Hq, Nq, D), k and v are (B, Hkv, Nk, D))"
        )


def _check_numbers(scale: float | None, q_offset: int | None) -> None:
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise InputError(f"attention: scale: expected a number, found {scale!r}")
    if isinstance(scale, float) and not math.isfinite(scale):
        raise InputError(f"attention: scale: expected a finite number, found {scale!r}")
    if q_offset is not None and (isinstance(q_offset, bool) or not isinstance(q_offset, int | torch.SymInt)):
        raise InputError(f"attention: q_offset: expected an integer, found {q_offset!r}")
    if isinstance(q_offset, int) and abs(q_offset) > LIMIT:
        raise InputError(f"attention: q_offset: expected at most 2**40 in size, found {q_offset}")


def _check_mask(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"attention: mask: expected a tensor, found {type(mask).__name__}")
    _check_layout("mask", mask)
    if mask.device != q.device:
        raise InputError(f"attention: mask: expected a tensor on {q.device}, found one on {mask.device}")
    if mask.dtype != torch.bool and mask.dtype not in (*DTYPES, torch.float64):
        raise InputError(f"attention: mask: expected bool or floating point, found {mask.dtype}")
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) != 4 or any(found not in (1, size) for found, size in zip(sizes, shape, strict=False)):
        raise InputError(
            f"attention: mask: expected a shape that broadcasts to {tuple(shape)}, found {tuple(mask.shape)}"
        )
