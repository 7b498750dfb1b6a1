"""One call of a captured attention: its tensors, the model's own rule, and what patterns make of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sparsify import bias
from sparsify.codegen import Launch
from sparsify.expr import TRUE, Chosen, Expr, Load, Pred, Test, Var, conjunction
from sparsify.passes.recover_masks import K, Q
from sparsify.patterns import Pattern
from sparsify.patterns.head_choices import sees_no_future
from sparsify.patterns.lists import choices, with_choices
from sparsify.patterns.select import Choice
from sparsify.patterns.selector import Selector
from sparsify.planner.blocks import Block, Where, block, rows_at_a_time, spans
from sparsify.selection.site import Ask, select, usable_keys
from sparsify.spec import SiteInfo
from sparsify.text import parse_expr
from sparsify.walk import substitute

MOST_WHOLE = 1024  # keys: beyond, no mask of all pairs is made, and a backward pass makes the weights again

Tables = dict[tuple[int | None, str], torch.Tensor]  # units chosen, by layer and choice: bool (B, L, rows, units)


@functools.lru_cache(maxsize=4096)
def _combined(own: Pred, pattern: Pattern, position: Expr) -> Pred:
    return conjunction([own, substitute(pattern.keep(), {"q": position})])


@dataclass
class SiteCall:
    """An attention as the model calls it.

    info: the site as a spec sees it. launch: q (B, Hq, Nq, D), k and v (B, Hkv, Nk, D), and the model's own program.
    position: that of a query among the keys, over q and loads. tables: what the layers of this pass have chosen.
    """

    info: SiteInfo
    launch: Launch
    position: Expr = Q
    tables: Tables = field(default_factory=dict)

    @classmethod
    def read(cls, text: str, launch: Launch, tables: Tables) -> SiteCall:
        """From what the graph says of a site (see `sparsify.passes.splice.described`)."""
        fields = json.loads(text)
        position = parse_expr(fields.pop("position"))
        del fields["placed"]
        return cls(SiteInfo(**fields), launch, position, tables)

    @cached_property
    def at(self) -> Where:
        return Where(self.launch.q.shape[2], self.launch.k.shape[2], int(self.launch.q_offset))

    @cached_property
    def env(self) -> dict[str, Any]:
        """The tensors of loads, and the batch."""
        batch = torch.arange(self.launch.q.shape[0], device=self.launch.q.device).view(-1, 1, 1, 1)
        return {f"_{i}": load for i, load in enumerate(self.launch.loads)} | {"b": batch}

    @property
    def key(self) -> tuple[str, int]:
        """What tells sites apart."""
        return self.info.address, self.info.use

    @property
    def own(self) -> Pred:
        """What the model itself keeps."""
        return self.launch.program.keep[0]

    def keep(self, pattern: Pattern | None, heads: Sequence[int] | None = None) -> Pred:
        """What heads keep under a pattern; its choices are made here. None: what the model keeps.

        heads: those that are asked about, all by default: choices of heads by themselves are made for no others.
        """
        if pattern is None:
            return self.own
        keep = _combined(self.own, pattern, self.position)
        return with_choices(keep, {chosen: self._chosen(chosen, keep, heads) for chosen in choices(keep)})

    def _chosen(self, chosen: Chosen, keep: Pred, heads: Sequence[int] | None) -> Pred:
        """The units of a choice as a test of a table, by the choice of the layer that it belongs to."""
        choice = Choice.parse(chosen.text)
        if not isinstance(choice.selector, Selector):
            return TRUE
        source, causal = choice.reuse.source_of(self.info.layer), sees_no_future(keep, chosen, self.position)
        shared = bool(choice.reuse.layers) or choice.selector.heads.scope != "head"
        asked = range(self.launch.q.shape[1]) if shared or heads is None else heads
        known = self.tables.get((source, chosen.text)) if source is not None else None
        table = known if known is not None else self._table(choice.selector, causal, asked)
        if shared and source is None:
            self.tables[self.info.layer, chosen.text] = table
        which = self._held(self._places(asked, table.shape[1]))
        name, selector, row = self._held(table), choice.selector, Q - self.at.offset
        unit = row // selector.unit.q, K // selector.unit.k
        return Test(Load(name, (Var("b"), Load(which, (Var("h"),)), *unit)))

    def _held(self, tensor: torch.Tensor) -> str:
        """The name of one more load."""
        name = f"_{len(self.env) - 1}"
        self.env[name] = tensor
        return name

    def _places(self, asked: Sequence[int], lists: int) -> torch.Tensor:
        """(Hq,) int64: the place in a table of so many lists of each head that is asked about, 0 of others."""
        found = torch.zeros(self.launch.q.shape[1], dtype=torch.int64)
        found[list(asked)] = torch.arange(len(asked)) * lists // len(asked)
        return found.to(self.launch.q.device)

    def _table(self, selector: Selector, causal: bool, heads: Sequence[int]) -> torch.Tensor:
        """bool (B, L, rows, units): whether a unit is in the row's list."""
        launch = self.launch
        ask = Ask(selector, self.position, usable_keys(self.own, False), causal)
        few = len(heads) < launch.q.shape[1]
        q, k = (self._of(launch.q, heads, 1), self._keys(launch.k, heads)) if few else (launch.q, launch.k)
        with torch.no_grad():
            index, count = select(q, k, list(launch.loads), None, launch.q_offset, launch.scale, ask.text())[:2]
            units = -(-launch.k.shape[2] // selector.unit.k)
            used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
            table = index.new_zeros(*index.shape[:-1], units + 1, dtype=torch.bool)
            return table.scatter(-1, torch.where(used, index, units).long(), True)[..., :units]

    @cached_property
    def step(self) -> int:
        """How many rows are looked at together."""
        return rows_at_a_time(self.launch.q.shape[0], self.launch.q.shape[1], self.at.k_len)

    def block(self, keep: Pred, heads: Sequence[int], rows: tuple[int, int]) -> Block:
        """What a predicate keeps of some rows."""
        return block(keep, heads, self.at, rows, self.env, self.launch.q.device)

    def scores(self, heads: Sequence[int], rows: tuple[int, int], found: Block) -> torch.Tensor:
        """The scaled, capped and biased scores (B, heads, rows, columns) in float32, -inf where the mask drops."""
        launch, program = self.launch, self.launch.program
        q, k = self._of(launch.q, heads, 1)[:, :, slice(*rows)], self._keys(launch.k, heads)[:, :, found.columns]
        scores = (q.float() @ k.float().mT) * launch.scale
        if program.softcap is not None:
            scores = program.softcap * torch.tanh(scores / program.softcap)
        if program.bias:
            env = self._positions(heads, rows) | {"k": torch.arange(self.at.k_len, device=q.device)[found.columns]}
            scores = scores + bias.evaluate(program.bias, env).to(scores)
        return scores if found.mask is None else scores.masked_fill(~found.mask, -torch.inf)

    def sink(self, heads: Sequence[int], rows: tuple[int, int]) -> torch.Tensor | None:
        """The logit (B or 1, heads or 1, rows or 1, 1) that joins each row's softmax, if there is one."""
        sink = self.launch.program.sink
        if sink is None:
            return None
        return bias.evaluate(sink, self._positions(heads, rows)).to(torch.float32)

    def values(self, heads: Sequence[int], found: Block) -> torch.Tensor:
        """v (B, heads, columns, Dv) in float32."""
        return self._keys(self.launch.v, heads)[:, :, found.columns].float()

    def _positions(self, heads: Sequence[int], rows: tuple[int, int]) -> dict[str, Any]:
        device = self.launch.q.device
        return self.env | {
            "N": self.at.k_len,
            "Nq": self.at.q_len,
            "h": torch.tensor(heads, device=device).view(-1, 1, 1),
            "q": torch.arange(*rows, device=device).view(-1, 1) + self.at.offset,
        }

    def _of(self, tensor: torch.Tensor, heads: Sequence[int], group: int) -> torch.Tensor:
        if group == 1 and len(heads) == tensor.shape[1]:
            return tensor
        return tensor[:, [head // group for head in heads]]

    def _keys(self, tensor: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        return self._of(tensor, heads, self.launch.q.shape[1] // tensor.shape[1])


def attend(call: SiteCall, keeps: Sequence[Pred]) -> torch.Tensor:
    """The output (B, Hq, Nq, Dv) where head h keeps `keeps[h]`, in blocks of rows; differentiable, memory O(N)."""
    launch = call.launch
    groups: dict[Pred, list[int]] = {}
    for head, keep in enumerate(keeps):
        groups.setdefault(keep, []).append(head)
    if _plain(call):
        if len(groups) == 1 and (fast := _whole(call, keeps[0])) is not None:
            return fast
        if call.at.k_len <= MOST_WHOLE and call.at.q_len <= MOST_WHOLE:
            return _masked(call, groups)
    parts, order = [], []
    for keep, heads in groups.items():
        rows = [_rows(call, keep, heads, span) for span in spans(call.at.q_len, call.step)]
        parts.append(torch.cat(rows, 2))
        order += heads
    out = torch.cat(parts, 1).to(launch.v.dtype)
    return out if order == sorted(order) else out[:, torch.tensor(order).argsort().to(out.device)]


def _plain(call: SiteCall) -> bool:
    """Whether PyTorch's own attention has all that the model does to its scores."""
    program = call.launch.program
    return program.softcap is None and not program.bias and program.sink is None


def _whole(call: SiteCall, keep: Pred) -> torch.Tensor | None:
    """PyTorch's own attention, where it does the same without a mask."""
    causal = keep == (Q >= K) and call.at.offset == 0
    return _theirs(call, is_causal=causal) if keep == TRUE or causal else None


def _masked(call: SiteCall, groups: dict[Pred, list[int]]) -> torch.Tensor:
    """PyTorch's own attention under one mask for all heads: for lengths at which that takes little memory."""
    batch, heads = call.launch.q.shape[:2]
    mask = torch.zeros(1, heads, call.at.q_len, call.at.k_len, dtype=torch.bool, device=call.launch.q.device)
    for keep, of in groups.items():
        for rows in spans(call.at.q_len, call.step):
            found = call.block(keep, of, rows)
            if found.columns is None:
                continue
            kept = torch.ones(1, dtype=torch.bool, device=mask.device) if found.mask is None else found.mask
            if kept.dim() == 4 and kept.shape[0] > mask.shape[0]:
                mask = mask.expand(batch, -1, -1, -1).clone()
            wide = found.columns if isinstance(found.columns, slice) else found.columns[None, None, None, :]
            if isinstance(wide, slice):
                mask[:, of, slice(*rows), wide] = kept
            else:
                place = torch.tensor(of, device=mask.device)[None, :, None, None]
                row = torch.arange(*rows, device=mask.device)[None, None, :, None]
                each = torch.arange(mask.shape[0], device=mask.device)[:, None, None, None]
                mask[each, place, row, wide] = kept
    empty = ~mask.any(-1, keepdim=True)
    out = _theirs(call, attn_mask=mask | empty)
    return out.masked_fill(empty, 0.0) if bool(empty.any()) else out


def _theirs(call: SiteCall, **how: Any) -> torch.Tensor:
    launch = call.launch
    return torch.nn.functional.scaled_dot_product_attention(
        launch.q, launch.k, launch.v, scale=launch.scale, enable_gqa=True, **how
    )


def _rows(call: SiteCall, keep: Pred, heads: list[int], rows: tuple[int, int]) -> torch.Tensor:
    if torch.is_grad_enabled() and call.at.k_len > MOST_WHOLE:
        return checkpoint(_rows_now, call, keep, heads, rows, use_reentrant=False)
    return _rows_now(call, keep, heads, rows)


def _rows_now(call: SiteCall, keep: Pred, heads: list[int], rows: tuple[int, int]) -> torch.Tensor:
    found = call.block(keep, heads, rows)
    q, v = call.launch.q, call.launch.v
    if found.columns is None:
        return q.new_zeros(q.shape[0], len(heads), rows[1] - rows[0], v.shape[-1], dtype=torch.float32)
    scores, sink = call.scores(heads, rows, found), call.sink(heads, rows)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)
    if found.mask is not None:
        weights = weights.masked_fill(~found.mask.any(-1, keepdim=True), 0.0)  # an empty row gives 0
    return weights[..., : weights.shape[-1] - (sink is not None)] @ call.values(heads, found)


def own_rows(call: SiteCall) -> Iterator[tuple[int, int]]:
    """The row blocks of a call."""
    return spans(call.at.q_len, call.step)
