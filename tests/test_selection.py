"""`choose` against the pipeline in plain numpy, and what must hold of any choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selection_cases import CLEAR, Inputs, inputs, line_selectors, unit_selectors

from sparsify.errors import InputError
from sparsify.patterns.selector import Budget, Force, Heads, Lines, Score, Selector, Unit


@settings(max_examples=400)
@given(data=st.data())
def test_kept_sets_are_the_reference_s(data):
    selector = data.draw(unit_selectors())
    case = data.draw(inputs(selector))
    expected, gap = case.reference(selector)
    assume(gap > CLEAR)
    assert case.sets(selector) == expected


@settings(max_examples=60)
@given(data=st.data())
def test_lines_are_the_reference_s(data):
    selector = data.draw(line_selectors())
    case = data.draw(inputs(selector))
    expected, gap = case.reference(selector)
    assume(gap > CLEAR)
    assert case.sets(selector) == expected
