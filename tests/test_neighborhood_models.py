"""Neighborhoods through the whole compiler: specs on models and `sparsify.attention`, against masks in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import sparsify
from sparsify import patterns as p
from sparsify.errors import InputError, RefusedError
from sparsify.passes.choose_target import program_of
from sparsify.patterns.layouts import best

near = p.neighborhood


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layouts where they save nothing, too: grids on which they do are larger than tests can be."""
    monkeypatch.setattr(best, "WORTH", 1e9)
    best.best_layout.cache_clear()
    yield
    best.best_layout.cache_clear()


class Attention(torch.nn.Module):
    """Self-attention of `heads` heads over (B, N, width), with a padding mask and the model's own relative bias."""

    def __init__(self, heads: int = 4, width: int = 32, tokens: int = 0) -> None:
        super().__init__()
        self.heads, self.qkv = heads, torch.nn.Linear(width, 3 * width)
        self.relative = torch.nn.Parameter(torch.randn(heads, 2 * tokens)) if tokens else None

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def bias(self, n: int) -> torch.Tensor:
        at = torch.arange(n)
        return self.relative[:, at[None] - at[:, None] + n]

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.split(x)
        mask = None if kept is None else kept[:, None, None]
        if self.relative is not None:
            mask = self.bias(x.shape[1])[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    def __init__(self, tokens: int = 0) -> None:
        super().__init__()
        self.attn = Attention(tokens=tokens)

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        return self.attn(x, kept)


def expected(model: Model, x: torch.Tensor, patterns: list[p.Pattern], kept: torch.Tensor | None) -> torch.Tensor:
    """The model in float64 with dense masks; rows that keep nothing give 0."""
    q, k, v = (part.double() for part in model.attn.split(x))
    n = x.shape[1]
    mask = torch.stack([pattern.mask(4, n, n)[head] for head, pattern in enumerate(patterns)])[None]
    if kept is not None:
        mask = mask & kept[:, None, None]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if model.attn.relative is not None:
        scores = scores + model.attn.bias(n).double()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ v).transpose(1, 2).flatten(2)


def spec(heads: object) -> dict:
    return {"version": 1, "sites": [{"match": "*attn", "heads": heads}]}


CASES = {
    "1-D, dilated": (300, {"neighborhood": {"shape": 300, "window": 11, "dilation": 4}}),
    "2-D": (168, {"neighborhood": {"shape": [12, 14], "window": [3, 5]}}),
    "2-D, stride and dilation, odd": (437, {"neighborhood": {"shape": [19, 23], "window": [4, 7], "stride": [2, 1],
                                                             "dilation": [3, 2]}}),
    "3-D, causal in time": (560, {"neighborhood": {"shape": [4, 10, 14], "window": [2, 5, 5],
                                                   "causal": [True, False, False]}}),
    "3-D, block-sparse": (576, {"neighborhood": {"shape": [4, 12, 12], "window": [2, 4, 4], "stride": [2, 4, 4]}}),
    "wrapping": (400, {"neighborhood": {"shape": [20, 20], "window": 7, "border": "wrap"}}),
    "text before": (425, {"any": [{"neighborhood": {"shape": [20, 20], "window": 5, "start": 25}},
                                  {"global_tokens": "0-24"}]}),
    "text behind": (410, {"any": [{"neighborhood": {"shape": [20, 20], "window": 5}},
                                  {"global_tokens": "400-409"}]}),
    "Swin's windows": (196, {"swin": {"shape": [14, 14], "shift": 3}}),
    "mixed heads": (480, {"0": {"neighborhood": {"shape": [20, 24], "window": 5}}, "1": "dense",
                          "2": {"window": {"size": 40, "ahead": 20}},
                          "3": {"all": [{"neighborhood": {"shape": [20, 24], "window": 9}}, "causal"]}}),
}  # fmt: skip
SLOW = ("text behind", "wrapping")  # a build and a layout more each
INTERPRETED = ("1-D, dilated", "2-D", "Swin's windows")  # the others are run by C++, which takes a build each


