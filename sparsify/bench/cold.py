"""Caches that begin empty, so that the time to a first result is what somebody new waits for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._inductor.utils import fresh_cache

from sparsify import env


@contextmanager
def cold_caches(device: str = "cpu") -> Iterator[None]:
    """Inductor's and Triton's caches empty, but for what Inductor prepares once for all that it compiles."""
    with fresh_cache():
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        yield


@contextmanager
def cold_kernels() -> Iterator[None]:
    """The cache of sparsify's own kernels empty, but for what is tuned, and nothing compiled before in memory."""
    torch._dynamo.reset()
    with (
        tempfile.TemporaryDirectory(prefix="sparsify-bench-") as folder,
        mock.patch.dict(os.environ, SPARSIFY_CACHE_DIR=folder, SPARSIFY_TUNED=str(env.tuned() or 0)),
    ):
        yield
