"""The public names stay what they are, whatever is imported in whatever order."""

from __future__ import annotations

import subprocess
import sys

import pytest

ORDERS = [
    "import sparsify.bench.peers, sparsify.cli, sparsify.backend",
    "import sparsify; sparsify.Report; sparsify.explain; sparsify.attention",
    "from sparsify import Report, Spec, load_spec, SpecError, explain, attention, patterns",
]


@pytest.mark.parametrize("order", ORDERS)
def test_public_functions_are_functions(order):
    check = "assert all(callable(getattr(sparsify, name)) for name in ('attention', 'explain', 'Spec'))"
    code = f"{order}\nimport sparsify\n{check}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    import sparsify

    assert {name for name in sparsify.__all__ if getattr(sparsify, name) is None} == set()
    with pytest.raises(AttributeError, match="has no attribute 'attenton'"):
        _ = sparsify.attenton
