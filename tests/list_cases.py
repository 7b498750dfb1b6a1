"""Launches with lists, layouts and skips: what every target has to get right beyond closed forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsify.codegen import Launch
from sparsify.program import Layout, Program, Skip
from sparsify.text import parse_expr, parse_pred

# A rule with `listed` in it stands for the list of the case: `{list}` becomes the atom.
RULES = {
    "alone": "{list}",
    "causal": "{list} and k <= q",
    "with sinks": "({list} or k < 5) and k <= q",
    "streaming": "({list} or k < 3 or q - k < 37) and k <= q",
    "padded": "({list} or q - k < 9) and k <= q and _2[b,k]",
    "dilated": "{list} and (q - k) % 3 == 0",
    "by head": "({list} and h % 2 == 0) or (k <= q and q - k < 20)",
}


@dataclass(frozen=True)
class ListCase:
    """One launch: `share` of the units of keys are in each list.

    scope: who shares a list (layer, kv_group, head); row: queries that share one, 0 for all; unit: keys of a unit.
    """

    rule: str
    unit: int
    row: int = 0
    scope: str = "kv_group"
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (70, 200)
    size: int = 16
    dtype: str = "float32"
    batch: int = 2
    share: float = 0.4
    bias: str = ""
    mixed: bool = False  # the first head is causal and has no list
    seed: int = 0

    @property
    def name(self) -> str:
        where = f"{self.lengths[0]}x{self.lengths[1]}"
        return f"{self.rule} {self.unit} row {self.row} {self.scope} {where} {self.dtype} {self.bias}".strip()

    def launch(self, target: str, device: str = "cpu") -> Launch:
        """The launch, with NaN in what must not be read of a list."""
        g = torch.Generator().manual_seed(self.seed)
        (hq, hkv), (nq, nk) = self.heads, self.lengths
        lists = {"layer": 1, "kv_group": hkv, "head": hq}[self.scope]
        rows = -(-nq // self.row) if self.row else 1
        index, count = drawn_lists(g, (self.batch, lists, rows), -(-nk // self.unit), self.share)
        padding = torch.rand(self.batch, nk, generator=g) > 0.2
        rule = RULES[self.rule].format(list=atom(hq, lists, self.row, self.unit))
        keeps = [parse_pred(rule)] * hq
        if self.mixed:
            keeps[0] = parse_pred("k <= q")
        dtype = getattr(torch, self.dtype)
        q, k, v = (torch.randn(self.batch, h, n, self.size, generator=g).to(dtype) for h, n in
                   ((hq, nq), (hkv, nk), (hkv, nk)))  # fmt: skip
        loads = [t.to(device) for t in (index, count, padding)]
        from strategies import BIASES

        bias = BIASES[self.bias] if self.bias else ()
        assert not self.bias or "_" not in str(bias)
        program = Program.of(keeps, loads=3, target=target, bias=bias)
        return Launch(program, q.to(device), k.to(device), v.to(device), tuple(loads), nk - nq, self.size**-0.5)


def atom(heads: int, lists: int, row: int, unit: int) -> str:
    """The text of a `listed` atom over loads `_0` and `_1`."""
    which = "0" if lists == 1 else "h" if lists == heads else f"h//{heads // lists}"
    place = f"b, {which}, {f'(q - N + Nq)//{row}' if row else '0'}"
    return f"listed(_0[{place}, 0], _1[{place}], k//{unit})"


def drawn_lists(g: torch.Generator, shape: tuple[int, ...], units: int, share: float) -> tuple[torch.Tensor, ...]:
    """Ascending unit numbers and how many, as selectors give them: the rest is filled with `units`. Some are empty."""
    chosen = torch.rand(*shape, units, generator=g) < share
    chosen[torch.rand(shape, generator=g) < 0.1] = False
    index = torch.where(chosen, torch.arange(units), units).sort(-1).values
    return index.to(torch.int32), chosen.sum(-1).to(torch.int32)


CASES = (
    *(ListCase(rule, unit=64, row=64) for rule in RULES),
    *(ListCase(rule, unit=16, lengths=(1, 333)) for rule in RULES),
    *(ListCase(rule, unit=1, lengths=(3, 150), share=0.2) for rule in ("causal", "padded", "streaming")),
    ListCase("causal", 128, 128, "head", lengths=(300, 300)),
    ListCase("causal", 64, 128, "layer", lengths=(130, 300)),
    ListCase("streaming", 32, 64, "head", lengths=(150, 170)),
    ListCase("causal", 64, 1, "kv_group", lengths=(20, 200)),
    ListCase("causal", 48, 16, "head", lengths=(33, 200)),
    ListCase("by head", 16, 0, "head", lengths=(1, 90), heads=(4, 4)),
    ListCase("alone", 16, 0, "layer", lengths=(5, 64), heads=(8, 2), mixed=True),
    ListCase("streaming", 64, 64, "kv_group", lengths=(100, 260), mixed=True),
    ListCase("streaming", 16, 0, "kv_group", lengths=(1, 999), dtype="bfloat16", size=64),
    ListCase("causal", 64, 64, "head", lengths=(130, 260), dtype="float16", size=40),
    ListCase("alone", 64, 64, lengths=(64, 128), share=1.0),
    ListCase("alone", 64, 64, lengths=(64, 128), share=0.0),
)


def boxes(target: str, window: int = 5, seed: int = 0) -> Launch:
    """A neighborhood in a grid of 11 x 20 tokens in boxes of 8 x 8, behind 3 more tokens that everybody sees.

    The first 64 slots hold the 3 tokens; the boxes go on over the grid's border.
    """
    g = torch.Generator().manual_seed(seed)
    high, wide, across, down = 11, 20, 3, 2
    coordinate = {
        "y": "({0} - 64)//{w}*8 + ({0} - 64) % 64//8",
        "x": "({0} - 64)//64 % {a}*8 + ({0} - 64) % 8",
    }
    at = {(c, s): text.format(s, w=64 * across, a=across) for c, text in coordinate.items() for s in "qk"}

    def layout(slot: str) -> Layout:
        y, x = at["y", slot], at["x", slot]
        token = f"({slot} if {slot} < 64 else {y}*{wide} + {x} + 3)".replace(f"{y}*{wide}", f"({y})*{wide}")
        filled = f"{slot} < 3 or ({slot} >= 64 and {y} < {high} and {x} < {wide})"
        return Layout(parse_expr(str(64 + 64 * across * down)), parse_expr(token), parse_pred(filled))

    near = " and ".join(f"abs(({at[c, 'q']}) - ({at[c, 'k']})) < {window}" for c in "yx")
    keys = layout("k")
    keep = parse_pred(f"k < 3 or q < 64 or (k >= 64 and {near})") & keys.filled
    q, k, v = (torch.randn(2, h, high * wide + 3, 16, generator=g) for h in (4, 2, 2))
    program = Program.of([keep] * 4, queries=layout("q"), keys=keys, target=target)
    return Launch(program, q, k, v, (), 0, 0.25)


def sorted_keys(target: str, seed: int = 0) -> Launch:
    """Keys sorted inside segments of 64 by data, as PBS-Attn has them, with causal lists of blocks between segments."""
    g = torch.Generator().manual_seed(seed)
    nq = nk = 230
    token = torch.stack([torch.cat([start + torch.randperm(min(64, nk - start), generator=g)
                         for start in range(0, nk, 64)]) for _ in range(4)]).view(2, 2, nk)  # fmt: skip
    index, count = drawn_lists(g, (2, 4, 4), 4, 0.5)
    listed = "listed(_0[b, h, (q - N + Nq)//64, 0], _1[b, h, (q - N + Nq)//64], k//64)"
    rule = f"({listed} and k//64 < q//64) or (k//64 == q//64 and _2[b, h//2, k] <= q)"
    keys = Layout(parse_expr("N"), parse_expr("_2[b, h//2, k]"))
    q, k, v = (torch.randn(2, h, nq, 16, generator=g) for h in (4, 2, 2))
    program = Program.of([parse_pred(rule)] * 4, loads=3, keys=keys, target=target)
    return Launch(program, q, k, v, (index, count, token), 0, 0.25)


def skipping(launch: Launch, share: float) -> Launch:
    """The launch with a skip for every head."""
    skips = (Skip(share),) * len(launch.program.heads)
    return replace(launch, program=replace(launch.program, skips=skips))