def compiled(model: torch.nn.Module, heads: object, target: str) -> torch.nn.Module:
    torch._dynamo.reset()
    options = {"spec": spec(heads), "target": target, "inner": "eager", "strict": True}
    return torch.compile(model, backend="sparsify", fullgraph=True, options=options)


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES], ids=str
)
def test_specs_on_a_model(case: str, laid_out: None) -> None:
    (n, heads), target = CASES[case], "null" if case in INTERPRETED else "cpp"
    torch.manual_seed(0)
    batch = 2 if target == "cpp" else 1
    model, x, kept = Model(), torch.randn(batch, n, 32), torch.rand(batch, n) > 0.2
    (site,) = sparsify.explain(model, x, kept, spec=spec(heads)).sites
    assert site.layout.startswith("boxes of")
    patterns = list(site.patterns)
    found = compiled(model, heads, target)(x, kept)
    torch.testing.assert_close(found.double(), expected(model, x, patterns, kept), atol=3e-6, rtol=3e-6)


@torch.no_grad()
def test_the_models_own_bias_is_laid_out_too(laid_out: None) -> None:
    torch.manual_seed(0)
    heads, model, x = {"neighborhood": {"shape": [20, 24], "window": 5}}, Model(tokens=480), torch.randn(1, 480, 32)
    report = sparsify.explain(model, x, spec=spec(heads))
    assert report.sites[0].bias and report.sites[0].layout
    found = compiled(model, heads, "cpp")(x)
    patterns = [near([20, 24], 5)] * 4
    torch.testing.assert_close(found.double(), expected(model, x, patterns, None), atol=3e-6, rtol=3e-6)


@torch.no_grad()
def test_explain_tells_the_layout() -> None:
    model, x = Model(), torch.zeros(1, 1600, 32)
    report = sparsify.explain(model, x, spec=spec({"neighborhood": {"shape": [40, 40], "window": 8, "stride": 8}}))
    (site,) = report.sites
    assert site.layout == "boxes of 8x8: 1600 slots (0 empty), 4.0% of the pairs executed, 20.0% without"
    assert "layout    boxes of 8x8" in str(report) and report.to_dict()["sites"][0]["layout"] == site.layout
    assert sparsify.explain(model, x, spec=spec({"window": 5})).sites[0].layout == ""


@torch.no_grad()
def test_a_dynamic_length_is_fixed_by_the_grid(laid_out: None) -> None:
    model, heads = Model(), {"neighborhood": {"shape": [20, 24], "window": 5}}
    report = sparsify.explain(torch.compile(model, dynamic=True), torch.zeros(1, 480, 32), spec=spec(heads))
    assert report.sites[0].rewritten and report.sites[0].layout


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ({"neighborhood": {"shape": [20, 24], "window": 5}},
         "neighborhood.shape: 20 x 24 is 480 tokens, but there are 500 keys; "
         'give the others to global_tokens: "480-499"'),
        ({"any": [{"neighborhood": {"shape": [20, 24], "window": 5, "start": 40}}, {"global_tokens": "0-39"}]},
         "neighborhood.shape: 20 x 24 is 480 tokens from position 40, but there are 500 keys"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_grid_that_does_not_fit_is_refused(heads: object, reason: str) -> None:
    model, x = Model(), torch.zeros(1, 500, 32)
    report = sparsify.explain(model, x, spec=spec(heads))
    assert report.sites[0].refusal.reason == reason
    with pytest.raises(RefusedError) as caught:
        compiled(model, heads, "null")(x)
    assert reason in str(caught.value)
    pattern = near([20, 24], 5)
    q = torch.zeros(1, 2, 500, 8)
    with pytest.raises(InputError, match=r"attention: pattern: neighborhood\.shape: 20 x 24 is 480 tokens, but there"):
        sparsify.attention(q, q, q, pattern)


def drawn(n: int, nq: int | None = None, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, 16, generator=g) for heads, length in ((4, nq or n), (2, n), (2, n))]


