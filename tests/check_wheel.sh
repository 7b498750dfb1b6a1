#!/usr/bin/env bash
# Builds the wheel and uses it from outside the checkout: catches a package or a template missing from it.
# Usage: tests/check_wheel.sh PYTHON (a python that has sparsify's dependencies)
set -euo pipefail
python=$(realpath --no-symlinks "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/sparsify-*.whl
cd "$work"
PYTHONPATH="$work/site" "$python" - <<'PY'
import pathlib, sys

import torch

import sparsify
import sparsify.bench.command
import sparsify.cli
import sparsify.pictures.page
import sparsify.spec
from sparsify.codegen import target
from sparsify.patterns import causal, window
from sparsify.program import Program

site = pathlib.Path(sparsify.__file__).parent.parent
assert site.name == "site", f"imported {sparsify.__file__}, not the wheel"
from importlib.metadata import distribution
found = [e.name for e in distribution("sparsify").entry_points if e.group == "torch_dynamo_backends"]
assert found == ["sparsify"], found
q = torch.randn(1, 2, 40, 16)
out = sparsify.attention(q, q, q, window(8))
dense = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=window(8).mask(2, 40, 40))
assert torch.allclose(out, dense, atol=1e-5)
compiled = torch.compile(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), backend="sparsify")
assert torch.allclose(compiled(q), sparsify.attention(q, q, q, causal()), atol=1e-5)
for name in ("cpp", "null", "triton"):  # each prints from templates that the wheel must hold
    assert target(name).source(Program.of([causal().keep()], target=name), torch.float32, 16, 16)
print("wheel: imports, compiles and runs from", site.name)
PY
