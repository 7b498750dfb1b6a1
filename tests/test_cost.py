"""Counting: what the simulator says of tiles and pairs, beside the kernels' own loop and the dense mask."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed, shapes

from sparsify import cost
from sparsify import patterns as p
from sparsify.codegen.null import key_tiles
from sparsify.codegen.slots import slot_count
from sparsify.cost import nest as nests
from sparsify.cost import schedule
from sparsify.cost.kept import kept_by_any, kept_pairs
from sparsify.cost.nest import Nest, Shape, cpp_nest
from sparsify.cost.positions import Positions
from sparsify.cost.site import site_of
from sparsify.cost.tiles import tiles_of
from sparsify.errors import InputError
from sparsify.functional import planned
from sparsify.patterns.spans import listed
from sparsify.patterns.tiles import analyse
from sparsify.program import Program
from sparsify.sizes import size_values
from sparsify.walk import evaluate, variables

CPP = Path(__file__).parents[1] / "codegen" / "cpp"
HEAD = 3
TRUTH = cost.machine("epyc-zen3")
CLOSED = (
    p.dense(),
    p.causal(),
    p.window(50, ahead=9),
    (p.sinks(8) | p.window("N/4 + 3")) & p.causal(),
    p.same_block(70),
    p.same_block(30, shift=4) & p.causal(),
    p.block_window(48, 2) & p.causal(),
)


def _at(q_len, k_len, offset):
    return Positions(q_len, k_len, k_len - q_len if offset is None else offset, q_len, k_len)


def _by_loop(keep, at, nest):
    """(visited, full, partial) of each query tile, by the loop that the null target prints."""
    rule, found = analyse(keep).without_data(), []
    names = {"b": 0, "h": HEAD, "N": at.k_len, "Nq": at.q_len} | size_values(variables(keep), at.k_len)
    for start in range(0, at.q_slots, nest.rows):
        env = names | {"q0": start + at.offset, "q1": min(start + nest.rows, at.q_slots) - 1 + at.offset}
        tiles = key_tiles(rule, env, at.k_slots, nest.keys)
        full = partial = 0
        for low, high in tiles:
            corners = env | {"k0": low, "k1": high - 1}
            if not evaluate(rule.empty, corners):
                whole = bool(evaluate(rule.full, corners)) and high - low == nest.keys
                full, partial = full + whole, partial + (not whole)
        found.append((len(tiles), full, partial))
    return np.array(found).reshape(-1, 3)


@settings(max_examples=60, deadline=None)
@given(composed(), shapes, st.sampled_from([Nest(4, 1, 8, 2, 4), Nest(16, 1, 16, 16, 16), Nest(6, 1, 5, 6, 5)]))
def test_tiles_are_those_of_the_kernels_loop(drawn, shape, nest):
    keep, at = drawn[0].keep(), _at(*shape)
    found = tiles_of(((keep, HEAD),), 1, at, nest)
    assert np.array_equal(np.stack([found.key_tiles, found.full, found.partial], 1), _by_loop(keep, at, nest))


@settings(max_examples=60, deadline=None)
@given(composed(), shapes)
def test_pairs_are_those_of_the_dense_mask(drawn, shape):
    keep, at = drawn[0].keep(), _at(*shape)
    mask = drawn[0].mask(HEAD + 1, at.q_len, at.k_len, at.offset)[HEAD].numpy()
    assert kept_pairs(keep, HEAD, at) == mask.sum()
    assert kept_by_any(((keep, HEAD),), at) == mask.any(0).sum()
    last, other = _at(1, at.k_len, at.offset + at.q_len - 1), (p.sinks(7) | p.window(3)) & p.causal()
    both = mask[-1] | other.mask(1, 1, at.k_len, last.offset)[0, 0].numpy()
    assert (
        kept_by_any(((other.keep(), 0), (keep, HEAD)), Positions(1, at.k_len, last.offset, at.q_len, at.k_len))
        == both.sum()
    )
    nest = Nest(16, 1, 16, 4, 8)
    found = tiles_of(((keep, HEAD),), 1, at, nest)
    assert ((found.full + found.partial) * found.rows).sum() * nest.keys >= mask.sum()
    assert found.whole.sum() + found.masked.sum() >= mask.sum() - 1e-6


@pytest.mark.parametrize("pattern", CLOSED, ids=str)
@pytest.mark.parametrize("shape", [(400, 400, None), (391, 391, None), (130, 517, None), (97, 300, 40), (1, 333, None)])
def test_classes_and_blocks_of_closed_forms_are_those_of_the_mask(pattern, shape):
    at, nest = _at(*shape), Nest(24, 1, 16, 6, 8)
    mask = pattern.mask(1, at.q_len, at.k_len, at.offset)[0].numpy()
    found = tiles_of(((pattern.keep(), 0),), 1, at, nest)
    full = partial = whole = masked = live = 0
    for q in range(0, at.q_len, nest.rows):
        for k in range(0, at.k_len, nest.keys):
            tile = mask[q : q + nest.rows, k : k + nest.keys]
            every = tile.all() and tile.shape[1] == nest.keys
            full, partial = full + every, partial + (tile.any() and not every)
            for row in range(0, len(tile), nest.block):
                block = tile[row : row + nest.block]
                all_here = block.all() and block.shape[1] == nest.keys
                whole += all_here
                masked += block.any() and not all_here
                panels = [block[:, i : i + nest.panel] for i in range(0, block.shape[1], nest.panel)]
                live += 0 if all_here else sum(bool(panel.any()) for panel in panels)
    assert (found.full.sum(), found.partial.sum()) == (full, partial)
    area = nest.block * nest.keys
    # A tile at the end has fewer blocks than others: the counts spread its share over the tile's whole height.
    assert found.masked.sum() / area == pytest.approx(masked, rel=0.1, abs=1)
    assert found.whole.sum() / area == pytest.approx(whole, rel=0.1, abs=1)
    assert found.live.sum() / (nest.block * nest.panel) == pytest.approx(live, rel=0.1, abs=2)


def test_many_tiles_are_estimated_from_some(monkeypatch):
    pattern, at = p.dilated(8) & p.causal(), _at(3000, 3000, None)
    nest = Nest(96, 1, 64, 6, 16)
    exact = tiles_of.__wrapped__(((pattern.keep(), 0),), 1, at, nest)
    pairs = kept_pairs.__wrapped__(pattern.keep(), 0, at)
    monkeypatch.setattr("sparsify.cost.tiles.MANY", 300)
    monkeypatch.setattr("sparsify.cost.kept.PAIRS", 2**18)
    monkeypatch.setattr("sparsify.cost.kept.ROWS", 500)
    found = tiles_of.__wrapped__(((pattern.keep(), 0),), 1, at, nest)
    assert found.key_tiles.sum() == exact.key_tiles.sum()
    assert found.partial.sum() == pytest.approx(exact.partial.sum(), rel=0.02)
    assert kept_pairs.__wrapped__(pattern.keep(), 0, at) == pytest.approx(pairs, rel=0.02)
    window = p.window(100).keep()
    assert kept_pairs.__wrapped__(window, 0, at) == pytest.approx(3000 * 100 - 99 * 100 / 2, rel=0.01)


def test_the_drivers_numbers_are_those_of_its_headers():
    text = "\n".join((CPP / name).read_text() for name in ("parts.h", "worker.h", "driver.h"))
    found = dict(re.findall(r"\b([A-Z][A-Z_]+) = ([^,;]+)[,;]", text))
    for module in (nests, schedule):
        for name in ("TOTAL_CACHE_BYTES", "MANY_ITEMS", "WORTH_A_SPLIT", "WORTH_A_THREAD", "DIRECT_WORK", "TILE_WORK"):
            if name in vars(module):
                assert eval(found[name]) == getattr(module, name), name


def test_few_queries_are_read_where_keys_lie_and_share_tiles():
    one = cpp_nest(Shape(8, 2, 1, 4096, 64), "avx2", 2)
    assert (one.rows, one.heads, one.direct, one.whole_group) == (1, 4, True, True)
    tuned = cpp_nest(Shape(8, 2, 4096, 4096, 64), "avx2", 2, tuned=(("blocks", 8), ("cache_kib", 512)))
    assert (tuned.rows, tuned.held) == (48, 16)
    many = cpp_nest(Shape(8, 2, 4096, 4096, 64), "avx2", 2)
    assert (many.rows, many.heads, many.direct, many.held) == (96, 1, False, 256)
    assert not cpp_nest(Shape(8, 2, 1, 4096, 40), "avx512", 2).direct  # rows are no whole panels
    assert cpp_nest(Shape(8, 2, 512, 512, 64), "avx2", 2, list_rows=128).rows == 64


TILED = (
    (p.causal(), {}),
    (p.window(300), {"q_len": 1}),
    (p.window(300), {"q_len": 5, "heads": 8, "kv_heads": 2}),
    (p.neighborhood([64, 64], 13), {}),
    (p.dense(), {"q_len": 1, "heads": 64, "kv_heads": 8, "batch": 4}),
)


@pytest.mark.parametrize("arch", ["80", "90", "100", "gfx942"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("pattern", "sizes"), TILED, ids=str)
def test_the_nest_of_a_gpu_is_that_of_its_launches(pattern, sizes, dtype, arch):
    from sparsify.codegen import Launch
    from sparsify.codegen.triton.kernels import processors
    from sparsify.codegen.triton.tuning import section, tiled

    shape = Shape(sizes.get("heads", 4), sizes.get("kv_heads", 4), sizes.get("q_len", 4096), 4096, 64, dtype,
                  sizes.get("batch", 1))  # fmt: skip
    site = site_of((pattern,) * shape.heads, shape)
    q, k = (torch.empty(shape.batch, heads, length, 64, dtype=getattr(torch, dtype), device="meta")
            for heads, length in ((shape.heads, shape.q_len), (shape.kv_heads, 4096)))  # fmt: skip
    launch = Launch(site.program()[0], q, k, k, (), 4096 - shape.q_len, 0.125)
    launch, found = tiled(launch, int(arch) if arch.isdigit() else arch)
    machine = TRUTH.model_copy(update={"target": "triton", "arch": arch, "cores": processors(launch)})
    nest = site.nest(machine)
    assert (nest.rows, nest.heads, nest.keys) == (found.rows, found.heads, found.block_n)
    assert (nest.block, nest.splits, nest.section) == (found.block_m, found.splits, section(launch, found))


STRIDED = (p.window(128) | p.column_stride(8)) & p.causal()
NEAR = p.neighborhood([40, 48], 13)
LAID_OUT = (  # patterns of two key heads, queries, keys
    ((p.window(40), p.window(64)), 2048, 2048),
    ((p.dilated(8) & p.causal(), p.window(64)), 2048, 2048),
    ((p.dilated(8) & p.causal(), STRIDED), 300, 300),  # too few for residues
    ((STRIDED, STRIDED), 4096, 4096),
    ((STRIDED, STRIDED), 1000, 4096),
    ((NEAR, NEAR), 1920, 1920),
    ((NEAR, p.dilated(8)), 1920, 1920),
    ((NEAR, NEAR), 640, 1920),
)


@pytest.mark.parametrize(("kinds", "q_len", "k_len"), LAID_OUT, ids=str)
def test_the_simulator_counts_the_program_that_runs(kinds, q_len, k_len):
    """Rules, slots and which of queries and keys lie in a layout are those of what `sparsify.attention` launches."""
    patterns, shape = (kinds[0], kinds[0], kinds[1], kinds[1]), Shape(4, 2, q_len, k_len, 64)
    q, k = torch.empty(1, 4, q_len, 64, device="meta"), torch.empty(1, 2, k_len, 64, device="meta")
    ran, site = Program.parse(planned(q, k, patterns, None, None, None, laid_out=True)[0]), site_of(patterns, shape)
    env, layouts = {"N": k_len, "Nq": q_len}, (ran.queries, ran.keys)
    slots = slot_count(ran.queries, q_len, env), slot_count(ran.keys, k_len, env)
    assert (site.at.q_slots, site.at.k_slots) == slots
    assert site.orders == sum(layout is not None for layout in layouts)
    assert [one.static for one in site.heads] == [ran.rule_of(h) for h in range(4)]


@pytest.mark.parametrize("length", [1600, 1899])
def test_pairs_are_those_of_tokens_whatever_the_layout(length):
    patterns = (p.dilated(8) & p.causal(), STRIDED, p.dilated(16) & p.window(700), p.window(64) & p.causal())
    found = cost.estimate(patterns, length=length, head_dim=64, machine=TRUTH)
    assert site_of(patterns, Shape(4, 4, length, length, 64)).orders == 2
    for head, pattern in zip(found.heads, patterns, strict=True):
        assert head.pairs == int(pattern.mask(1, length, length).sum())


def test_layers_share_what_is_counted_of_a_rule_whichever_heads_are_beside_it():
    mine = (p.dilated(8) & p.causal(), STRIDED)
    others = [(p.sinks(length) | p.window(200)) & p.causal() for length in range(1, 6)]
    for one in others:
        cost.estimate([*mine, one], length=4096, head_dim=64, machine=TRUTH)
    before = tiles_of.cache_info().misses
    for one, other in itertools.pairwise(others):
        cost.estimate([one, *mine, other], length=4096, head_dim=64, machine=TRUTH)
    assert tiles_of.cache_info().misses == before


def test_keys_that_heads_share_are_read_once():
    given = {"q_len": 1024, "length": 65536, "head_dim": 128, "dtype": "bfloat16", "machine": "h100"}
    one, four = (cost.estimate([p.window(512) & p.causal()] * heads, kv_heads=1, **given) for heads in (1, 4))
    own = 1024 * 128 * 2 * 2  # of a head's queries and output
    assert four.bytes - 4 * own == pytest.approx(one.bytes - own)


@pytest.mark.parametrize("length", [65, 200])
def test_the_last_query_tile_of_a_selection_is_as_short_as_it_is(length):
    given = {"length": length, "head_dim": 64, "dtype": "bfloat16", "machine": "h100"}
    assert cost.estimate([p.topk(64)], **given).visited <= cost.estimate([p.dense()], **given).visited


def test_a_gpu_holds_heads_of_powers_of_two():
    given = {"patterns": [p.causal()] * 8, "length": 8192, "dtype": "bfloat16", "machine": "h100"}
    least, small, large = (cost.estimate(head_dim=size, **given).seconds for size in (64, 72, 96))
    assert least < small == pytest.approx(large, rel=0.05)


def test_what_a_machine_has_not_is_refused(tmp_path):
    halves = cost.machine("h100").model_copy(
        update={"rates": tuple(one for one in cost.machine("h100").rates if one.dtype == "bfloat16")}
    )
    with pytest.raises(InputError, match=r"^machine h100: rates: none for float32; it has those of bfloat16$"):
        cost.estimate([p.causal()], length=512, head_dim=64, dtype="float32", machine=halves)
    assert cost.estimate([p.causal()], length=512, head_dim=64, dtype="float16", machine=halves).seconds > 0
    for name, most in (("h100", 256), ("epyc-zen3", 512)):
        with pytest.raises(InputError, match=f"^cost: head_dim: expected at most {most}, as the kernels of {name}"):
            cost.estimate([p.causal()], length=512, head_dim=most + 1, machine=name)
    (tmp_path / "odd.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"odd.json: not UTF-8: invalid start byte at byte 0$"):
        cost.machine(tmp_path / "odd.json")


NATTEN = (
    # What Generalized Neighborhood Attention's table says a fully block-sparse case saves: all tiles by visited ones.
    (p.neighborhood(32768, 2048, 256), 32768, 16.0),
    (p.neighborhood(32768, 2048, 2048), 32768, 16.0),
    (p.neighborhood([256, 256], [80, 80], 16), 65536, 10.24),
    (p.neighborhood([30, 48, 80], [18, 24, 24], [16, 8, 8]), 115200, 11.11),
)


@pytest.mark.parametrize("name", ["h100", "epyc-zen3"])
@pytest.mark.parametrize(("pattern", "tokens", "saved"), NATTEN, ids=lambda x: str(x)[:40])
def test_fully_block_sparse_neighborhoods_visit_what_natten_published(pattern, tokens, saved, name):
    found = cost.estimate([pattern], length=tokens, head_dim=128, dtype="bfloat16", machine=name)
    assert tokens**2 / found.visited == pytest.approx(saved, rel=0.1)
    assert found.pairs <= found.visited


@pytest.mark.parametrize("name", cost.names())
@pytest.mark.parametrize(
    "sizes", [{"length": 700}, {"length": 900, "q_len": 1}, {"length": 513, "q_len": 200, "batch": 3}]
)
def test_an_estimate_adds_up_on_every_shipped_machine(name, sizes):
    heads = [p.causal(), (p.sinks(4) | p.window(64)) & p.causal(), p.column_stride(4, block=16) & p.causal()] * 4
    found = cost.estimate(heads, kv_heads=3, head_dim=64, machine=name, **sizes)
    batch, queries = sizes.get("batch", 1), sizes.get("q_len", sizes["length"])
    assert found.seconds == pytest.approx(sum(head.seconds for head in found.heads))
    masks = [one.mask(12, queries, sizes["length"])[h] for h, one in enumerate(heads)]
    assert [head.pairs for head in found.heads] == [batch * int(mask.sum()) for mask in masks]
    assert all(head.visited >= head.pairs for head in found.heads) and 0 < found.useful <= 1
    assert [head.kv_bytes for head in found.heads] == [batch * int(mask[-1].sum()) * 2 * 64 * 4 for mask in masks]
    joined = [mask[-1] for mask in masks]
    held = sum(int(sum(joined[g : g + 4]).bool().sum()) for g in (0, 4, 8))
    assert found.kv_bytes == batch * held * 2 * 64 * 4
    assert 0 < found.busy <= 1 + 1e-9 and found.launches in (1, 2) and found.permutations == 0
    assert name in str(found)


def test_selections_count_by_their_budget():
    one = p.topk(4, unit=64, sinks=1, local=1) & p.causal()
    found = cost.estimate([one] * 4, length=2048, head_dim=64, machine="epyc-zen3")
    import torch

    import sparsify

    q, k = torch.randn(2, 1, 4, 2048, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    kept = sparsify.kept(q, k, one)
    assert found.pairs == pytest.approx(int(kept.sum()), rel=0.05)
    assert found.launches == 2 and found.select_seconds > 0
    assert all(head.select_seconds == pytest.approx(found.select_seconds / 4) for head in found.heads)
    decode = cost.estimate([p.topk(8, unit=16)] * 4, kv_heads=1, length=4096, q_len=1, head_dim=64, machine="epyc-zen3")
    assert decode.heads[0].pairs == pytest.approx(9 * 16) and decode.kv_bytes == 4096 * 2 * 64 * 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"length": 0}, "cost: length: expected an integer >= 1, found 0"),
        ({"length": 10**9}, "cost: length: expected at most 16777216 tokens, found 1000000000"),
        ({"length": 2**24, "batch": 64}, "cost: length: 16777216 queries of 4 heads in a batch of 64 are "),
        ({"length": 64, "q_len": 65}, "cost: q_len: expected an integer from 1 to the length 64, found 65"),
        ({"length": 64, "kv_heads": 3}, "cost: kv_heads: 4 query heads are no multiple of 3"),
        ({"length": 64, "dtype": "bfloat"}, "cost: dtype: found 'bfloat'; did you mean 'bfloat16'?"),
        ({"length": 64, "machine": "epyc-zn3"}, "unknown machine 'epyc-zn3'; did you mean 'epyc-zen3'?"),
        ({"length": 64, "machine": "h10"}, "unknown machine 'h10'; did you mean 'h100'?"),
        ({"length": 64, "machine": 3}, "machine: expected a name, the path of a JSON file or a Machine, found 3"),
        ({"length": 64, "dtype": torch.bfloat16}, "cost: dtype: expected one of bfloat16, float16, float32 as a"),
    ],
)
def test_what_does_not_fit_is_said(given, says):
    with pytest.raises(InputError, match=f"^{re.escape(says)}"):
        cost.estimate([p.causal()] * 4, **{"head_dim": 64, "machine": "h100"} | given)


def test_patterns_that_no_kernel_can_run_are_refused():
    with pytest.raises(
        InputError, match=r"cost: patterns: neighborhood.shape: 8 x 8 is 64 tokens, but there are 60 keys"
    ):
        cost.estimate([p.neighborhood([8, 8], 3)], length=60, head_dim=64, machine="h100")
    with pytest.raises(InputError, match="cost: patterns: the selection serves prefill, and this is decode"):
        cost.estimate([p.topp(0.9)], length=60, q_len=1, head_dim=64, machine="h100")
    for wrong in ([], p.causal(), None, "dense"):
        with pytest.raises(InputError, match="cost: patterns: expected one pattern for each query head"):
            cost.estimate(wrong, length=60, head_dim=64, machine="h100")


def test_a_machine_is_json_and_says_what_is_wrong_with_it(tmp_path):
    machine = cost.machine("h100")
    assert cost.Machine.parse(machine.text()) == machine and not machine.measured and machine.sources
    path = cost.save(machine, tmp_path / "mine.json")
    assert cost.machine(path) == machine and cost.machine(str(path)) == machine
    data = json.loads(machine.text())
    first = data["rates"][0]
    for change, says in (
        ({"version": 1}, "version: found 1, and this sparsify reads 2; calibrate it anew"),
        ({"corse": 3}, "corse: unknown field; did you mean 'cores'?"),
        ({"cores": 0}, "cores: input should be greater than or equal to 1, found 0"),
        ({"arch": "9"}, "arch: found '9'; did you mean '90'?"),
        ({"memory": 5e-324}, "memory: input should be greater than or equal to 1000000, found 5e-324"),
        ({"rates": [{**first, "full": 5e-324}]}, "rates.0.full: input should be greater than or equal to 0.000000001"),
        ({"launch": 1e300}, "launch: input should be less than or equal to 1000000000000, found 1e+300"),
        ({"rates": [{**first, "tile": [0, 32]}]}, "rates.0.tile.0: input should be greater than or equal to"),
        ({"rates": [{**first, "head_dim": 2**70}]}, "rates.0.head_dim: input should be less than or equal to"),
        ({"rates": [first, first]}, "rates: those of float32, head_dim 64, tile 32 x 32 are given twice"),
        ({"dense": data["dense"][:1] * 2}, "dense: those of float32, head_dim 64 are given twice"),
        ({"rates": [{**first, "ful": 1}]}, "rates.0.ful: unknown field; did you mean 'full'?"),
    ):
        path.write_text(json.dumps(data | change))
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {re.escape(says)}"):
            cost.machine(path)
    path.write_text(json.dumps({name: value for name, value in data.items() if name != "memory"}))
    with pytest.raises(InputError, match=r"mine.json: memory: this field is missing"):
        cost.machine(path)
    for value in ("Infinity", "NaN", "1e999"):
        path.write_text(machine.text().replace(f'"memory": {data["memory"]}', f'"memory": {value}'))
        with pytest.raises(InputError, match=r"mine.json: memory: input should be a finite number, found (inf|nan)$"):
            cost.machine(path)
    path.write_text(machine.text().replace("{", '{"memory": 1e9,', 1))
    with pytest.raises(InputError, match=r"mine.json: the key 'memory' is given twice$"):
        cost.machine(path)
    for text in ("[1", "[" * 100000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"mine.json: not JSON"):
            cost.machine(path)
    with pytest.raises(InputError, match=r"none.json: can't be read: No such file"):
        cost.machine(tmp_path / "none.json")


@pytest.mark.parametrize(("rate", "memory"), [(1e-9, 1e18), (1e12, 1e6)], ids=["fastest", "slowest"])
def test_whatever_a_machine_may_say_a_prediction_is_a_time(rate, memory):
    def all_at(value):
        if isinstance(value, dict):
            return {name: all_at(one) for name, one in value.items()}
        return list(map(all_at, value)) if isinstance(value, list) else rate if isinstance(value, float) else value

    machine = cost.Machine.parse(json.dumps(all_at(json.loads(cost.machine("h100").text())) | {"memory": memory}))
    sizes = {"kv_heads": 2, "length": 2**17, "head_dim": 128, "dtype": "bfloat16", "machine": machine}
    for q_len in (None, 1):
        found = cost.estimate([p.topk(4, unit=64) & p.causal(), p.causal()] * 2, **sizes, q_len=q_len)
        for seconds in (found.seconds, cost.dense_seconds([p.causal()] * 4, **sizes, q_len=q_len)):
            assert 0 < seconds < math.inf


@pytest.mark.parametrize(("function", "gives"), [(cost.estimate, cost.Estimate), (cost.dense_seconds, float)])
def test_a_checked_function_tells_what_it_gives_and_where_it_is(function, gives):
    assert typing.get_type_hints(function)["return"] is gives
    assert getattr(sys.modules[function.__module__], function.__name__) is function


def test_a_calibrated_machine_is_found_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    assert cost.machine().name == cost.machine(None).name in cost.names()
    mine = cost.machine("epyc-zen3").model_copy(update={"name": "mine"})
    path = cost.save(mine)
    assert cost.machine() == mine and cost.machine(path.stem) == mine


def test_the_pieces_name_every_tile_once():
    found = tiles_of(
        ((((p.sinks(40) | p.window(100)) & p.causal()).keep(), 0),), 1, _at(500, 500, None), Nest(24, 1, 16, 6, 8)
    )
    tile, key = listed(found.pieces)
    assert len(set(zip(tile.tolist(), key.tolist(), strict=True))) == len(tile) == found.key_tiles.sum()


def test_cores_take_the_next_items_when_they_are_free():
    assert schedule.makespan(np.array([4.0, 3.0, 3.0, 2.0]), 2) == 6.0
    assert schedule.makespan(np.array([4.0, 3.0, 3.0, 2.0]), 2, step=2) == 7.0
    assert schedule.makespan(np.full(5000, 1.0), 3) == pytest.approx(5000 / 3, abs=1)
    assert list(schedule.about(np.array([1, 5, 130, 255, 256]), 2)) == [1, 5, 128, 224, 256]
    assert list(schedule.about(np.array([1, 5, 130, 255, 256]), 100)) == [1, 4, 128, 128, 256]