def truth(q, k, v, mask: torch.Tensor) -> torch.Tensor:
    k, v = (t.double().repeat_interleave(2, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask)


def test_the_function_form_lays_out_eagerly_and_compiled(monkeypatch: pytest.MonkeyPatch, laid_out: None) -> None:
    monkeypatch.setenv("SPARSIFY_TARGET", "cpp")
    torch._dynamo.reset()
    q, k, v = drawn(480)
    heads = [near([20, 24], 5), near([20, 24], 7, dilation=2), p.causal(), near([20, 24], 9) & p.causal()]
    mask = torch.stack([pattern.mask(4, 480, 480)[h] for h, pattern in enumerate(heads)])
    found = sparsify.attention(q, k, v, heads)
    torch.testing.assert_close(found.double(), truth(q, k, v, mask), atol=2e-6, rtol=2e-6)
    made = torch.compile(lambda q, k, v: sparsify.attention(q, k, v, heads), fullgraph=True, backend="eager")
    assert torch.equal(made(q, k, v), found)


def test_chunks_and_decoding_go_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the queries has no boxes of its own: the rule over tokens runs."""
    monkeypatch.setenv("SPARSIFY_TARGET", "null")
    pattern = near([20, 24], 5)
    mask = pattern.mask(4, 480, 480)
    for nq, offset in ((9, 40), (1, 479), (9, None)):
        q, k, v = drawn(480, nq)
        first = 480 - nq if offset is None else offset
        found = sparsify.attention(q, k, v, pattern, q_offset=offset)
        torch.testing.assert_close(found.double(), truth(q, k, v, mask[:, first : first + nq]), atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_a_program_with_a_layout_is_text(laid_out: None) -> None:
    from captures import Recorded

    recorded = Recorded({"spec": spec({"neighborhood": {"shape": [10, 12], "window": 5}})})
    torch._dynamo.reset()
    torch.compile(Model(), backend=recorded)(torch.zeros(1, 120, 32))
    (site,) = recorded.sites
    program = program_of(site)
    assert program.queries is not None and program.keys is not None
    assert type(program).parse(program.text()) == program


def _cogvideo(shape: tuple[int, int, int]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int]:
    """(model, inputs, how many text tokens are in front)."""
    import diffusers

    f, h, w = shape
    made = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, sample_width=2 * w, sample_height=2 * h, sample_frames=4 * f - 3, max_text_seq_length=7,
    )  # fmt: skip
    video, text = torch.randn(1, f, 4, 2 * h, 2 * w), torch.randn(1, 7, 8)
    return made, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([3])}, 7


def _wan(shape: tuple[int, int, int]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int]:
    import diffusers

    f, h, w = shape
    made = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    video, text = torch.randn(1, 4, f, 2 * h, 2 * w), torch.randn(1, 7, 8)
    return made, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([3])}, 0


def _vit(shape: tuple[int, int]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int]:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=4 * shape[0], patch_size=4)
    made = transformers.ViTModel(config, add_pooling_layer=False)
    return made, {"pixel_values": torch.randn(1, 3, 4 * shape[0], 4 * shape[1])}, 1


MODELS = {
    "CogVideoX": (_cogvideo, (4, 12, 16), {"window": [2, 5, 7]}),
    "Wan": (_wan, (4, 12, 16), {"window": [2, 4, 4], "stride": [2, 4, 4]}),
    "ViT": (_vit, (32, 32), {"window": 7, "dilation": 2}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("CogVideoX", marks=pytest.mark.slow), "Wan", "ViT"])
def test_models_of_others(name: str, monkeypatch: pytest.MonkeyPatch, laid_out: None) -> None:
    """A model with a spec is the model whose SDPA was given the dense mask."""
    build, shape, given = MODELS[name]
    torch.manual_seed(0)
    made, inputs, text = build(shape)
    made.eval()
    heads: dict = {"neighborhood": {"shape": list(shape), **given, "start": text}}
    if text:
        heads = {"any": [heads, {"global_tokens": f"0-{text - 1}" if text > 1 else 0}]}
    match = {"version": 1, "sites": [{"match": "*", "kind": "self", "heads": heads}]}
    report = sparsify.explain(made, **inputs, spec=match)
    near_sites = [site for site in report.sites if site.kind == "self"]
    assert len(near_sites) == 2 and all(site.layout.startswith("boxes of") for site in near_sites)
    pattern = near_sites[0].patterns[0]
    torch._dynamo.reset()
    fast = torch.compile(made, backend="sparsify", options={"spec": match, "strict": True, "inner": "eager"})
    found = fast(**inputs)[0]
    dense, n = F.scaled_dot_product_attention, near_sites[0].k_len
    mask = pattern.mask(1, n, n)

    def masked(query, key, value, attn_mask=None, **rest):  # type: ignore[no-untyped-def]
        own = query.shape[2] == key.shape[2] == n
        return dense(query, key, value, attn_mask=mask if own else attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    torch.testing.assert_close(found, made(**inputs)[0], atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(F, "scaled_dot_product_attention", dense)
    assert not torch.allclose(found, made(**inputs)[0], atol=1e-3), "the mask changes nothing"
