"""Lists, layouts and skips for the Triton target: cases like those of `triton_cases`, run by the same tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from list_cases import CASES, ListCase, atom, boxes, drawn_lists, sorted_keys
from strategies import term

from sparsify.codegen.null import NullTarget
from sparsify.codegen.oracle import environment, oracle
from sparsify.codegen.target import Launch
from sparsify.codegen.triton import TritonTarget
from sparsify.patterns.lists import lists
from sparsify.program import Program, Skip
from sparsify.text import parse_pred
from sparsify.walk import evaluate


@dataclass(frozen=True)
class Made:
    """A launch that a function makes, of its first batch only: the interpreter is slow.

    unlisted, unread: the keys of units in no list, or values in a range, are NaN when the kernel runs.
    """

    name: str
    make: Callable[[], Launch]
    dtype: str = "float32"
    unlisted: bool = False
    unread: tuple[int, int] = (0, 0)

    def launch(self, device: str = "cpu") -> Launch:
        made = self.make()
        q, k, v, *loads = (t[:1].to(device) for t in (made.q, made.k, made.v, *made.loads))
        return replace(made, q=q, k=k, v=v, loads=tuple(loads))

    def poison(self, launch: Launch) -> None:
        launch.v[:, :, slice(*self.unread)] = torch.nan
        if self.unlisted:
            rows = ~listed_rows(launch)
            launch.k[rows], launch.v[rows] = torch.nan, torch.nan


def listed_rows(launch: Launch) -> torch.Tensor:
    """The keys of the lists that a key head's query heads read: bool (B, Hkv, Nk)."""
    env, shape = environment(launch), (*launch.q.shape[:3], launch.k.shape[2])
    found = torch.zeros(shape, dtype=torch.bool, device=launch.q.device)
    for h, number in enumerate(launch.program.heads):
        for one in lists(launch.program.keep[number]):
            found[:, h] |= evaluate(one, env).expand(shape)[:, h]
    return found.unflatten(1, (launch.k.shape[1], -1)).any(2).any(2)


def added(case: ListCase) -> Launch:
    """The case with a slope and a row of numbers for each head, and a sink for each."""
    launch = case.launch("triton")
    (batch, heads, q_len, _), k_len = launch.q.shape, launch.k.shape[2]
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(batch, heads, generator=g), torch.randn(batch, heads, q_len, k_len, generator=g)
    drawn[1][drawn[1] < -1.5] = -torch.inf
    bias = (
        term(0.1, "_3[b,h]", "k - q"),
        term(loads="_4[b,h,q-N+Nq,k]"),
        term(0.2, integer="h", where="k % 3 == 0"),
    )
    program = replace(launch.program, loads=5, bias=bias, sink=(term(loads="_3[b,h]"),))
    return replace(launch, program=program, loads=(*launch.loads, *drawn))


