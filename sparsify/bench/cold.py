"""Caches that begin empty, so that the time to a first result is what somebody new waits for."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any
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


def compiled_alone(model: torch.nn.Module, **how: Any) -> Any:
    """The model compiled, on a copy whose compiled code no other looks at; the weights are shared. how: as
    `torch.compile` takes it."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    alone = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    return torch.compile(copy.deepcopy(model, weights), **how, **alone)


def first_call(run: Callable[[], torch.Tensor], device: str = "cpu") -> tuple[torch.Tensor, float]:
    """What a run gives the first time, and the seconds that it takes. Its caches are its own: most kernels of a model
    are the same for all backends, and the first of these would pay for them."""
    with cold_caches(device):
        start = time.perf_counter()
        out = run()
        return out, time.perf_counter() - start
