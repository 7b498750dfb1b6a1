"""Biases and masks that no closed form describes: small tables, loads and terms, checked element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import Recorded
from check_raised import Recorder, check_equal, check_raised
from retrace import trace
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.passes.masks.describe import describe, load_names
from sparsify.passes.masks.describe_bias import describe_bias
from sparsify.passes.masks.raise_mask import RaisedMask, raise_mask

B, H, Q, K = 2, 4, 9, 9
Mask = Callable[..., torch.Tensor]


def gap(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[3])[None, :] - torch.arange(x.shape[2])[:, None]


def bucket(distance: torch.Tensor, both: bool, buckets: int = 32, far: int = 128) -> torch.Tensor:
    """T5's number of a relative position, as its authors write it."""
    found = torch.zeros_like(distance)
    if both:
        buckets //= 2
        found = found + (distance > 0).to(torch.long) * buckets
        distance = distance.abs()
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    large = exact + (torch.log(distance.float() / exact) / math.log(far / exact) * (buckets - exact)).to(torch.long)
    large = torch.min(large, torch.full_like(large, buckets - 1))
    return found + torch.where(distance < exact, distance, large)


def t5(both: bool) -> Mask:
    def bias(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        values = nn.functional.embedding(bucket(gap(x), both), table).permute(2, 0, 1)[None]
        return (
            values
            + torch.where(gap(x) > 0, torch.finfo(torch.float32).min, 0.0) * (not both)
            + (1.0 - p[:, None, None, :]) * torch.finfo(torch.float32).min
        )

    return bias


def slopes(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[0][None, :, None, None] * gap(x) + torch.full((x.shape[2], x.shape[3]), -math.inf).triu(1)


def bloom(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    positions = ((p.cumsum(-1) - 1) * p)[:, None, :]
    bias = (table[0][None, :, None] * positions).reshape(x.shape[0], x.shape[1], 1, x.shape[3])
    return bias.masked_fill(gap(x) > 0, torch.finfo(torch.float32).min)


def swin(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    at = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
    apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + 2
    index = apart[..., 0] * 5 + apart[..., 1]
    return table[index.view(-1)].view(9, 9, -1).permute(2, 0, 1)[None] + torch.where(gap(x).abs() > 6, -100.0, 0.0)


def small(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A chain over (b, k) data that stands over queries and keys in the graph."""
    return (p[:, None, None].expand(-1, 1, x.shape[2], -1) * 0.3).tanh().exp()


def cut(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A condition that only floating numbers tell."""
    return (gap(x).float() / 3).sin() > 0.2


def packed(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Documents told by where positions start anew, as transformers finds them."""
    positions = (torch.arange(x.shape[3]) * torch.ones_like(p)) % 4
    document = (torch.diff(positions, prepend=positions[:, :1], dim=-1) != 1).cumsum(-1)
    return (gap(x) <= 0) & (document[:, None, :, None] == document[:, None, None, :])


def images(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Gemma 3: causal, and spans of image tokens see each other in both directions."""
    starts = (p == 1) & (nn.functional.pad(p, (1, 0))[:, :-1] == 0)
    group = torch.where(p == 1, starts.int().cumsum(-1) - 1, -1)
    both = (p == 1)[:, None, :, None] & (p == 1)[:, None, None, :]
    return (gap(x) <= 0) | (both & (group[:, None, :, None] == group[:, None, None, :]))


def written(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A mask that is put together in place: a band, a prefix, a row, a corner."""
    mask = torch.zeros(x.shape[2], x.shape[3], dtype=torch.bool)
    mask[:, :2] = True
    mask[3:].transpose(0, 1)[2:5].fill_(True)
    mask[5] = gap(x)[5] <= 0
    mask[:, ::4].logical_not_()
    mask[gap(x) == 0] = True
    return mask


def shifted_windows(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Swin: regions are numbered in slices, and windows add -100 between regions."""
    region = torch.zeros(1, x.shape[3])
    for number, part in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
        region[:, part] = number
    apart = region[:, None, :] - region[:, :, None]
    return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


def outer(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bi,bj->bij", p[:, : x.shape[2]], p)[:, None].bool() & (gap(x) <= 0)


def lengths(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (torch.arange(x.shape[3]) < p.sum(-1)[:, None])[:, None, None, :]


def rewritten(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Distances that a list names, which then changes."""
    far = torch.tensor([3, 5, -7, 2]) + p[0, 0]
    mask = torch.isin(gap(x), far)
    far.add_(1)
    return mask


def edges(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """As `rewritten`, by edges of intervals."""
    found = table[:5, 0].clone().sort().values
    bias = table[torch.bucketize(gap(x).float() * 0.3, found), 1]
    found.add_(2.5)
    return bias


def cast_like(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A cast whose dtype another tensor gives."""
    return table[gap(x).abs().clamp(max=7)].permute(2, 0, 1).to(torch.float64).type_as(x).exp()


# name: mask, keep in words (None where it is long), bias in words, shapes of loads
CASES: dict[str, tuple[Mask, str | None, str, list[tuple[int, ...]]]] = {
    "t5 encoder": (t5(True), "p_1[b, k]", "table_1[h, k - q + 8]", [(B, K), (H, Q + K - 1)]),
    "t5 decoder": (t5(False), "causal & p_1[b, k]", "table_1[h, k - q + 8]", [(B, K), (H, Q + K - 1)]),
    "alibi": (slopes, "causal", "table_1[h] * (k - q)", [(32, H)]),
    "bloom": (bloom, "causal", "mul_1[b, h, k]", [(B, H, K)]),
    "swin": (
        swin,
        "all",
        "table_1[5*(q//3) + q % 3 - k % 3 - 5*(k//3) + 12, h] - 100 where (q - k < -6) | (k <= q - 7)",
        [(32, H)],
    ),
    "small": (small, "all", "exp[b, k]", [(B, K)]),
    "cut": (cut, "gt[k - q + 8]", "", [(Q + K - 1,)]),
    "packed": (packed, "causal & (cumsum((diff != 1))[b, k] == cumsum((diff != 1))[b, q])", "", [(B, K)]),
    "images": (images, None, "", [(B, K)] * 4),
    "written": (written, None, "", []),
    "shifted windows": (shifted_windows, None, "", []),
    "outer": (outer, "causal & p_1[b, k] & p_1[b, q]", "", [(B, K)]),
    "rewritten": (rewritten, "isin[q, k]", "", [(Q, K)]),
    "edges": (edges, "all", "index[q, k]", [(Q, K)]),
    "cast like": (cast_like, "all", "table_1[h, k - q + 8]", [(H, Q + K - 1)]),
    "lengths": (lengths, "k < sum(p_1)[b]", "", [(B,)]),
}


def inputs(length: int = K) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    padding = torch.randint(0, 2, (B, length), generator=generator)
    return torch.randn(B, H, length, length, generator=generator), padding, torch.randn(32, H, generator=generator)


def raised(mask: Mask, dynamic: bool = False) -> RaisedMask:
    """Raised and compared with the tensor itself; a symbolic graph at another length."""
    traced = trace(mask, inputs(), dynamic)
    first, *_, last = traced.gm.graph.nodes
    length = K + 4 * dynamic
    real = (B, H, length, length)
    return check_raised(traced.gm, last.args[0], inputs(length), tuple(first.meta["val"].shape), real)


@pytest.mark.parametrize("name", CASES)
def test_raised(name: str) -> None:
    mask, keep, bias, shapes = CASES[name]
    found = raised(mask)
    names = load_names(found.loads)
    assert keep is None or describe(found.keep, names) == keep
    assert "shifted" in name or describe_bias(found.bias, names) == bias
    assert len(found.loads) == len(shapes) and all(tuple(node.meta["val"].shape) in shapes for node in found.loads), [
        node.meta["val"].shape for node in found.loads
    ]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("swin",)])
def test_raised_at_any_length(name: str) -> None:
    assert raised(CASES[name][0], dynamic=True)  # compared element by element


def test_integers_that_are_not_0_and_1() -> None:
    """Without the assumption a mask of any integers is what the model makes of it, and with it it is named."""

    def numbers(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (1.0 - p[:, None, None, :] * 3) * -1e9

    traced = trace(numbers, inputs(), False)
    first, *_, last = traced.gm.graph.nodes
    shape, values = tuple(first.meta["val"].shape), Recorder(traced.gm, inputs()).values
    exact = raise_mask(last.args[0], shape, exact=True)
    check_equal(exact, values[last.args[0]].expand(shape), values, shape)
    assert exact.assumed == () and exact.bias
    assert raise_mask(last.args[0], shape).assumed == ("p_1",)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found = max(self.found, result.untyped_storage().nbytes() // result.element_size())
        return result


def _within(mode: TorchDispatchMode, function: Callable[..., Any], *args: Any) -> Any:
    with mode:
        return function(*args)


def window(x: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (gap(x) <= 0) & (gap(x) > -64) & p[:, None, None, :].bool()


MEMORY = {"t5": t5(False), "alibi": slopes, "bloom": bloom, "packed": packed, "window": window}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MEMORY)
@torch.no_grad()
def test_nothing_over_queries_and_keys_is_ever_made(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph runs as it is, with a kernel that does nothing."""
    monkeypatch.setattr("sparsify.codegen.null.NullTarget.run", lambda _, launch: launch.empty_output())
    mask, length = MEMORY[name], 1024

    def attention(q: torch.Tensor, p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        scores = q[..., :1].expand(-1, -1, -1, q.shape[2])  # for its shape alone
        made = mask(scores, p, table)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=made)

    torch._dynamo.reset()
    largest, recorded = Largest(), Recorded()

    def watched(gm: Any, example_inputs: list[Any]) -> Callable[..., Any]:
        forward = recorded(gm, example_inputs)
        return lambda *given: _within(largest, forward, *given)

    run = torch.compile(attention, backend=watched, dynamic=dynamic, fullgraph=True)
    q, table = torch.randn(1, H, length, 8), torch.randn(32, H)
    torch._dynamo.mark_static(table)
    torch._dynamo.mark_static(q, (1, 3))
    run(q, torch.ones(1, length, dtype=torch.int64), table)
    assert [site.refusal for site in recorded.sites] == [None]
    assert 0 < largest.found < length * length // 8
