"""Presets: each system's rule restated by hand, and what a preset is in a spec."""

from __future__ import annotations

import importlib
import json
import math
import pickle
import pkgutil
import re
from typing import get_args

import jsonschema
import numpy as np
import pytest
import torch
from test_patterns import by_hand

import sparsify
from sparsify import patterns as p
from sparsify.errors import PatternError, SpecError
from sparsify.patterns import presets as pre
from sparsify.patterns.count import EMPTY, FULL, tile_classes
from sparsify.patterns.presets.preset import Phase
from sparsify.patterns.select import selections
from sparsify.selection.example import kept_of_made_up
from sparsify.spec import Spec, schema
from sparsify.spec.forms import is_plain


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def streaming(s: int, r: int):
    return lambda h, q, k, n: k <= q and (k < s or q - k < r)


def moa(alpha: float, beta: float, more: int):
    """The run time's spans, of which the sink block is a part."""

    def rule(h: int, q: int, k: int, n: int) -> bool:
        span = min(int(alpha + beta * (n + more)), n + more)
        span = ceil(max(span, 128), 64) * 64
        local = span - min(span, 64)
        return k <= q and (k // 64 < 1 or k // 64 >= q // 64 + 1 - local // 64)

    return rule


def duo_train(h: int, q: int, k: int, n: int) -> bool:
    return k <= q and (k // 128 < ceil(128, 128) or q // 128 - k // 128 < ceil(256, 128))


def duo_chunked(s: int, r: int, c: int):
    return lambda h, q, k, n: (k < s and k <= q) or q // c * c - r <= k <= q


def dkernel(kv: int, group: int, b: int, l: int, v: int, offset: int = 0, homo: bool = False, dense: int = 0):  # noqa: E741
    step = 0 if homo else max(1, int(v / kv))

    def rule(h: int, q: int, k: int, n: int) -> bool:
        j = h // group
        column = (k // b + j * step + offset) % v == 0
        return k <= q and (j >= kv - dense or q // b - k // b < l or column)

    return rule


def phi3(b: int, l: int, v: int):  # noqa: E741
    return lambda h, q, k, n: k <= q and (q // b - k // b < l or (k // b + h + 1) % v == 0)


def long_lora(heads: int, variant: str, group=lambda n: n // 4):
    def rule(h: int, q: int, k: int, n: int) -> bool:
        g = max(group(n), 1)
        half = group(n) // 2
        if h < heads // 2:
            return q // g == k // g and k <= q
        if variant == "varlen":
            return (q + half) // g == (k + half) // g and k <= q
        q, k = (q - half) % n, (k - half) % n
        return q // g == k // g and k <= q

    return rule


def star(b, a):
    return lambda h, q, k, n: k <= q and (q // max(b(n), 1) == k // max(b(n), 1) or k < a(n))


def strided(l: int, part: str = "merged"):  # noqa: E741
    local, remote = part != "remote", part != "local"
    return lambda h, q, k, n: k <= q and ((local and q - k < l) or (remote and (q - k) % l == 0))


def fixed(l: int, b: int, size: int, verts: int):  # noqa: E741
    """The released layout: slot h mod verts of the columns of each stride, counted from its end in groups of size."""
    indices = np.arange(l // b - 1, -1, -1)[: verts * size].reshape(verts, size)
    return lambda h, q, k, n: k <= q and (q // l == k // l or k // b % (l // b) in indices[h % verts])


def longformer(w: int, dilations: list[int], globals_: set[int], causal: bool = False):
    def rule(h: int, q: int, k: int, n: int) -> bool:
        d = dilations[h % len(dilations)]
        near = abs(q - k) <= w * d and (q - k) % d == 0
        return (near or q in globals_ or k in globals_) and (not causal or k <= q)

    return rule


CASES = [
    (pre.streaming_llm(), streaming(4, 2000), 60),
    (pre.streaming_llm(2, 9), streaming(2, 9), 60),
    (pre.streaming_llm(recent="N/4"), lambda h, q, k, n: k <= q and (k < 4 or q - k < n // 4), 60),
    (pre.moa_head(), moa(0, 0.5, 1024), 300),
    (pre.moa_head(0, 0.125, max_new=0), moa(0, 0.125, 0), 700),
    (pre.moa_head(-1024, 1.0), moa(-1024, 1, 1024), 300),
    (pre.moa_head(192, 0.25, max_new=10), moa(192, 0.25, 10), 500),
    (pre.duo_streaming(), streaming(64, 256), 400),
    (pre.duo_streaming("train"), duo_train, 600),
    (pre.duo_streaming("chunked", sinks=5, recent=7, chunk=16), duo_chunked(5, 7, 16), 70),
    (pre.duo_streaming("chunked"), duo_chunked(64, 256, 32768), 70),
    (
        pre.razor_head(recent="max(8, N/5)", compensation=False),
        lambda h, q, k, n: k <= q and (k < 4 or q - k < max(8, n // 5)),
        60,
    ),
    (pre.a_shape(3, 10), streaming(3, 10), 60),
    (pre.based_window(), lambda h, q, k, n: 0 <= q - k < 129, 200),
    (pre.s2_attention(8, 1, 4, 3, 8), dkernel(8, 1, 4, 3, 8), 100),
    (pre.s2_attention(2, 4, 4, 2, 8, offset=3), dkernel(2, 4, 4, 2, 8, 3), 90),
    (pre.s2_attention(2, 2, 4, 2, 5, homo_head=True, num_dense_heads=1), dkernel(2, 2, 4, 2, 5, 0, True, 1), 90),
    (pre.phi3_small(3, 8, 4), phi3(4, 3, 8), 100),
    (pre.long_lora(4), long_lora(4, "varlen"), 61),
    (pre.long_lora(4, "roll"), long_lora(4, "roll"), 61),
    (pre.long_lora(4, "roll", 10), long_lora(4, "roll", lambda n: 10), 40),
    (pre.long_lora(4, "varlen", 10), long_lora(4, "varlen", lambda n: 10), 45),
    (pre.star_attention(), star(lambda n: n // 4, lambda n: n // 4), 61),
    (pre.star_attention(12, 5), star(lambda n: 12, lambda n: 5), 61),
    (pre.sparse_transformer(stride=8), strided(8), 60),
    (pre.sparse_transformer(stride=8, part="local"), strided(8, "local"), 60),
    (pre.sparse_transformer(stride=8, part="remote"), strided(8, "remote"), 60),
    (pre.sparse_transformer("fixed", 16, 2, 1, 1), fixed(16, 2, 1, 1), 60),
    (pre.sparse_transformer("fixed", 16, 2, 2, 3), fixed(16, 2, 2, 3), 60),
    (pre.longformer(5), longformer(5, [1], {0}), 60),
    (pre.longformer(3, [1, 4, 1], "0-1,30"), longformer(3, [1, 4, 1], {0, 1, 30}), 60),
    (pre.longformer(3, 2, [], causal=True), longformer(3, [2], set(), True), 60),
]


@pytest.mark.parametrize(("pattern", "rule", "n"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_preset_is_its_systems_rule(pattern, rule, n):
    for q_len, k_len in ((n, n), (n // 3, n), (1, n - 1)):
        heads = 1 if n > 200 else 5
        assert torch.equal(pattern.mask(heads, q_len, k_len), by_hand(rule, heads, q_len, k_len, None)), (q_len, k_len)


def test_the_published_numbers_of_dkernel():
    """The catalogue's densities for 8 key heads: shares of causal pairs, and of the keys that the last row reads."""
    for n, share, read in ((8192, 0.324, 0.234), (32768, 0.177, 0.152)):
        whole = n * (n + 1) / 2 / n**2
        assert pre.s2_attention().density(8, n, n) / whole == pytest.approx(share, abs=6e-4)
        assert pre.s2_attention().density(8, 1, n) == pytest.approx(read, abs=6e-4)


def test_the_published_spans_of_moa():
    spans = {
        (0, 0.125): (384, 640, 1152, 2176, 4224),
        (0, 0.5): (1536, 2560, 4608, 8704, 16896),
        (1024, 0.875): (3072, 5120, 9088, 16256, 30592),
        (-1024, 1.0): (2048, 4096, 8192, 16384, 32768),
    }
    for (alpha, beta), expected in spans.items():
        for n, span in zip((2048, 4096, 8192, 16384, 32768), expected, strict=True):
            kept = pre.moa_head(alpha, beta).density(1, 1, n) * n  # the last row ends its block
            assert kept == min(span, n), (alpha, beta, n)


def grid_mask(shape, rule) -> torch.Tensor:
    """A rule over coordinates, (n, n) in row-major order."""
    at = list(np.ndindex(*shape))
    return torch.tensor([[rule(a, b) for b in at] for a in at])


def near(x: int, length: int, w: int, s: int = 1) -> range:
    """NATTEN's window of one coordinate."""
    leader = min(x // s * s + s // 2, length - 1)
    left, right = w // 2, w // 2 + w % 2 - 1
    first = max(leader - left, 0) + (length - right - leader - 1 if leader + right >= length else 0)
    return range(first, first + w)


GRIDS = [
    (pre.natten([6, 9], 5), (6, 9), lambda a, b: all(y in near(x, n, 5) for x, y, n in zip(a, b, (6, 9), strict=True))),
    (pre.natten(12, 3, 2), (12,), lambda a, b: (a[0] - b[0]) % 2 == 0 and b[0] // 2 in near(a[0] // 2, 6, 3)),
    (
        pre.natten([4, 6], 3, causal=[True, False]),
        (4, 6),
        lambda a, b: a[0] - 3 < b[0] <= a[0] and b[1] in near(a[1], 6, 3),
    ),
    (
        pre.gna([8, 9], [4, 6], [4, 2]),
        (8, 9),
        lambda a, b: b[0] in near(a[0], 8, 4, 4) and b[1] in near(a[1], 9, 6, 2),
    ),
    (pre.swin([6, 9], 3), (6, 9), lambda a, b: all(x // 3 == y // 3 for x, y in zip(a, b, strict=True))),
    (pre.halo_net([8, 6], 2, 1), (8, 6), lambda a, b: all(-1 <= y - x // 2 * 2 < 3 for x, y in zip(a, b, strict=True))),
    (pre.halo_net([4, 4], 4, 3), (4, 4), lambda a, b: True),
    (pre.axial([4, 5]), (4, 5), lambda a, b: a[0] == b[0]),
    (pre.axial([4, 5], axis=0), (4, 5), lambda a, b: a[1] == b[1]),
    (pre.axial([2, 3, 4], axis=1), (2, 3, 4), lambda a, b: (a[0], a[2]) == (b[0], b[2])),
]


@pytest.mark.parametrize(("pattern", "shape", "rule"), GRIDS, ids=[str(case[0]) for case in GRIDS])
def test_a_preset_of_a_grid_is_its_systems_rule(pattern, shape, rule):
    n = math.prod(shape)
    assert torch.equal(pattern.mask(1, n, n)[0], grid_mask(shape, rule))
    assert pattern.fits(n) == "" and pattern.fits(n - 1) != "" and pattern.fits(n + 1) != ""


def swin_mask(shape: tuple[int, int], m: int, s: int) -> torch.Tensor:
    """The released code's way: numbered regions are rolled, cut into windows and compared, and rolled back."""
    regions = np.zeros(shape, dtype=int)
    slices = (slice(0, -m), slice(-m, -s), slice(-s, None))
    for number, (rows, columns) in enumerate((a, b) for a in slices for b in slices):
        regions[rows, columns] = number
    rolled = np.roll(np.arange(regions.size).reshape(shape), (-s, -s), (0, 1))
    mask = np.zeros((regions.size, regions.size), dtype=bool)
    for top in range(0, shape[0], m):
        for left in range(0, shape[1], m):
            window = np.s_[top : top + m, left : left + m]
            tokens, kind = rolled[window].ravel(), regions[window].ravel()
            mask[np.ix_(tokens, tokens)] = kind[:, None] == kind[None]
    return torch.tensor(mask)


@pytest.mark.parametrize(("m", "s"), [(3, 1), (4, 2), (7, 3)])
def test_shifted_windows_are_swins_regions(m, s):
    shape = (2 * m, 3 * m)
    assert torch.equal(pre.swin(shape, m, s).mask(1, 6 * m * m, 6 * m * m)[0], swin_mask(shape, m, s))
    small = pre.swin([m, 2 * m], m, s)  # a dimension of one window is not shifted
    assert small == pre.swin([m, 2 * m], m, s) and small.keep() == pre.swin([m, 2 * m], m, [0, s]).keep()


def test_big_bird_draws_distinct_blocks_by_head_row_and_seed():
    block, draws = 4, 3
    for blocks in (8, 17, 64):
        n = blocks * block - 1  # the last block is cut
        whole, fixed = (pre.big_bird(block, r).mask(8, n, n).numpy() for r in (draws, 0))
        row = np.arange(n)[:, None] // block
        column = np.arange(n)[None] // block
        edge = (row == 0) | (row == blocks - 1) | (column == 0) | (column == blocks - 1)
        assert (fixed == (edge | (abs(row - column) <= 1))).all()
        drawn = (whole & ~fixed)[:, ::block, ::block]
        assert (np.kron(drawn, np.ones((block, block), bool))[:, :n, :n] == (whole & ~fixed)).all()
        count = drawn.sum(axis=2)[:, 1:-1]
        assert (count <= draws).all() and (count == draws).mean() >= (1 if blocks > 8 else 0.1)
    assert len({lines.tobytes() for lines in drawn}) == 8
    assert (np.abs(drawn.sum(axis=(0, 1))[1:-1] - 8 * draws) < 20).all()  # no column is everybody's
    other = pre.big_bird(block, draws, seed=1).mask(8, n, n).numpy()
    assert (other != whole).any() and not (other & ~whole)[:, :block].any()


def test_tiles_of_big_bird_are_found_empty():
    found = tile_classes(pre.big_bird().keep(), 4096, 4096)
    assert (found == EMPTY).mean() > 0.8 and (found == FULL).sum() == (found != EMPTY).sum()


def same(left: p.Pattern, right: p.Pattern, n: int = 60, heads: int = 3) -> bool:
    return torch.equal(left.mask(heads, n, n), right.mask(heads, n, n))


def test_identities():
    """The oracles of the catalogue of published systems, section 23."""
    causal = p.causal()
    assert same(pre.star_attention(12, 0), p.same_block(12) & causal)
    for everything in (
        pre.duo_streaming(recent=60),
        pre.duo_streaming("chunked"),
        pre.moa_head(60, 0.0),
        pre.s2_attention(vert_stride=1, block=4, local_blocks=1),
        pre.razor_head(0, 60, False),
    ):
        assert same(everything, causal), everything
    assert same(pre.longformer(7, 1, [], causal=True), p.window(8))
    assert same(pre.longformer(60), p.dense())
    assert same(pre.gna([6, 10], [3, 5], [3, 5]), pre.swin([6, 10], [3, 5]))
    assert same(pre.gna([6, 10], [6, 10]), p.dense()) and same(pre.gna([6, 10], 3), pre.natten([6, 10], 3))
    assert same(pre.long_lora(2, "roll", "4*N"), p.expr("h == 0 and k <= q or h > 0"), heads=1)
    one, other = pre.moa_head(max_new=0), p.sinks(64) | p.block_window(64, "max(N/2 // 64, 1)")
    assert not same(one, other & causal, 1024, 1)  # the search's band has a block more: the sink block is apart there


NAMES = [constructor.__name__ for constructor in p.PRESETS]


def example(constructor) -> pre.Preset:
    return constructor(**dict(constructor.about.example))


@pytest.mark.parametrize("constructor", p.PRESETS, ids=NAMES)
def test_every_preset_is_one_line_in_a_spec(constructor):
    name, fields = constructor.__name__, dict(constructor.about.example)
    forms = {name: example(constructor)} if not fields else {json.dumps({name: fields}): example(constructor)}
    if is_plain(name):
        forms[name] = constructor()
    else:
        with pytest.raises(SpecError, match=f"'{name}' needs its fields"):
            Spec(sites=[{"heads": name}])
    for text, pattern in forms.items():
        document = {"version": 1, "sites": [{"heads": text if text == name else json.loads(text)}]}
        spec = Spec.of(document)
        assert spec.rules[0].groups[0].pattern == pattern
        assert Spec.of(json.loads(json.dumps(spec.to_dict()))) == spec
        for written in (document, spec.to_dict()):
            FILE.validate(written)
    assert pickle.loads(pickle.dumps(pattern)) == pattern and hash(pattern) == hash(pickle.loads(pickle.dumps(pattern)))
    with pytest.raises(SpecError, match=rf"unknown pattern '{name[:-1]}'; did you mean"):
        Spec(sites=[{"heads": {name[:-1]: {}}}])


FILE = jsonschema.Draft202012Validator(schema())


def test_a_spec_keeps_a_presets_name_and_arguments():
    heads = {"0": "streaming_llm", "1": {"natten": {"shape": [4, 6], "window": [3, 3]}}, "rest": "mine"}
    document = {"version": 1, "patterns": {"mine": {"swin": [7, 7]}}, "sites": [{"match": "*", "heads": heads}]}
    assert Spec.of(document).to_dict() == document
    assert str(Spec.of(document).rules[0].groups[1].pattern) == "natten(shape=[4, 6], window=[3, 3])"
    inline = Spec(sites=[{"heads": pre.duo_streaming("train") | p.sinks(4)}]).to_dict()
    assert inline["sites"][0]["heads"] == {"duo_streaming": "train", "sinks": 4}
    assert Spec(sites=[{"heads": pre.big_bird()}]).to_dict()["sites"][0]["heads"] == {"big_bird": {}}


def test_a_files_own_name_may_be_that_of_a_preset():
    own = {"longformer": {"longformer": {"window": 8}}, "b": {"any": ["longformer", {"longformer": {}}]}}
    spec = Spec(patterns=own, sites=[{"heads": "longformer"}, {"heads": "b"}, {"heads": pre.longformer()}])
    assert spec.patterns["longformer"] == pre.longformer(8)
    assert spec.patterns["b"] == pre.longformer(8) | pre.longformer()
    assert Spec.of(spec.to_dict()) == spec


def test_what_is_native_stays_marked():
    native = {constructor.__name__ for constructor in p.PRESETS if constructor.about.semantics == "native"}
    assert native == {
        *("s2_attention", "phi3_small", "based_window", "sparse_transformer", "longformer", "big_bird"),
        *("natten", "swin", "halo_net", "axial", "moba", "nsa_selection", "vsa", "nats"),
    }
    assert pre.semantics_of(~(pre.swin([7, 7]) | p.sinks(3)) & pre.streaming_llm()) == "native"
    assert pre.semantics_of(pre.streaming_llm() & p.causal()) == "approx" and pre.semantics_of(p.window(3)) is None


@pytest.mark.parametrize("constructor", p.PRESETS, ids=NAMES)
def test_every_preset_says_what_to_know(constructor):
    about, first = constructor.about, constructor.__doc__.splitlines()[0]
    assert re.match(r"[^.]*[.:]$|.*[.]$", first) and about.phase in get_args(Phase)
    assert all(text and text[-1] != "." for text in (about.source, about.cost, about.omits))
    pattern = example(constructor)
    sizes = about.heads, about.length, about.length
    kept = kept_of_made_up(pattern, *sizes[1:]).double().mean() if selections(pattern) else pattern.density(*sizes)
    assert 0 < kept < 1 or (constructor is pre.star_attention)


def test_the_tuple_of_presets_is_the_folder():
    """Each constructor that a module of the folder makes a preset is listed, once, and each is exported."""
    found = []
    for module in pkgutil.iter_modules(pre.__path__):
        members = vars(importlib.import_module(f"sparsify.patterns.presets.{module.name}"))
        found += [
            name
            for name, value in members.items()
            if isinstance(getattr(value, "about", None), pre.About) and value.__module__.endswith(f".{module.name}")
        ]
    assert sorted(found) == sorted(NAMES) and len(set(NAMES)) == len(NAMES)
    assert set(NAMES) <= set(pre.__all__) and all(p.PATTERNS[name] in p.PRESETS for name in NAMES)


def test_a_preset_can_be_built_inside_a_compiled_function(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    q = torch.randn(1, 2, 12, 8)

    def attend(q):
        mixed = [pre.streaming_llm(sinks=2, recent=3), pre.natten([3, 4], window=[3, 3])]
        return sparsify.attention(q, q, q, mixed)

    torch._dynamo.reset()
    found = torch.compile(attend, backend="eager", fullgraph=True)(q)
    assert torch.equal(found, attend(q))


def test_a_preset_of_ones_own_registers_in_the_same_way(monkeypatch):
    @pre.preset(source="nobody", phase="decode", semantics="approx", cost="little")
    def chosen(keep: int = 4) -> p.Pattern:
        """The best keys."""
        return p.topk(keep)

    monkeypatch.setitem(p.PATTERNS, "chosen", chosen)
    spec = Spec(sites=[{"heads": {"chosen": 8}}])
    assert spec.rules[0].groups[0].pattern == chosen(8)
    assert spec.to_dict()["sites"][0]["heads"] == {"chosen": 8} and str(chosen(keep=4)) == "chosen()"


BAD = [
    (lambda: pre.streaming_llm(-1), "streaming_llm.sinks: expected an integer >= 0, found -1"),
    (lambda: pre.streaming_llm(recent="M"), "streaming_llm.recent: 'M' is not allowed in 'M'"),
    (lambda: pre.moa_head(beta=1.5), "moa_head.beta: expected a number from 0 to 1, found 1.5"),
    (lambda: pre.moa_head(alpha=float("nan")), "moa_head.alpha: expected a number from"),
    (lambda: pre.duo_streaming("trian"), "duo_streaming.mask: unknown value 'trian'; did you mean 'train'?"),
    (lambda: pre.duo_streaming(mask=3), "duo_streaming.mask: unknown value 3; allowed: deploy, train, chunked"),
    (lambda: pre.s2_attention(num_dense_heads=9), "s2_attention.num_dense_heads: expected at most the 8 key heads"),
    (lambda: pre.s2_attention(homo_head=1), "s2_attention.homo_head: expected true or false, found 1"),
    (lambda: pre.razor_head(compensation=1), "razor_head.compensation: expected true or false, found 1"),
    (lambda: pre.long_lora(1), "long_lora.heads: expected an integer >= 2, found 1"),
    (lambda: pre.star_attention(8, 9), "star_attention.anchor: expected at most the block of 8, found 9"),
    (
        lambda: pre.sparse_transformer("fixed", 100),
        "sparse_transformer.stride: expected a multiple of blocks of 32, at least vert_size * num_verts of them, found",
    ),
    (lambda: pre.longformer(8, []), "longformer.dilation: expected 1 to 32 values, found 0"),
    (lambda: pre.longformer(8, 0), "longformer.dilation: expected an integer >= 1, found 0"),
    (lambda: pre.longformer(global_tokens="a"), "longformer.global_tokens: expected non-negative integers"),
    (lambda: pre.big_bird(random=9), "big_bird.random: expected at most 8, found 9"),
    (lambda: pre.natten([4, 4]), "natten.window: 7 is larger than its dimension of 4"),
    (lambda: pre.gna([8, 8], 4, 5), "gna.stride: 5 is larger than the window of 4"),
    (lambda: pre.swin([8, 8], 4, 4), "swin.shift: expected less than the window of 4, found 4"),
    (lambda: pre.swin([8, 9], 4), "swin.shape: expected multiples of the window of 4, found 9"),
    (lambda: pre.halo_net([8, 4]), "halo_net.block: 8 is larger than its dimension of 4"),
    (lambda: pre.axial([8, 4], 2), "axial.axis: expected an integer from -2 to 1, found 2"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_values_are_told_clearly(build, message):
    with pytest.raises(PatternError) as caught:
        build()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_error_is_placed_at_its_field():
    with pytest.raises(SpecError) as caught:
        Spec.read("version: 1\nsites:\n  - heads: {natten: {shape: [4, 4], window: 5}}\n", "s.yaml")
    where = "s.yaml:3:45: sites[0].heads.natten.window"
    assert str(caught.value) == f"{where}: 5 is larger than its dimension of 4"
