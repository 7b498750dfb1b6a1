"""The picture as one HTML page that needs nothing but itself: masks are small embedded images, the rest is text."""

from __future__ import annotations

import base64
import functools
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.pictures.scene import Scene, percent


def html(scene: Scene) -> str:
    """The page."""
    facts = {
        "tiles": [list(raster.tile) for raster in scene.rasters],
        "cells": [list(raster.share.shape) for raster in scene.rasters],
        "queries": scene.queries,
        "length": scene.length,
    }
    return _template().render(
        scene=scene,
        percent=percent,
        images=[alpha_png(raster.share) for raster in scene.rasters],
        allowed=alpha_png(scene.allowed.share),
        facts=json.dumps(facts),
        shape=f"{scene.length} / {max(scene.queries, scene.length // 12)}",
    )


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=folder, undefined=StrictUndefined, autoescape=True).get_template("page.html")


def alpha_png(share: np.ndarray) -> str:
    """A data URL of a black PNG whose opacity is the share (0 to 1, rows by columns): a mask to colour by CSS."""
    rows, columns = share.shape
    pixels = np.zeros((rows, 1 + 2 * columns), dtype=np.uint8)  # each line begins with its filter, 0
    pixels[:, 2::2] = np.where((share > 0) & (share < 0.02), 5, np.rint(share * 255))  # a trace stays visible
    header = struct.pack(">IIBBBBB", columns, rows, 8, 4, 0, 0, 0)  # 8 bits a channel, grey and alpha
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels.tobytes(), 9)), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
