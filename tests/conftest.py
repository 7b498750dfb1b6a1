"""What every test shares: repeatable draws, one thread count, and a kernel cache of its own."""

from __future__ import annotations

import gc
import os
import tempfile

# Before torch or sparsify look at them: no model hub, and a cache that a user's own kernels never meet. The cache is
# shared by all runs on the machine, so that a second run of the tests builds nothing twice.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SPARSIFY_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"sparsify-tests-{os.getuid()}"))
# Tests are about what is rewritten; at their tiny sizes dense attention would win nearly everywhere.
os.environ.setdefault("SPARSIFY_CROSSOVER", "0")
# Tests run in a process a core: a thread that waits for others must not keep its core from another process, which
# takes a third of all CPU time where threads spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A pass that fails is a failing test.
os.environ.setdefault("SPARSIFY_NET", "0")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="take what is found as the expected outputs in tests/golden")


def pytest_collection_finish() -> None:
    """What the libraries made outlives every test: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--accept")
