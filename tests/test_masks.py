"""Masks raised to closed forms: every one is compared with the real tensor, element by element."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from check_raised import check_raised
from hypothesis import given, settings
from hypothesis import strategies as st
from retrace import Traced, compile_and_trace, trace

from sparsify.expr import TRUE
from sparsify.passes.masks.describe import describe, load_names
from sparsify.passes.masks.describe_bias import describe_bias
from sparsify.passes.masks.raise_mask import RaisedMask, load_tensors, raise_mask, raise_masks
from sparsify.text import parse_expr, parse_pred

MIN, INF = torch.finfo(torch.float32).min, float("inf")
Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[2])[:, None]


def columns(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[3])[None, :]


def later(x: torch.Tensor) -> torch.Tensor:
    return columns(x) > rows(x)


def square(x: torch.Tensor, value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((x.shape[2], x.shape[3]), value, dtype=dtype)


def inputs(batch: int, heads: int, q_len: int, k_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and a padding mask of 0 and 1 (int64), not all of one kind."""
    generator = torch.Generator().manual_seed(q_len * 31 + k_len)
    padding = torch.randint(0, 2, (batch, k_len), generator=generator)
    return torch.randn(batch, heads, q_len, k_len, generator=generator), padding


def raised(mask: Mask, sizes: tuple[int, int, int, int], dynamic: bool) -> RaisedMask:
    """Traced at `sizes` and checked there; a symbolic graph is checked at other sizes as well."""
    found = trace(mask, inputs(*sizes), dynamic)
    result = check(found, sizes)
    if dynamic and result:
        check(found, (sizes[0] + 1, sizes[1], sizes[2] + 3, sizes[3] + 3))
    return result


def check(traced: Traced, sizes: tuple[int, int, int, int]) -> RaisedMask:
    first, *_, last = traced.gm.graph.nodes
    return check_raised(traced.gm, last.args[0], inputs(*sizes), tuple(first.meta["val"].shape), sizes)


