"""Pictures: the grids hold what the dense mask holds, and both files are what they say."""

from __future__ import annotations

import base64
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import composed

from sparsify import patterns as p
from sparsify.errors import InputError
from sparsify.pictures import Scene, draw
from sparsify.pictures.page import alpha_png
from sparsify.pictures.raster import CELLS, raster, raster_of
from sparsify.pictures.scene import joined, percent

MIX = [p.dense(), p.sinks(4) | p.window(100), p.column_stride(4, 16, "head"), p.column_stride(4, 16, "head")]


@settings(max_examples=25)
@given(composed(), st.integers(1, 3), st.integers(1, 280), st.integers(0, 60))
def test_a_raster_is_the_dense_mask_averaged(pattern, heads, q_len, more):
    k_len, head = q_len + more, heads - 1
    found = raster(pattern[0].keep(), head, q_len, k_len)
    mask = pattern[0].mask(heads, q_len, k_len)[head].numpy()
    tall, wide = found.tile
    assert found.exact and max(found.share.shape) <= CELLS
    assert found.kept == pytest.approx(mask.sum(), rel=1e-5, abs=0.01)
    for row in {0, found.share.shape[0] // 2, found.share.shape[0] - 1}:
        for column in {0, found.share.shape[1] // 2, found.share.shape[1] - 1}:
            cell = mask[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            assert found.share[row, column] == pytest.approx(cell.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (p.window(1000) & p.causal(), 2**18 * 1000 - 1000 * 999 / 2),
        (p.sinks(64) & p.causal(), 2**18 * 64 - 64 * 63 / 2),
        (p.column_stride(8, 64, "head") & p.causal(), sum(2**18 - k for k in range(2**18) if (k // 64 + 3) % 8 == 0)),
    ],
)
def test_a_long_sequence_is_estimated_well_and_never_made_whole(pattern, kept):
    found = raster(pattern.keep(), 3, 2**18, 2**18)
    assert found.share.shape == (CELLS, CELLS) and not found.exact
    assert found.kept == pytest.approx(kept, rel=0.02)


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9))
def test_a_raster_of_a_mask_is_that_mask_averaged(q_len, k_len, seed):
    mask = np.random.default_rng(seed).random((q_len, k_len)) < 0.3
    found = raster_of(mask)
    tall, wide = found.tile
    assert found.exact and found.kept == mask.sum() and max(found.share.shape) <= CELLS
    assert found.share[0, 0] == pytest.approx(mask[:tall, :wide].mean(), abs=1e-6)
    row, column = ((size - 1) // step * step for size, step in ((q_len, tall), (k_len, wide)))
    assert found.share[-1, -1] == pytest.approx(mask[row:, column:].mean(), abs=1e-6)


def test_a_pattern_that_chooses_by_data_is_drawn_by_its_masks():
    masks = {p.window(5): np.eye(64, dtype=bool)}
    scene = Scene.of({"a": [p.window(5), p.window(5), p.window(6)]}, 64, causal=False, masks=masks)
    assert [panel.density for panel in scene.rows[0].panels[:2]] == [1 / 64, 1 / 64]
    assert (scene.rasters[scene.rows[0].panels[0].raster].share == np.eye(64)).all()
    assert scene.rows[0].panels[2].density == pytest.approx(p.window(6).density(1, 64, 64))


def test_a_scene_makes_equal_things_one():
    sites = {f"m.{layer}.attn": MIX for layer in range(4)} | {"m.4.attn": [p.dense()] * 32}
    scene = Scene.of(sites, 128, names={"near": MIX[1]})
    assert [(row.title, row.sites, row.heads) for row in scene.rows] == [("m.{0-3}.attn", 4, 4), ("m.4.attn", 1, 32)]
    assert [panel.label for row in scene.rows for panel in row.panels] == ["0", "1", "2", "3", "0-31"]
    assert [(entry.name, entry.heads) for entry in scene.legend] == [("", 4 + 32), ("near", 4), ("", 8)]
    assert scene.legend[0].density == 1 and scene.legend[1].text == "sinks(4) | window(100)"
    share = (MIX[1] & p.causal()).density(1, 128, 128) / p.causal().density(1, 128, 128)
    assert scene.rows[0].panels[1].density == pytest.approx(share, rel=1e-6)
    strides = [panel.raster for panel in scene.rows[0].panels[2:]]
    assert strides[0] != strides[1] and len(scene.rasters) == 4


def test_titles_and_numbers():
    assert joined(["a.0.x", "a.1.x", "a.3.x"]) == "a.{0-1,3}.x" and joined(["a.0.x"]) == "a.0.x"
    assert joined(["a.0.x1", "a.1.x2"]) == "a.0.x1 and 1 more" and joined(["enc", "dec.0", "x"]) == "enc and 2 more"
    assert [percent(v) for v in (1, 0.9996, 0.5, 0.012, 0.00123, 0)] == [
        "100 %",
        "100 %",
        "50.0 %",
        "1.2 %",
        "0.12 %",
        "0 %",
    ]


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = draw({"a<b>": MIX}, 128, tmp_path / "x" / "masks.html", title="a & b").read_text()
    assert "<title>a &amp; b</title>" in page and "a&lt;b&gt;" in page
    links = re.findall(r"""\b(?:src=|href=|url\()["']?([^"')\s>]+)""", page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert page.count('class="mask ') == 4 and "https:" not in page and "http:" not in page
    for text in ('data-head="1"', "column_stride(4, 16", "prefers-color-scheme: dark", "<b>", "pointermove"):
        assert text in page


def test_a_page_of_one_decode_step(tmp_path):
    page = draw({"a": [p.window(5)]}, 100, tmp_path / "masks.html", queries=1, causal=False).read_text()
    assert "the last 1 queries" in page and "5.0 %" in page and "causal mask" not in page


def test_the_small_images_hold_the_shares():
    share = np.array([[0, 1, 0.5], [0.001, 0.25, 1]], dtype=np.float32)
    data = base64.b64decode(alpha_png(share).removeprefix("data:image/png;base64,"))
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    length = struct.unpack(">I", data[33:37])[0]
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + length]), dtype=np.uint8).reshape(2, 7)
    assert lines[:, 2::2].tolist() == [[0, 255, 128], [5, 64, 255]]


def test_the_png_shows_the_colours_of_its_legend(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sparsify.pictures.png.MAX_ROWS", 4)
    monkeypatch.setattr("sparsify.pictures.png.MAX_LEGEND", 3)
    from matplotlib.image import imread

    for sites in ({"a": MIX, "b": MIX[:1] * 40}, {f"a{n}": [p.window(n + 1)] * 2 for n in range(6)}):
        image = imread(draw(sites, 64, tmp_path / "masks.png"))
        pixels = {tuple(pixel) for pixel in (image[::3, ::3, :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
        blue = tuple(int("2f6fed"[i : i + 2], 16) for i in (0, 2, 4))
        assert blue in pixels and (255, 255, 255) in pixels and image.shape[0] < 2_000


def test_what_can_not_be_drawn_is_told(tmp_path, monkeypatch):
    for sites, length, path, message in [
        ({"a": MIX}, 64, "x.pdf", "draw: path: expected a name that ends in .png or .html, found 'x.pdf'"),
        ({"a": MIX}, 0, "x.png", "draw: expected 1 <= queries <= length <= 2**24, found 0 queries, length 0"),
        ({"a": []}, 64, "x.png", "draw: there is nothing to draw: expected sites with at least one head each"),
    ]:
        with pytest.raises(InputError) as caught:
            draw(sites, length, tmp_path / path)
        assert str(caught.value) == message
    (tmp_path / "file").write_text("")
    for ending in ("html", "png"):
        (tmp_path / f"x.{ending}").mkdir()
        with pytest.raises(InputError, match=rf"draw: path: '.*/x.{ending}' can't be written: Is a directory"):
            draw({"a": MIX}, 64, tmp_path / f"x.{ending}")
        with pytest.raises(InputError, match=r"draw: path: the folder '.*/file/y' can't be made: Not a directory"):
            draw({"a": MIX}, 64, tmp_path / "file" / "y" / f"x.{ending}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.html", "x.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r"a PNG needs matplotlib: pip install 'sparsify\[show\]'"):
        draw({"a": MIX}, 64, tmp_path / "x.png")
