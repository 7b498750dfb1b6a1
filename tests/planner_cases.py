"""Small things for the planner's tests: a causal model of bytes, one to both sides, and what they read."""

import torch
from torch import nn

from sparsify.planner.candidates import ENDS
from sparsify.planner.objective import Tokens
from sparsify.planner.plan import Candidate
from sparsify.planner.rig import set_up
from sparsify.planner.samples import Sample

CANDIDATES = (
    Candidate("dense", "dense"),
    Candidate("near", {"sinks": 2, "window": 12}),
    Candidate("ends", ENDS),
    Candidate("best", {"any": [{"sinks": 1}, {"topk": {"keep": 2, "unit": 8, "queries": 8, "scope": "head"}}]}),
)


class Attend(nn.Module):
    """Four query heads of size 8 over `kv` key heads."""

    def __init__(self, causal, kv=2):
        super().__init__()
        self.causal, self.kv = causal, kv
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 8 * kv), nn.Linear(32, 8 * kv)

    def forward(self, x):
        q, k, v = (made(x).unflatten(-1, (-1, 8)).transpose(1, 2) for made in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """Two layers over 256 bytes; gives logits (B, N, 256)."""

    def __init__(self, causal=True, kv=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, 32), nn.Embedding(128, 32)
        self.layers = nn.ModuleList(Attend(causal, kv) for _ in range(2))
        self.head = nn.Linear(32, 256)

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def tiny(causal=True, kv=2):
    torch.manual_seed(0)
    model = Tiny(causal, kv).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # so that heads look somewhere
    return model


def tokens(length=48, rows=1, seed=0):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def rig(causal=True, length=48, rows=1, candidates=CANDIDATES, kv=2):
    sample = Sample.of_tokens(tokens(length, rows))
    return set_up(tiny(causal, kv), sample, candidates, Tokens(causal), "tiny"), sample
