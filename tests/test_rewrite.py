"""`sparsify.rewrite`: an exported program in, a module out that exports again."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from captures import model
from torch.export import Dim, export

import sparsify
from sparsify.errors import InputError, RefusedError, SpecError
from sparsify.passes.nodes import op

IDS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.tensor([0, 1, 2])), torch.tensor(0))
Q = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(2))


class Logits(torch.nn.Module):
    def __init__(self, name: str, how: str) -> None:
        super().__init__()
        self.lm = model(name, how)

    def forward(self, ids, mask):
        return {"logits": self.lm(input_ids=ids, attention_mask=mask, use_cache=False).logits}


def ops(module: torch.fx.GraphModule) -> list[str]:
    return [op(node) for node in module.graph.nodes]


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_an_exported_model_exports_again(dynamic):
    made = Logits("llama", "sdpa")
    shapes = {"ids": {1: Dim("n", min=2, max=64)}, "mask": {1: Dim("n", min=2, max=64)}} if dynamic else None
    program = export(made, (IDS, MASK), dynamic_shapes=shapes)
    before = str(program.graph)
    spec = {"version": 1, "sites": [{"match": "lm.model.layers.0.self_attn", "heads": "dense"}]}
    rewritten = sparsify.rewrite(program.module(), spec=spec, target="null", strict=True)
    assert str(program.graph) == before and ops(rewritten).count("sparsify::attention") == 1
    assert not any(tuple(n.meta["val"].shape[-2:]) == (11, 11) for n in rewritten.graph.nodes if _is_square(n))
    file = io.BytesIO()
    torch.export.save(export(rewritten, (IDS, MASK), dynamic_shapes=shapes), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (11, 5) if dynamic else (11,):
        ids, mask = IDS[:, :length], MASK[:, :length]
        wanted = made(ids, mask)["logits"][mask.bool()]
        for run in (rewritten, loaded):
            torch.testing.assert_close(run(ids, mask)["logits"][mask.bool()], wanted, atol=1e-5, rtol=1e-5)
    assert dict(rewritten.named_parameters()).keys() <= dict(program.module().named_parameters()).keys()


def _is_square(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 1


@torch.no_grad()
def test_a_spec_changes_what_is_kept():
    program = export(Logits("llama", "eager"), (IDS, MASK))
    spec = {"version": 1, "sites": [{"match": "lm.*", "heads": {"window": 2}}]}
    found = sparsify.rewrite(program.module(), spec=spec, target="null")(IDS, MASK)["logits"]
    assert (found - program.module()(IDS, MASK)["logits"]).abs().max() > 1e-3
    with pytest.raises(SpecError, match="the rule matches no site"):
        sparsify.rewrite(program.module(), spec={"version": 1, "sites": [{"match": "model.*", "heads": "dense"}]})


class Fused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(24, 3, 16, batch_first=True)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = x + self.layer(x)
        return x


@torch.no_grad()
def test_operators_that_hide_an_attention_are_opened():
    made, x = Fused().eval(), torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(3))
    rewritten = sparsify.rewrite(export(made, (x,)).module(), target="null", strict=True)
    assert "sparsify::attention" in ops(rewritten)
    torch.testing.assert_close(rewritten(x), made(x), atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(export(rewritten, (x,)).module()(x), rewritten(x))


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


@torch.no_grad()
def test_a_plain_graph_with_examples():
    graph = torch.fx.symbolic_trace(attend)
    rewritten = sparsify.rewrite(graph, args=(Q,), target="null")
    torch.testing.assert_close(rewritten(Q), attend(Q))
    assert "sparsify::attention" in ops(rewritten)
    for args, text in ((None, "none were given"), ((Q, Q), "2 were given")):
        with pytest.raises(InputError, match=f"1 inputs have no fake tensors: args must give as many; {text}"):
            sparsify.rewrite(graph, args=args)


def test_what_is_refused_is_said():
    program = export(torch.nn.Identity(), (Q,)).module()
    with pytest.raises(InputError, match="option 'inner' is the backend's"):
        sparsify.rewrite(program, inner="eager")
    with pytest.raises(InputError) as caught:
        sparsify.rewrite(program, qqqq=1)
    assert str(caught.value) == "unknown option 'qqqq'; allowed: crossover, learned, spec, strict, target"
    with pytest.raises(InputError, match=r"expected an fx.GraphModule, such as ep.module\(\), found Identity"):
        sparsify.rewrite(torch.nn.Identity())

    class Weights(torch.nn.Module):
        def forward(self, q):
            weights = (q @ q.mT).softmax(-1)
            return weights @ q, weights

    with pytest.raises(RefusedError, match="the attention weights are also used"):
        sparsify.rewrite(export(Weights(), (Q,)).module(), strict=True)
