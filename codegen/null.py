"""The null target: prints a program as a loop nest, and interprets that nest tile by tile in plain torch.

It is the reference for the generated targets: the same tile rules, the same online softmax, in float64, with no
regard for speed. The first thing to read for somebody who wants to know what the kernels do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify import bias
from sparsify.codegen.target import Launch
from sparsify.expr import TRUE, constant
from sparsify.patterns.tiles import Band, TileRule, analyse
from sparsify.ranges import text_of
from sparsify.text import to_text
from sparsify.walk import evaluate

if TYPE_CHECKING:
    import torch

    from sparsify.errors import Refusal
    from sparsify.program import Program

BLOCK_M, BLOCK_N = 32, 32


class NullTarget:
    """Prints and interprets; needs nothing but torch."""

    name = "null"

    def unavailable(self) -> Refusal | None:
        return None

    def refuse(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> Refusal | None:
        return None

    def source(self, program: Program, dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
        """The loop nest as text."""
        lines = [f"attention of {str(dtype).removeprefix('torch.')}, head size {head_dim}, value size {value_dim}"]
        for number, keep in enumerate(program.keep):
            heads = text_of(program.heads_of(number))
            lines += [f"heads {heads}:", *("  " + line for line in _nest(analyse(keep)))]
        if program.softcap is not None:
            lines.append(f"softcap: {program.softcap}")
        for name, terms in (("bias", program.bias), ("sink", program.sink or ())):
            lines += [f"{name}: {_term(term)}" for term in terms]
        return "\n".join(lines) + "\n"

    def run(self, launch: Launch) -> torch.Tensor:
        out = launch.empty_output()
        batch, heads, q_len, _ = launch.q.shape
        for b in range(batch):
            for h in range(heads):
                for start in range(0, q_len, BLOCK_M):
                    stop = min(start + BLOCK_M, q_len)
                    out[b, h, start:stop] = _query_tile(launch, b, h, start, stop).to(out.dtype)
        return out


def _nest(rule: TileRule) -> list[str]:
    lines = ["for each query tile q0..q1:"]
    lines += ["  for each key tile k0..k1 that meets one of"]
    lines += [f"      {_interval(band)}" for band in rule.bands]
    lines += [f"    skip if  {to_text(rule.empty)}", f"    no mask if  {to_text(rule.full)}"]
    return [*lines, f"    else keep  {to_text(rule.keep)}"]


def _term(term: bias.Term) -> str:
    factors = [str(term.factor)] * (term.factor != 1) + [to_text(load) for load in term.loads]
    factors += [f"({to_text(term.integer)})"] * (constant(term.integer) != 1)
    where = "" if term.where == TRUE else f" where {to_text(term.where)}"
    return " * ".join(factors or ["1"]) + where


def _interval(band: Band) -> str:
    low = "0" if band.low is None else to_text(band.low)
    high = "Nk" if band.high is None else to_text(band.high)
    unless = to_text(band.unless)
    return f"[{low}, {high})" + ("" if unless == "False" else f" unless {unless}")


def key_tiles(rule: TileRule, env: dict[str, Any], k_len: int, width: int) -> list[tuple[int, int]]:
    """The key tiles [start, stop) of a fixed grid that the bands of one query tile touch, in order, each once."""
    starts: set[int] = set()
    for band in rule.bands:
        if evaluate(band.unless, env):
            continue
        low = 0 if band.low is None else max(0, evaluate(band.low, env))
        high = k_len if band.high is None else min(k_len, evaluate(band.high, env))
        if low < high:
            starts.update(range(low // width * width, high, width))
    return [(start, min(start + width, k_len)) for start in sorted(starts)]


def _query_tile(launch: Launch, b: int, h: int, start: int, stop: int) -> torch.Tensor:
    """Online softmax over the key tiles of one query tile, in float64."""
    import torch

    program, k_len = launch.program, launch.k.shape[2]
    rule = analyse(program.rule_of(h))
    kv = h // (launch.q.shape[1] // launch.k.shape[1])
    q, k, v = (t.double() for t in (launch.q[b, h, start:stop], launch.k[b, kv], launch.v[b, kv]))
    env: dict[str, Any] = {"b": b, "h": h, "N": k_len, "Nq": launch.q.shape[2]}
    env |= {"q0": start + launch.q_offset, "q1": stop - 1 + launch.q_offset}
    env |= dict(zip(program.sizes(), program.size_values(k_len), strict=True))
    env |= {f"_{i}": load for i, load in enumerate(launch.loads)}
    rows = {"q": torch.arange(start, stop)[:, None] + launch.q_offset}
    top, norm = _first(program.sink, env | rows, stop - start)
    total = torch.zeros(stop - start, v.shape[-1], dtype=torch.float64)
    for low, high in key_tiles(rule, env, k_len, BLOCK_N):
        tile = env | {"k0": low, "k1": high - 1}
        if evaluate(rule.empty, tile):
            continue
        scores = _capped(q @ k[low:high].T * launch.scale, program.softcap)
        positions = rows | {"k": torch.arange(low, high)[None]}
        scores = scores + bias.evaluate(program.bias, env | positions)
        if not evaluate(rule.full, tile):
            scores = scores.masked_fill(~torch.as_tensor(evaluate(rule.keep, env | positions)), -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = new_top.clamp(min=torch.finfo(torch.float64).min)
        weights, decay = torch.exp(scores - shift), torch.exp(top - shift)
        top, norm = new_top, norm * decay + weights.sum(-1, keepdim=True)
        total = total * decay + weights @ v[low:high]
    return total / norm.masked_fill(norm == 0, 1)


def _first(sink: bias.Bias | None, env: dict[str, Any], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum and the sum of weights that each row starts with: nothing, or the sink's."""
    import torch

    if sink is None:
        return torch.full((rows, 1), -torch.inf, dtype=torch.float64), torch.zeros(rows, 1, dtype=torch.float64)
    top = bias.evaluate(sink, env).expand(rows, 1)
    return top, (top > -torch.inf).double()


def _capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    import torch

    return scores if cap is None else cap * torch.tanh(scores / cap)
