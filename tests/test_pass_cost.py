"""The passes' cost: linear in the number of sites, counted in calls of Python functions, as times would be noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from captures import GROUPED, Recorded

OURS = "/passes/"


def capture(layers: int, attention: str) -> tuple[int, int]:
    """(sites rewritten, calls of functions of the passes) for a Llama with a padded batch."""
    config = transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": layers}, attn_implementation=attention)
    model = transformers.LlamaForCausalLM(config).eval()
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, :3] = 0
    return counted(model, torch.ones(2, 12, dtype=torch.long), attention_mask=padding)


def filled(layers: int) -> Callable[..., torch.Tensor]:
    """Layers by hand that share one mask."""

    def model(x: torch.Tensor, padding: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(12, 12, dtype=torch.bool).triu(1) | padding[:, None, None, :]
        for _ in range(layers):
            x = torch.softmax((x @ x.mT * 0.3).masked_fill(mask, -math.inf), -1) @ torch.nn.functional.linear(x, w)
        return x

    return model


def counted(model: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """(sites rewritten, calls of functions of the passes)."""
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and OURS in frame.f_code.co_filename

    recorded = Recorded()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sys.setprofile(count)
        try:
            return recorded(gm, inputs)
        finally:
            sys.setprofile(None)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return sum(site.open for site in recorded.sites), calls


@pytest.mark.parametrize(("attention", "layers"), [("eager", 2), ("sdpa", 2)])
def test_the_work_grows_with_the_number_of_sites_and_no_faster(attention, layers):
    (few, little), (many, more) = capture(layers, attention), capture(4 * layers, attention)
    assert (few, many) == (layers, 4 * layers)
    assert more <= 4 * little


def test_sites_that_fill_with_one_mask_share_what_is_known_of_it():
    given = torch.ones(2, 4, 12, 8), torch.arange(12).expand(2, 12) < 3, torch.eye(8)
    (few, little), (many, more) = (counted(filled(layers), *given) for layers in (4, 16))
    assert (few, many) == (4, 16)
    assert more <= 4 * little
