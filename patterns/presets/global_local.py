"""Near keys with strides, globals or random blocks: Sparse Transformer, Longformer, BigBird."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsify.errors import PatternError
from sparsify.expr import Expr, Pred, disjunction, eq, maximum, mod
from sparsify.patterns.causal import causal as only_past
from sparsify.patterns.expression import expr
from sparsify.patterns.global_tokens import global_tokens as globals_at
from sparsify.patterns.pattern import H, K, Pattern, Q
from sparsify.patterns.presets.preset import choice, flag, preset, whole
from sparsify.patterns.same_block import same_block
from sparsify.patterns.window import window
from sparsify.sizes import Size

MAX_DILATIONS, MAX_RANDOM = 32, 8


@preset(
    source="Child et al., arXiv 1904.10509; openai/sparse_attention (attention.py)",
    phase="both",
    semantics="native",
    cost="strided: stride keys and one in stride of the rest; fixed: half a stride and vert_size of each stride",
    omits="which layers or heads take which part where they are not merged",
    example={"stride": 64},
    heads=2,
)
def sparse_transformer(
    variant: Literal["strided", "fixed"] = "strided",
    stride: int = 128,
    block: int = 32,
    vert_size: int = 1,
    num_verts: int = 1,
    part: Literal["merged", "local", "remote"] = "merged",
) -> Pattern:
    """k <= q and (local or remote). strided: q - k < stride, or (q - k) mod stride = 0.

    fixed: q // stride = k // stride, or k in `vert_size` blocks of its stride: the last ones, or those before them by
    h mod num_verts. `part` takes one of the two by itself, for layers or heads that alternate.
    """
    name = "sparse_transformer"
    choice(variant, f"{name}.variant", ("strided", "fixed"))
    choice(part, f"{name}.part", ("merged", "local", "remote"))
    long, wide = whole(stride, f"{name}.stride"), whole(block, f"{name}.block")
    size, verts = whole(vert_size, f"{name}.vert_size"), whole(num_verts, f"{name}.num_verts")
    if variant == "strided":
        local, remote = window(long), expr(f"(q - k) % {long} == 0")
    else:
        if long % wide or long < size * verts * wide:
            what = f"blocks of {wide}, at least vert_size * num_verts of them"
            raise PatternError(f"{name}.stride: expected a multiple of {what}, found {stride}")
        last = f"{long // wide} - h % {verts} * {size}"
        column = f"k % {long} // {wide}"
        local, remote = same_block(long), expr(f"{last} - {size} <= {column} and {column} < {last}")
    return {"merged": local | remote, "local": local, "remote": remote}[part] & only_past()


@preset(
    source="Beltagy et al., arXiv 2004.05150; allenai/longformer",
    phase="both",
    semantics="native",
    cost="2 window + 1 keys for each query (half of them if causal), and all for the global tokens",
    omits="the projections of their own that global tokens have",
    example={"window": 64, "dilation": [1, 4]},
    heads=2,
)
def longformer(
    window: int = 256,
    dilation: int | Sequence[int] = 1,
    global_tokens: int | str | Sequence[int | str] = 0,
    causal: bool = False,
) -> Pattern:
    """|q - k| <= window d and (q - k) mod d = 0, or q or k is one of `global_tokens`; causal: only keys up to q.

    `window` counts one side (the configuration's attention_window is both). d is the dilation, one for all heads or a
    list of one for each; heads beyond the list take it from its start.
    """
    reach = whole(window, "longformer.window", low=0)
    listed = list(dilation) if isinstance(dilation, list | tuple) else [dilation]
    if not 1 <= len(listed) <= MAX_DILATIONS:
        raise PatternError(f"longformer.dilation: expected 1 to {MAX_DILATIONS} values, found {len(listed)}")
    apart = [whole(d, "longformer.dilation") for d in listed]
    try:
        at = globals_at(global_tokens)
    except PatternError as error:
        raise PatternError(str(error).replace("global_tokens.positions", "longformer.global_tokens", 1)) from None
    near = _Dilated(reach, tuple(apart))
    return (near | at) & only_past() if flag(causal, "longformer.causal") else near | at


@dataclass(frozen=True)
class _Dilated(Pattern):
    """Keys within `reach` steps of the head's dilation on both sides."""

    reach: int
    dilations: tuple[int, ...]

    def keep(self) -> Pred:
        return disjunction(self._heads(d) & self._near(d) for d in sorted(set(self.dilations)))

    def _near(self, dilation: int) -> Pred:
        far = self.reach * dilation
        return (Q - K - far <= 0) & (K - Q - far <= 0) & eq((Q - K) % dilation, 0)

    def _heads(self, dilation: int) -> Pred:
        places = [place for place, one in enumerate(self.dilations) if one == dilation]
        return disjunction(eq(H % len(self.dilations), place) for place in places)


@preset(
    source="Zaheer et al., arXiv 2007.14062; google-research/bigbird",
    phase="both",
    semantics="native",
    cost="3 + 2 + random blocks for each query block; the first and the last block read everything",
    omits="the published random plan, which numpy draws: here a hash of seed, head and row chooses one block in each of"
    " `random` equal parts of the row, so that no table is needed at any length",
    example={"block": 16},
    heads=2,
)
def big_bird(block: int = 64, random: int = 3, seed: int = 0) -> Pattern:
    """|qb - kb| <= 1, or qb or kb is the first or the last block, or kb is one of `random` others, by head and row.

    qb = q // block and kb = k // block. The random blocks of a row are distinct, and none is global or in the window.
    """
    wide = whole(block, "big_bird.block", low=1)
    draws = whole(random, "big_bird.random", low=0)
    if draws > MAX_RANDOM:
        raise PatternError(f"big_bird.random: expected at most {MAX_RANDOM}, found {random}")
    return _BigBird(wide, draws, whole(seed, "big_bird.seed", low=0) % PRIMES[0])


PRIMES, FACTORS = (8191, 5003), (3547, 2741, 1583, 619)  # of row, head, seed, number: products stay inside 32 bits


@dataclass(frozen=True)
class _BigBird(Pattern):
    """The rule of `big_bird`."""

    block: int
    random: int
    seed: int

    def keep(self) -> Pred:
        row, column = Q // self.block, K // self.block
        last = Size.read(f"max(ceil(N / {self.block}) - 1, 0)").expr()
        near = (row - column <= 1) & (column - row <= 1)
        edges = [eq(line, end) for line in (row, column) for end in (0, last)]
        return disjunction([near, *edges, *(self._drawn(row, column, number) for number in range(self.random))])

    def _drawn(self, row: Expr, column: Expr, number: int) -> Pred:
        """Whether the column is the row's random block of that number.

        The blocks between the first and the last lie on a ring; those beside the row are left out, and the others,
        counted on from there, are cut into `random` equal parts. A hash says which of its part each number takes.
        """
        ring = Size.read(f"max(ceil(N / {self.block}) - 2, 1)").expr()
        part = Size.read(f"max((ceil(N / {self.block}) - 5) // {self.random}, 1)").expr()
        of_row, of_head, of_seed, of_number = FACTORS
        first = mod(row * of_row + H * of_head + self.seed * of_seed % PRIMES[0], PRIMES[0])
        second = mod(first * (1 + of_number * (number + 1)), PRIMES[1])
        place = mod(second, maximum(part, 1)) + part * number
        return eq(mod(column - row - 2, maximum(ring, 1)), place)
