"""How to add a pattern in twenty lines, use it, check it and draw it. Run me: python examples/add_a_pattern.py

The pattern is a pyramid: near keys are all kept, and further away the keys thin out, every 2nd, 4th, 8th, ... one.
"""

from dataclasses import dataclass

import torch

import sparsify
from sparsify.expr import Pred, disjunction, eq
from sparsify.patterns import Pattern
from sparsify.patterns.pattern import K, Q


# 1. The pattern: a frozen dataclass with one method, which says what is kept in terms of Q and K (and H, N).
@dataclass(frozen=True)
class Pyramid(Pattern):
    """Keys within reach * 2**i of the query are kept where k is a multiple of 2**i, for each level i."""

    reach: int = 32
    levels: int = 6

    def keep(self) -> Pred:
        steps = [2**level for level in range(self.levels)]
        near = [(Q - K >= 0) & (self.reach * step > Q - K) & eq(K % step, 0) for step in steps]
        return disjunction(near)


def main() -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(reach=16)

    # 2. Use it, alone or composed: it is compiled into a kernel like any other pattern.
    q, k, v = torch.randn(3, 1, 4, 200, 64)  # each (batch, heads, length, head size)
    mixed = [pyramid, pyramid & ~sparsify.patterns.sinks(8), pyramid | sparsify.patterns.sinks(4), Pyramid(8)]
    out = sparsify.attention(q, k, v, mixed)

    # 3. Check it: .mask() is the definition, evaluated everywhere. PyTorch's attention under that mask must agree.
    mask = torch.cat([pattern.mask(1, 200, 200) for pattern in mixed])
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    error = (out - dense).nan_to_num().abs().max().item()  # a query that keeps no key gives 0 here and nan there
    print(f"{pyramid} keeps {pyramid.density(1, 1000, 1000):.1%} of 1000 x 1000; largest error {error:.1e}")
    assert error < 1e-5

    # 4. Name it in a spec for a whole model: in Python, or beside a file that says `heads: pyramid`.
    spec = sparsify.Spec(
        patterns={"pyramid": pyramid},
        sites=[{"match": "model.layers.*", "heads": {0: "dense", "rest": {"any": ["pyramid", {"sinks": 4}]}}}],
    )
    # torch.compile(model, backend="sparsify", options={"spec": spec})
    # sparsify.load_spec("spec.yaml", patterns={"pyramid": pyramid})

    # 5. See it.
    from sparsify.pictures import draw

    heads = spec.rules[0].patterns(sparsify.spec.SiteInfo("model.layers.0.self_attn", 0, "self", True, 4, 4))
    print("drawn to", draw({"model.layers.0.self_attn": heads}, 512, "out/pyramid.html", names=spec.patterns))

    # To give it to everybody: a file in patterns/ like its neighbours, and its constructor's name in PATTERNS there.
    # Specs, their schema and their errors know it then, with the constructor's parameters as its fields.


if __name__ == "__main__":
    main()