def lines(lengths: tuple[int, int] = (70, 200), heads: tuple[int, int] = (2, 1)) -> Launch:
    """Vertical-slash: lists of blocks of 64 and of columns that are in none of them, beside a window."""
    g = torch.Generator().manual_seed(2)
    (q_len, k_len), rows = lengths, -(-lengths[0] // 32)
    blocks, columns = (
        drawn_lists(g, (1, heads[0], rows), -(-k_len // unit), share) for unit, share in ((64, 0.5), (1, 0.1))
    )
    inside = torch.zeros(1, heads[0], rows, -(-k_len // 64) + 1, dtype=torch.bool)
    inside.scatter_(-1, blocks[0].long(), torch.arange(blocks[0].shape[-1]) < blocks[1][..., None])
    chosen = torch.zeros(1, heads[0], rows, k_len + 1, dtype=torch.bool)
    chosen.scatter_(-1, columns[0].long(), torch.arange(k_len) < columns[1][..., None])
    chosen = chosen[..., :k_len] & ~inside.repeat_interleave(64, -1)[..., :k_len]
    index = torch.where(chosen, torch.arange(k_len), k_len).sort(-1).values.int()
    first, second = atom(heads[0], heads[0], 32, 64), atom(heads[0], heads[0], 32, 1)
    second = second.replace("_1[", "_3[").replace("_0[", "_2[")
    rule = f"({first} or {second} or q - k < 9) and k <= q"
    q, k, v = (
        torch.randn(1, h, n, 16, generator=g) for h, n in ((heads[0], q_len), (heads[1], k_len), (heads[1], k_len))
    )
    program = Program.of([parse_pred(rule)] * heads[0], loads=4, target="triton")
    return Launch(program, q, k, v, (*blocks, index, chosen.sum(-1).int()), k_len - q_len, 0.25)


def strided(case: ListCase) -> Launch:
    """The case with lists and rows that don't lie one behind another."""
    launch = case.launch("triton")
    index = launch.loads[0].transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = [
        torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3] + 3), torch.nan) for t in (launch.q, launch.k, launch.v)
    ]
    views = [w[:, :, ::2, 1:-2] for w in wide]
    for view, rows in zip(views, (launch.q, launch.k, launch.v), strict=True):
        view.copy_(rows)
    return Launch(launch.program, *views, (index, *launch.loads[1:]), launch.q_offset, launch.scale)


def _wide(rows: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*rows.shape[:2], 2 * rows.shape[2], rows.shape[3] + 3), torch.nan)
    wide[:, :, ::2, 1:-2] = rows
    return wide[:, :, ::2, 1:-2]


def few_heads(make: Callable[[str], Launch], heads: int) -> Launch:
    """The first query heads, with one key head."""
    launch = make("triton")
    q, k, v = launch.q[:, :heads], launch.k[:, :1], launch.v[:, :1]
    return replace(launch, q=q, k=k, v=v, program=replace(launch.program, heads=launch.program.heads[:heads]))


def weighed(case: ListCase) -> Launch:
    """Heads with different skips, whose keys from 64 on weigh less than 2**-40 of the first ones, all in lists."""
    launch = case.launch("triton")
    launch.q.abs_()
    launch.k[:, :, 64:] = -40 * (1 + launch.k[:, :, 64:].abs())
    return replace(launch, program=replace(launch.program, skips=(Skip(1e-3), Skip(0.1, by_length=True))))


def skipping_errors() -> tuple[float, float]:
    """The largest errors of heads with different skips against the null target, and of that against the oracle."""
    launch = ListCase("streaming", 16, 64, "head", (3, 3), batch=1).launch("triton")
    skips = (Skip(1.0), Skip(100.0, by_length=True), None)
    launch = replace(launch, program=replace(launch.program, skips=skips))
    found, null = TritonTarget().run(launch).double(), NullTarget().run(launch).double()
    return (found - null).abs().max().item(), (null - oracle(launch)).abs().max().item()


def _smaller(case: ListCase) -> ListCase:
    """A long one with one group of heads: the interpreter is slow. Several groups stay where units are single keys."""
    return replace(case, heads=(2, 1)) if case.heads == (4, 2) and case.unit > 1 else case


def _named() -> list[Made]:
    shared = ListCase("streaming", 16, lengths=(3, 150))
    few = replace(shared, rule="with sinks", heads=(2, 1))
    return [
        *(Made(f"list {case.name}", partial(_smaller(case).launch, "triton"), case.dtype) for case in CASES),
        Made("list unread blocks", partial(CASES[1].launch, "triton"), unlisted=True),
        Made("list unread pages", partial(ListCase("causal", 16, lengths=(1, 333)).launch, "triton"), unlisted=True),
        Made("list unread tokens", partial(ListCase("alone", 1, lengths=(3, 150)).launch, "triton"), unlisted=True),
        Made("list heads of a group with biases", partial(added, shared)),
        Made("list heads with biases", partial(added, ListCase("streaming", 64, 64, "head", heads=(2, 2)))),
        Made("list of three heads", partial(ListCase("causal", 16, 1, heads=(6, 2), lengths=(5, 90)).launch, "triton")),
        Made("list strided", partial(strided, shared)),
        Made("list lines", lines),
        Made("skip", partial(weighed, ListCase("streaming", 64, 64, heads=(2, 1), share=1.0)), unread=(64, 200)),
        Made(
            "skip in heads of a group",
            partial(weighed, few),
            unread=(64, 150),
        ),
        Made("layout boxes", partial(few_heads, boxes, 1)),
        Made("layout sorted keys", partial(few_heads, sorted_keys, 2)),
    ]


MADE = _named()
