"""What surrounds a compiled model: autocast, inference mode, quantised linears, other compiled regions."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from captures import Recorded, compiled, model

IDS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))


def logits(run):
    return run(IDS, use_cache=False).logits


def half():
    return torch.autocast("cpu", torch.bfloat16)


AROUND = [(half, torch.no_grad), (torch.inference_mode,), (half, torch.inference_mode), (torch.no_grad, half)]
WAYS = [("sdpa", AROUND[0]), ("eager", AROUND[1]), ("eager", AROUND[2]), ("sdpa", AROUND[3])]
OTHER_WAYS = [
    pytest.param(how, around, marks=pytest.mark.slow)
    for how, around in itertools.product(("sdpa", "eager"), AROUND)
    if (how, around) not in WAYS
]


@pytest.mark.parametrize(("how", "around"), WAYS + OTHER_WAYS)
def test_autocast_and_inference_mode(how, around):
    made = model("llama", how)
    run, recorded = compiled(made)
    with contextlib.ExitStack() as stack:
        for enter in around:
            stack.enter_context(enter())
        near = 2e-2 if half in around else 1e-5
        torch.testing.assert_close(logits(run), logits(made), atol=near, rtol=near)
    assert [str(site.refusal) for site in recorded.sites] == ["None"]
    assert recorded.sites[0].mask_text == "causal"


class Halves(torch.nn.Module):
    """A region of its own in the middle of a model, and one that turns it off again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            q = self.mix(x)
            x = F.scaled_dot_product_attention(q, q, q, is_causal=True) + x
            with torch.autocast("cpu", enabled=False):
                x = (x.float() @ x.float().mT).softmax(-1) @ x.float()
        return x


@torch.no_grad()
def test_autocast_inside_the_model():
    made, x = Halves(), torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(2))
    run, recorded = compiled(made)
    torch.testing.assert_close(run(x), made(x), atol=2e-2, rtol=2e-2)
    assert [str(site.q.meta["val"].dtype) for site in recorded.sites if site.open] == [
        "torch.bfloat16",
        "torch.float32",
    ]


@torch.no_grad()
def test_quantised_linears_around_it():
    quantization = pytest.importorskip("torchao.quantization")
    made = model("llama", "sdpa")
    quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    run, recorded = compiled(made)
    torch.testing.assert_close(logits(run), logits(made), atol=1e-4, rtol=1e-4)
    assert [str(site.refusal) for site in recorded.sites] == ["None"] and not recorded.captures[0].notes


@torch.no_grad()
def test_a_part_that_is_compiled_by_itself():
    made, wanted = model("llama", "sdpa"), logits(model("llama", "sdpa"))
    layer = made.model.layers[0]
    layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    run, recorded = compiled(made)  # in one graph
    torch.testing.assert_close(logits(run), wanted, atol=1e-5, rtol=1e-5)
    assert [str(site.refusal) for site in recorded.sites] == ["None"]
    torch._dynamo.reset()
    recorded = Recorded()
    made = model("llama", "sdpa")
    made.model.layers[0] = torch.compile(made.model.layers[0], backend=recorded)  # a part of a model that is not
    torch.testing.assert_close(logits(made), wanted, atol=1e-5, rtol=1e-5)
    assert [str(site.refusal) for site in recorded.sites] == ["None"]


@torch.no_grad()
def test_weights_that_are_tied():
    made = model("gpt2", "sdpa")
    assert made.lm_head.weight is made.transformer.wte.weight
    run, recorded = compiled(made)
    torch.testing.assert_close(logits(run), logits(made), atol=1e-5, rtol=1e-5)
    assert [str(site.refusal) for site in recorded.sites] == ["None"]