def written_in_place(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(x.shape[2], x.shape[3], dtype=torch.bool)
    mask[:, :2] = True
    return mask


CLOSED: dict[str, tuple[Mask, str]] = {
    "tril": (lambda x, p: square(x).tril().bool(), "causal"),
    "tril of bool": (lambda x, p: torch.tril(square(x, 1, torch.bool)), "causal"),
    "triu -inf": (lambda x, p: torch.triu(square(x, -INF), diagonal=1), "causal"),
    "triu * -1e9": (lambda x, p: (1 - square(x).tril()) * -1e9, "causal"),
    "triu * min": (lambda x, p: torch.triu(square(x), 1) * MIN, "causal"),
    "triu in place": (lambda x, p: square(x).triu_(1).bool().logical_not_(), "causal"),
    "half min": (lambda x, p: square(x, torch.finfo(torch.float16).min, torch.float16).triu(1), "causal"),
    "comparison": (lambda x, p: columns(x) <= rows(x), "causal"),
    "not later": (lambda x, p: ~later(x), "causal"),
    "where": (lambda x, p: torch.where(later(x), torch.tensor(MIN), torch.tensor(0.0)), "causal"),
    "where of ints": (lambda x, p: torch.where(later(x), 0, 1) > 0, "causal"),
    "masked_fill": (lambda x, p: square(x, 0.0).masked_fill(later(x), -INF), "causal"),
    "masked_fill_": (lambda x, p: square(x, 0.0).masked_fill_(later(x), -INF), "causal"),
    "uint8": (lambda x, p: square(x, 1, torch.uint8).tril().bool(), "causal"),
    "meshgrid": (lambda x, p: operator.ge(*torch.meshgrid(rows(x)[:, 0], columns(x)[0], indexing="ij")), "causal"),
    "buffer cut": (lambda x, p: torch.ones(1, 1, 64, 64).tril()[:, :, : x.shape[2], : x.shape[3]].bool(), "causal"),
    "flat view": (
        lambda x, p: torch.arange(x.shape[2] * x.shape[3]).view(x.shape[2], x.shape[3]) % x.shape[3] <= rows(x),
        "causal",
    ),
    "window": (lambda x, p: ~later(x) & (columns(x) > rows(x) - 4), "window(4)"),
    "window of two triangles": (lambda x, p: square(x).tril().triu(-3).bool(), "window(4)"),
    "both sides": (lambda x, p: (rows(x) - columns(x)).abs() < 3, "window(3, 2)"),
    "far keys only": (lambda x, p: rows(x) - columns(x) >= 2, "k <= q - 2"),
    "prefix": (lambda x, p: (columns(x) < 3) | ~later(x), "causal | (k < 3)"),
    "chunks": (lambda x, p: rows(x) // 3 == columns(x) // 3, "same_block(3)"),
    "chunks by repeat": (
        lambda x, p: rows(x) // 3 == torch.arange(x.shape[3]).repeat_interleave(3)[: x.shape[3]],
        "same_block(3)",
    ),
    "dilated": (lambda x, p: (rows(x) - columns(x)) % 3 == 0, "dilated(3)"),
    "padding": (lambda x, p: p[:, None, None, :].bool(), "p_1[b, k]"),
    "padding is zero": (lambda x, p: ~(p == 0)[:, None, None, :], "~(p_1 == 0)[b, k]"),
    "padding numbers": (lambda x, p: (1.0 - p[:, None, None, :]) * MIN, "p_1[b, k]"),
    "padding as bool": (lambda x, p: (1.0 - p.bool()[:, None, None, :].to(x.dtype)) * MIN, "p_1[b, k]"),
    "padding expanded": (
        lambda x, p: (1.0 - p[:, None, None].expand(-1, 1, x.shape[2], -1)).bool().to(x.dtype) * MIN,
        "p_1[b, k] == 1",
    ),
    "sum of two": (
        lambda x, p: square(x, -INF).triu(1) + (1.0 - p[:, None, None].float()) * MIN,
        "causal & p_1[b, k]",
    ),
    "smaller of two": (
        lambda x, p: torch.minimum(square(x, -INF).triu(1), (1.0 - p[:, None, None].float()) * MIN),
        "causal & p_1[b, k]",
    ),
    "gathered padding": (
        lambda x, p: ~later(x) & p.bool()[torch.arange(x.shape[0])[:, None, None, None], columns(x)],
        "causal & p_1[b, k]",
    ),
    "documents": (
        lambda x, p: (p.cumsum(-1)[:, None, None, :] == p.cumsum(-1)[:, None, : x.shape[2], None]) & ~later(x),
        "causal & (cumsum(p_1)[b, q] == cumsum(p_1)[b, k])",
    ),
    "floats and back": (
        lambda x, p: columns(x) <= p.cumsum(-1).float().long()[:, None, : x.shape[2], None],
        "k <= cumsum(p_1)[b, q]",
    ),
    "prefix of ones joined": (
        lambda x, p: torch.cat([torch.ones(x.shape[2], 2), torch.zeros(x.shape[2], x.shape[3] - 2)], -1).bool(),
        "k < 2",
    ),
    "padded by ones": (
        lambda x, p: torch.nn.functional.pad(square(x).tril()[:, 2:], (2, 0), value=1.0).bool(),
        "causal | (k < 2)",
    ),
    "rolled": (lambda x, p: p.roll(1, -1)[:, None, None].bool(), "roll(p_1)[b, k]"),
    "per head": (
        lambda x, p: (rows(x) - columns(x) <= torch.arange(x.shape[1])[:, None, None]) & ~later(x),
        "causal & (q <= h + k)",
    ),
    "lengths": (lambda x, p: columns(x) < p.sum(-1)[:, None, None, None], "k < sum(p_1)[b]"),
    "stacked": (lambda x, p: torch.stack([later(x), ~later(x)])[1], "causal"),
    "all ones": (lambda x, p: square(x, 1, torch.bool), "all"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_form(name: str, dynamic: bool) -> None:
    mask, text = CLOSED[name]
    for sizes in ((2, 3, 7, 7), (3, 2, 5, 9)):
        found = raised(mask, sizes, dynamic)
        assert isinstance(found, RaisedMask), found
        assert describe(found.keep, load_names(found.loads)) == text
        assert found.bias == ()


OPEN: dict[str, tuple[Mask, str, str]] = {
    "random": (lambda x, p: torch.rand(x.shape[2], x.shape[3]) > 2, "(rand > 2)[q, k]", ""),
    "scores": (lambda x, p: x > 0, "(x_1 > 0)[b, h, q, k]", ""),
    "top scores": (lambda x, p: x >= x.topk(2, -1).values[..., -1:], "ge[b, h, q, k]", ""),
    "beside a closed form": (lambda x, p: ~later(x) & (x[:1, :1] > 0), "causal & ((x_1 > 0)[q, k])", ""),
    "counted": (lambda x, p: (~later(x)).long().cumsum(-1) < 3, "cumsum(bitwise_not(gt))[q, k] < 3", ""),
    "bias": (lambda x, p: x * 0.5, "all", "0.5 * x_1[b, h, q, k]"),
    "one of five dimensions": (lambda x, p: x[None].cumsum(-1)[0], "all", "select(cumsum(x_1))[b, h, q, k]"),
    "beside a bias": (lambda x, p: square(x, -INF).triu(1) + x[:1], "causal", "x_1[h, q, k]"),
    "bias beside it": (lambda x, p: x[:1] + (square(x, MIN).triu(1)), "causal", "x_1[h, q, k]"),
    "where of a bias": (lambda x, p: torch.where(later(x), MIN, x[:1]), "causal", "x_1[h, q, k]"),
    "bias filled": (lambda x, p: x[:1].masked_fill(later(x), MIN), "causal", "x_1[h, q, k]"),
    "distance as a bias": (lambda x, p: (columns(x) - rows(x)) * 0.5, "all", "0.5 * (k - q)"),
    "two levels": (lambda x, p: torch.where(later(x), -1.0, 0.0), "all", "-1 where q - k < 0"),
    "0 * -inf": (lambda x, p: (1 - square(x).tril()) * -INF, "all", "mul[k - q + SHIFT]"),
    "document numbers as floats": (
        lambda x, p: p.cumsum(-1).float()[:, None, None, :] == p.cumsum(-1).float()[:, None, : x.shape[2], None],
        "cumsum(p_1)[b, q] == cumsum(p_1)[b, k]",
        "",
    ),
    "distance of document numbers": (
        lambda x, p: (p.cumsum(-1)[:, None, None] - p.cumsum(-1)[:, None, : x.shape[2], None]).abs().float() * MIN,
        "(cumsum(p_1)[b, q] <= cumsum(p_1)[b, k]) & (cumsum(p_1)[b, k] <= cumsum(p_1)[b, q])",
        "",
    ),
    "logarithm": (lambda x, p: square(x).tril().log(), "all", "log[k - q + SHIFT]"),
    "bool index": (lambda x, p: square(x, 0.0).index_put((later(x),), torch.tensor(-INF)), "causal", ""),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", OPEN)
def test_what_is_open_becomes_loads_and_terms(name: str, dynamic: bool) -> None:
    mask, keep, bias = OPEN[name]
    found = raised(mask, (2, 3, 7, 7), dynamic)
    names = load_names(found.loads)
    assert describe(found.keep, names) == keep
    assert describe_bias(found.bias, names) == bias.replace("SHIFT", "N - 1" if dynamic else "6")


def test_symbolic_lengths_appear_as_n_and_nq() -> None:
    def cached(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return columns(x) <= rows(x) + (x.shape[3] - x.shape[2])

    found = raised(cached, (2, 3, 4, 9), True)
    assert isinstance(found, RaisedMask)
    assert found.keep == parse_pred("k <= q + N - Nq")
    assert describe(found.absolute(parse_expr("N - Nq"))) == "causal"


def test_regions_are_compared_as_numbers() -> None:
    """Of five borders, a case for each combination on both sides would be a text of many pages."""

    def mask(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        first, second = (sum((at >= border).long() for border in (2, 3, 5, 6, 8)) for at in (rows(x), columns(x)))
        return first == second

    found = raised(mask, (1, 1, 11, 11), False)
    assert not found.loads
    assert len(str(found.keep)) < 500


def test_what_is_written_later_is_not_read() -> None:
    def counter(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        mask = p[:, None, :, None] >= columns(x)
        p.add_(1)
        return mask

    found = raised(counter, (1, 1, 5, 5), False)
    assert describe(found.keep, load_names(found.loads)) == "ge[q, k]"


def test_integer_masks_taken_for_0_and_1_are_named() -> None:
    found = raised(CLOSED["padding numbers"][0], (2, 3, 7, 7), False)
    assert found.assumed == ("p_1",)
    assert raised(CLOSED["padding as bool"][0], (2, 3, 7, 7), False).assumed == ()


def test_scalars_of_the_graph_become_one_element_tensors() -> None:
    def bounded(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return rows(x) - columns(x) <= p.sum()

    traced = trace(bounded, inputs(1, 1, 5, 5), False)
    first, *_, last = traced.gm.graph.nodes
    found = raise_mask(last.args[0], tuple(first.meta["val"].shape))
    assert isinstance(found, RaisedMask)
    tensors = load_tensors(found, last)
    assert found.loads[0].meta["val"].shape == () and tensors[0].meta["val"].shape == (1,)
    traced.gm.graph.lint()


LEAVES: dict[str, Mask] = {
    "lower": lambda x, p: square(x).tril().bool(),
    "upper": lambda x, p: square(x, 1, torch.bool).triu(2),
    "near": lambda x, p: (rows(x) - columns(x)).abs() <= 2,
    "first": lambda x, p: (columns(x) < 3).expand(x.shape[2], -1),
    "block": lambda x, p: rows(x) // 4 == columns(x) // 4,
    "every": lambda x, p: (columns(x) + 2 * rows(x)) % 3 != 1,
    "padding": lambda x, p: p[:, None, None, :].bool(),
    "counted": lambda x, p: p.cumsum(-1)[:, None, None, :] > 2,
    "chosen": lambda x, p: x > 0.5,
    "heads": lambda x, p: (torch.arange(x.shape[1]) % 2 == 0)[:, None, None],
}
UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not": operator.invert,
    "flip": lambda m: m.flip(-1),
    "roll": lambda m: m.roll(1, -1),
    "shift": lambda m: torch.nn.functional.pad(m, (2, 0))[..., : m.shape[-1]],
    "joined": lambda m: torch.cat([m[..., 2:], m[..., :2]], -1),
    "tril": lambda m: m if m.dim() < 2 or m.shape[-2] == 1 else m.tril(1),
    "ints": lambda m: (m.long() * 3 - 1).clamp(min=0) >= 2,
    "additive": lambda m: torch.zeros(()).masked_fill(~m, MIN) == 0,
    "inverted": lambda m: (1.0 - m.float()) * MIN >= 0,
    "flat": lambda m: m.reshape(-1).view(m.shape),
    "swapped": lambda m: m.transpose(-1, -2).contiguous().transpose(-2, -1),
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "where": lambda a, b: torch.where(a, b, ~a),
    "equal": operator.eq,
    "less": lambda a, b: a.long() < b.long(),
    "sum": lambda a, b: (a.long() + b.long()) == 1,
    "added": lambda a, b: torch.where(a, 0.0, MIN) + torch.where(b, 0.0, -INF) == 0,
    "filled": lambda a, b: a.expand(torch.broadcast_shapes(a.shape, b.shape)).masked_fill(b, False),
}


def compositions() -> st.SearchStrategy[Mask]:
    """Random mask code: functions of (scores, padding), built from the tables above."""

    def unary(name: str, inner: Mask) -> Mask:
        return lambda x, p: UNARY[name](inner(x, p))

    def binary(name: str, left: Mask, right: Mask) -> Mask:
        return lambda x, p: BINARY[name](left(x, p), right(x, p))

    return st.recursive(
        st.sampled_from(sorted(LEAVES)).map(LEAVES.__getitem__),
        lambda inner: (
            st.builds(unary, st.sampled_from(sorted(UNARY)), inner)
            | st.builds(binary, st.sampled_from(sorted(BINARY)), inner, inner)
        ),
        max_leaves=4,
    )


@settings(max_examples=60)
@given(compositions(), st.sampled_from([(2, 3, 7, 7), (1, 2, 4, 9), (2, 1, 1, 6)]), st.booleans())
def test_random_compositions_are_never_wrong(mask: Mask, sizes: tuple[int, int, int, int], dynamic: bool) -> None:
    raised(mask, sizes, dynamic and 1 not in sizes)  # `check_raised` compares element by element


TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "num_hidden_layers": 2, "sliding_window": 8, "head_dim": 8,
}  # fmt: skip
MODELS = [
    ("Mistral", "sdpa", True, True, ["window(8) & 1[b, k]"]),
    ("Gemma2", "eager", False, False, ["window(8)", "causal"]),
    ("Bert", "eager", True, True, ["1[b, k]"]),
    ("Llama", "sdpa", False, True, ["causal"]),
]


@pytest.mark.parametrize(("name", "attention", "padded", "dynamic", "texts"), MODELS, ids=[row[0] for row in MODELS])
def test_models(name: str, attention: str, padded: bool, dynamic: bool, texts: list[str]) -> None:
    import transformers

    fields = TINY if name != "Bert" else {k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "head_dim")}
    config = getattr(transformers, f"{name}Config")(**fields, attn_implementation=attention)
    model = getattr(transformers, f"{name}Model")(config).eval()
    tokens, padding = torch.randint(1, 60, (2, 19)), torch.ones(2, 19, dtype=torch.int64)
    padding[1, :5] = 0
    given = {"attention_mask": padding} if padded else {}
    if name != "Bert":
        given["use_cache"] = False
    graphs = compile_and_trace(lambda compiled: compiled(tokens, **given), model, dynamic)
    sites = [(traced, *site) for traced in graphs for site in traced.masks()]
    found = [check_raised(traced.gm, node, traced.inputs, shape, real) for traced, node, shape, real in sites]
    assert len(found) == 2 and all(found)
    assert [describe(mask.keep, ["1"]) for mask in found] == (texts if len(texts) == 2 else texts * 2)


def bits(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.where(columns(x) < 3, 1.0, 0.0).view(torch.int32) <= 1


AS_TORCH_ROUNDS: dict[str, Mask] = {
    "number to float32": lambda x, p: torch.where(later(x), 0.2, 0.7) >= 0.7,
    "number to bfloat16": lambda x, p: square(x, -10000.0, torch.bfloat16).triu(1) != -10000.0,
    "tensor without dimensions": lambda x, p: torch.where(later(x), 0.2, 0.7) >= torch.tensor(0.7, dtype=torch.float64),
    "wider of two": lambda x, p: square(x, 0.7).tril() >= square(x, 0.7, torch.float64),
    "operand of arithmetic": lambda x, p: torch.where(later(x), 0.2, 0.7) - 0.7 >= 0,
    "cumsum of halves": lambda x, p: torch.full((x.shape[3],), 0.5).cumsum(0) > rows(x),
    "cumsum to a float": lambda x, p: square(x, 1, torch.int64).cumsum(1, dtype=torch.float32) * 0.5 > rows(x),
    "the bits of numbers": bits,
    "accumulated": lambda x, p: torch.index_put(square(x), (later(x),), torch.tensor(1.0), accumulate=True) < 2,
}


@pytest.mark.parametrize("name", AS_TORCH_ROUNDS)
def test_numbers_are_what_torch_makes_of_them(name: str) -> None:
    raised(AS_TORCH_ROUNDS[name], (2, 3, 9, 9), dynamic=False)  # `check_raised` compares element by element


def test_a_sink_that_cannot_be_read_stays_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    traced = trace(lambda x, p: torch.zeros(1, 3, 1, 1), inputs(2, 3, 9, 9), False)
    first, *_, last = traced.gm.graph.nodes
    monkeypatch.setattr("sparsify.passes.masks.elements.Elements.at", broken)
    found = raise_masks([], last.args[0], tuple(first.meta["val"].shape), last)
    assert found.keep == TRUE and found.loads == (last.args[0],)
    assert [term.loads for term in found.sink or ()] == [(parse_expr("_0[0, h, 0, 0]"),)]
