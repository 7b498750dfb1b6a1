"""The null target: prints a program as a loop nest, and interprets that nest tile by tile in plain torch.

It is the reference for the generated targets: the same tile rules, the same online softmax, in float64, with no
regard for speed. The first thing to read for somebody who wants to know what the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsify import bias
from sparsify.codegen.slots import asked, gathered, scattered, tokens
from sparsify.codegen.target import Launch
from sparsify.expr import TRUE, Listed, constant
from sparsify.patterns.layouts.boxes import TILE as BOX
from sparsify.patterns.lists import passes, tile_rows
from sparsify.patterns.tiles import Band, TileRule, analyse
from sparsify.ranges import text_of
from sparsify.text import to_text
from sparsify.walk import evaluate

if TYPE_CHECKING:
    import torch

    from sparsify.errors import Refusal
    from sparsify.program import Layout, Program

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
            found = passes(keep)
            lines += [f"heads {heads}:", *("  " + line for line in _nest(analyse(found.static)))]
            for step in found.lists:
                lines += [f"    for each key tile of {to_text(step.listed)}", f"      keep  {to_text(step.keep)}"]
        if program.softcap is not None:
            lines.append(f"softcap: {program.softcap}")
        for name, terms in (("bias", program.bias), ("sink", program.sink or ())):
            lines += [f"{name}: {_term(term)}" for term in terms]
        for name, layout in (("query", program.queries), ("key", program.keys)):
            if layout is not None:
                where = "" if layout.filled == TRUE else f" where {to_text(layout.filled)}"
                lines.append(f"{name} slots: {to_text(layout.slots)}, each token {to_text(layout.token)}{where}")
        return "\n".join(lines) + "\n"

    def run(self, launch: Launch) -> torch.Tensor:
        out = launch.empty_output()
        batch, heads = launch.q.shape[:2]
        for b in range(batch):
            for h in range(heads):
                rows, lse = _Head(launch, b, h).run()
                out[b, h] = rows.to(out.dtype)
                if launch.lse is not None:
                    launch.lse[b, h] = lse
        return out

    def remember(self, launch: Launch, key: object) -> None:
        """Nothing: it is not there to be fast."""


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


class _Head:
    """One query head of one launch: its rows by slots, and the loop over query tiles."""

    def __init__(self, launch: Launch, b: int, h: int) -> None:
        self.launch, self.program, self.passes = launch, launch.program, passes(launch.program.rule_of(h))
        kv, k_len = h // (launch.q.shape[1] // launch.k.shape[1]), launch.k.shape[2]
        q, k, v = launch.q[b, h].double(), launch.k[b, kv].double(), launch.v[b, kv].double()
        self.env: dict[str, Any] = {"b": b, "h": h, "N": k_len, "Nq": len(q)}
        self.env |= dict(zip(self.program.sizes(), self.program.size_values(k_len), strict=True))
        self.env |= {f"_{i}": load for i, load in enumerate(launch.loads)}
        self.q, self.placed = self._rows(self.program.queries, "q", q)
        self.k, self.filled = self._rows(self.program.keys, "k", k)
        self.v = self._rows(self.program.keys, "k", v)[0]
        placed = self.program.queries is not None or self.program.keys is not None
        self.rows, self.keys = (BOX, BOX) if placed else (BLOCK_M, BLOCK_N)
        skip = self.program.skip_of(h)
        self.far = None if skip is None else skip.below(k_len) * math.log(2)

    def _rows(self, layout: Layout | None, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The rows by slot, and (token, filled) of each slot; a tensor as it is without a layout."""
        import torch

        if layout is None:
            return tensor, None
        here = self.env | {axis: torch.tensor(self.env[axis]).view(1, 1, 1, 1) for axis in ("b", "h")}
        token, filled = tokens(layout, name, len(tensor), here)
        return gathered(tensor[None, None], token, filled)[0, 0], (token, filled)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (Nq, Dv) and lse (Nq,) in float64."""
        import torch

        height, offset = tile_rows(self.program.keep, self.rows), self.launch.q_offset
        starts = range(0, len(self.q), height)
        parts = [self.query_tile(start, min(start + height, len(self.q)), offset) for start in starts]
        parts = parts or [(self.q.new_zeros(0, self.v.shape[1]), self.q.new_zeros(0))]
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.placed is None:
            return out, lse
        token, filled = self.placed
        rows = torch.full((self.launch.q.shape[2],), -torch.inf, dtype=torch.float64)
        rows[token[0, 0, filled[0, 0]]] = lse[filled[0, 0]]
        return scattered(out[None, None], token, filled, len(rows))[0, 0], rows

    def query_tile(self, start: int, stop: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Online softmax over the key tiles of one query tile, in float64: the output and the lse of its rows."""
        import torch

        env = self.env | {"q0": start + offset, "q1": stop - 1 + offset}
        rows = {"q": torch.arange(start, stop)[:, None] + offset}
        if self.placed is not None:
            rows = {"q": asked(rows["q"], self.placed[1][0, 0, start:stop, None])}
        top, norm = _first(self.program.sink, env | rows, stop - start)
        total = torch.zeros(stop - start, self.v.shape[-1], dtype=torch.float64)
        for keys, keep in self.tiles(env, rows):
            scores = _capped(self.q[start:stop] @ self.k[keys].T * self.launch.scale, self.program.softcap)
            scores = scores + bias.evaluate(self.program.bias, self.env | rows | {"k": self.asked(keys)})
            values = self.v[keys]
            if keep is not None:
                scores = scores.masked_fill(~keep, -torch.inf)
                values = values.masked_fill(~keep.any(0)[:, None], 0)  # not even a NaN is read of what nobody keeps
            best = scores.amax(-1, keepdim=True)
            if self.far is not None and bool((best < top + self.far).all()):
                continue
            new_top = torch.maximum(top, best)
            shift = new_top.clamp(min=torch.finfo(torch.float64).min)
            weights, decay = torch.exp(scores - shift), torch.exp(top - shift)
            top, norm = new_top, norm * decay + weights.sum(-1, keepdim=True)
            total = total * decay + weights @ values
        return total / norm.masked_fill(norm == 0, 1), (top + norm.log())[:, 0]

    def tiles(self, env: dict[str, Any], rows: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The key tiles of one query tile: the slots of each, and what is kept of it (None: everything)."""
        import torch

        static = analyse(self.passes.static)
        for low, high in key_tiles(static, env, len(self.k), self.keys):
            yield from self.tile(static, torch.arange(low, high), env, rows)
        for step in self.passes.lists:
            rule, keys = analyse(step.keep), listed_keys(step.listed, env, len(self.k))
            for start in range(0, len(keys), self.keys):
                yield from self.tile(rule, keys[start : start + self.keys], env, rows)

    def asked(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys as predicates and biases are asked about them: (1, keys)."""
        return (keys if self.filled is None else asked(keys, self.filled[1][0, 0, keys]))[None]

    def tile(
        self, rule: TileRule, keys: torch.Tensor, env: dict[str, Any], rows: dict[str, Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The tile, if the rule keeps something of it. Keys of a list are bounded by the first and the last."""
        import torch

        corners = env | {"k0": int(keys[0]), "k1": int(keys[-1])}
        if evaluate(rule.empty, corners):
            return
        keep = None
        if not evaluate(rule.full, corners):
            found = torch.as_tensor(evaluate(rule.keep, self.env | rows | {"k": self.asked(keys)}))
            keep = found.expand(len(rows["q"]), len(keys))
        if self.filled is not None:
            filled = self.filled[1][0, 0, keys]
            keep = filled.expand(len(rows["q"]), len(keys)) if keep is None else keep & filled
        yield keys, keep


def listed_keys(listed: Listed, env: dict[str, Any], k_len: int) -> torch.Tensor:
    """The keys in the list of a query tile, ascending; `env` holds its corner q0, b, h and loads."""
    import torch

    place = tuple(evaluate(part, env | {"q": env["q0"]}) for part in listed.index.index[:-1])
    units = env[listed.index.source][place][: int(env[listed.count.source][place])].long()
    keys = (units[:, None] * listed.unit + torch.arange(listed.unit)).flatten()
    return keys[keys < k_len]


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
