"""Spellings that look like a known one and are not quite it: each gives what eager gives, rewritten or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captures import compiled

from sparsify.errors import PatternError
from sparsify.patterns import expr

B, H, N, D = 2, 4, 24, 8
NEG = float("-inf")
RANDOM = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(B, H, N, D, generator=RANDOM) for _ in range(3))
BIAS = torch.randn(3, H, N, N, generator=RANDOM)
PADDING = torch.rand(3, N, generator=RANDOM) > 0.3
PADDING[:, 0] = True
INPUTS = (Q, K, V)
GAP = torch.arange(N)[:, None] - torch.arange(N)[None, :]
FUTURE = torch.ones(N, N, dtype=torch.bool).triu(1)


def rewritten(name, function, *inputs):
    return pytest.param(function, inputs or INPUTS, None, id=name)


def refused(name, function, *inputs, because):
    return pytest.param(function, inputs or INPUTS, because, id=name)


def scores(change):
    """Attention whose scores `change` gets to see; a change in place returns None."""

    def attention(q, k, v):
        found = q @ k.mT * 0.25
        changed = change(found)
        return torch.softmax(found if changed is None else changed, -1) @ v

    return attention


def weights(change):
    def attention(q, k, v):
        found = torch.softmax(q @ k.mT * 0.25, -1)
        change(found)
        return found @ v

    return attention


def masked(build):
    return lambda q, k, v, *more: F.scaled_dot_product_attention(q, k, v, attn_mask=build(*more))


def added(q, k, v, bias):
    return torch.softmax(q @ k.mT + bias, -1) @ v


def filled(q, k, v, keep):
    return torch.softmax((q @ k.mT).masked_fill(~keep[:, None, None, :], NEG), -1) @ v


def chosen(q, k, v, keep):
    return torch.softmax(torch.where(keep[:, None, None, :], q @ k.mT, NEG), -1) @ v


def set_columns(s):
    s[..., 5:9] = NEG


def add_to_column(s):
    s[:, :, :, 0] += 3


def fill_diagonal(s):
    s.diagonal(dim1=-2, dim2=-1).fill_(NEG)


def write_transposed(s):
    t = s.mT
    t += torch.arange(float(N))


def write_through_view(s):
    s.view(B * H, N, N)[:, :, 3:9] = NEG


def zero_columns(w):
    w[..., :4] = 0


def zero_view(w):
    w.view(B * H, N, N)[:, :, :4] = 0


def zero_after(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v)
    out[:, :, 0] = 0
    return out


def weights_after(q, k, v):
    w = torch.softmax(q @ k.mT, -1)
    out = w @ v
    w.zero_()
    return out


def cached(q, k, v):
    keys, values = torch.zeros(B, H, N, D), torch.zeros(B, H, N, D)
    keys[:, :, :N], values[:, :, :N] = k, v
    out = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    keys.zero_()
    return out


def by_letters(write):
    """Attention over (B, N, H, D), for which a site's tensors are made anew; `write` comes before the softmax."""

    def attention(q, k, v, mask):
        s = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(mask, NEG)
        write(q, k, v, mask)
        return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(s, -1), v)

    return attention


def gated_twice(q, k, v, gate):
    w = torch.softmax(q @ k.mT, -1) * gate
    return (w * gate.add_(1.0)) @ v


def scaled_fill(q, k, v):
    return torch.softmax((q @ k.mT).masked_fill(FUTURE, -1e4) * 1e-3, -1) @ v


def by_sums(divide, after=False):
    """Exponentials over their sums, of as many queries as keys: a sum of another row fits, too."""

    def attention(q, k, v):
        e = (q[0, 0] @ k[0, 0].mT * 0.25).exp()
        return divide(e @ v[0, 0, :, :1].expand(N, N), e.sum(-1)) if after else divide(e, e.sum(-1)) @ v[0, 0]

    return attention


def undone(number):
    return scores(lambda s: s.masked_fill(FUTURE, number) - number * FUTURE)


def wide_scores(q, k, v):
    return torch.softmax(q @ k.mT * 9, -1).to(torch.bfloat16) @ v.to(torch.bfloat16)


def scaled_infinite_fill(q, k, v):
    return torch.softmax((q @ k.mT).masked_fill(FUTURE, NEG) * 1e-3, -1) @ v


def least_taken(s):
    return torch.max(s.masked_fill(FUTURE, NEG), torch.tensor(torch.finfo(torch.float32).min))


def sunk(q, k, v, sink):
    s = torch.cat([q @ k.mT, sink.view(1, -1, 1, 1).expand(B, -1, N, -1)], -1)
    return torch.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :-1] @ v


def sunk_after_a_shift(q, k, v, sink):
    s = q @ k.mT
    s = torch.cat([s - s.amax(-1, keepdim=True), sink.view(1, -1, 1, 1).expand(B, -1, N, -1)], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


def sunk_in_front(q, k, v, sinks):
    return torch.softmax(torch.cat([sinks.expand(B, -1, N, -1), q @ k.mT], -1), -1)[..., 2:] @ v


def softmax_plus_one(q, k, v):
    e = (q @ k.mT * 0.1).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def numbered(m):
    return (1.0 - m[:B, None, None, :].float()) * -1e9


WIDER = [t[:1] for t in INPUTS]
ONE_HEAD = [t[:, :1] for t in INPUTS]
ROW = [Q[:, :, :1], K, V]
LETTERS = [torch.randn(B, N, H, D, generator=RANDOM) for _ in range(3)] + [FUTURE.clone()]


@pytest.mark.parametrize(
    ("function", "inputs", "because"),
    [
        refused("padding of a larger batch", filled, *WIDER, PADDING, because="broadcast"),
        refused("choice of a larger batch", chosen, *WIDER, PADDING, because="broadcast"),
        refused("bias of a larger batch", added, *WIDER, BIAS, because="broadcast"),
        refused("bias of more heads", added, *ONE_HEAD, BIAS[:2], because="broadcast"),
        refused("bias of more queries", added, *ROW, BIAS[:2], because="broadcast"),
        refused("columns set", scores(set_columns), because="in place"),
        refused("column added to", scores(add_to_column), because="in place"),
        refused("diagonal filled", scores(fill_diagonal), because="in place"),
        refused("written transposed", scores(write_transposed), because="in place"),
        refused("written through a view", scores(write_through_view), because="in place"),
        rewritten("filled in place", scores(lambda s: s.masked_fill_(FUTURE, NEG))),
        refused("queries written", by_letters(lambda q, k, v, m: q.mul_(3)), *LETTERS, because="in place"),
        refused("some keys written", by_letters(lambda q, k, v, m: k[:, :4].zero_()), *LETTERS, because="in place"),
        rewritten("values written before", by_letters(lambda q, k, v, m: v[:, :4].zero_()), *LETTERS),
        refused("mask written", by_letters(lambda q, k, v, m: m.fill_(False)), *LETTERS, because="in place"),
        refused("gate written", gated_twice, *INPUTS, BIAS[0, :, :1, :1].clone(), because="in place"),
        refused("weights set", weights(zero_columns), because="weights are also used"),
        refused("weights set through a view", weights(zero_view), because="weights are also used"),
        rewritten("weights cleared after", weights_after),
        rewritten("output set after", zero_after),
        rewritten("buffers cleared after", cached),
        refused("maximum over queries", scores(lambda s: s - s.amax(-2, keepdim=True)), because="max"),
        rewritten("maximum over keys", scores(lambda s: s - s.amax(-1, keepdim=True))),
        rewritten("maximum and its index", scores(lambda s: s - s.max(-1, keepdim=True)[0])),
        refused("larger of scores and another", scores(lambda s: s - torch.max(s, FUTURE * 1.0)), because="scores"),
        refused("shifted before tanh", scores(lambda s: torch.tanh(s + 1) * 5), because="before tanh"),
        refused("shifted before factors of keys", scores(lambda s: (s + 1) * PADDING[0].float()), because="shifted"),
        refused(
            "maximum off before factors of keys",
            scores(lambda s: (s - s.amax(-1, keepdim=True)) * PADDING[0].float()),
            because="shifted",
        ),
        rewritten("shifted before factors of heads", scores(lambda s: (s + 1) * BIAS[0, :, :1, :1])),
        refused("shifted beside a sink", sunk_after_a_shift, *INPUTS, BIAS.flatten()[:H], because="shifted"),
        rewritten("maximum of everything", scores(lambda s: s - s.max())),
        refused("maximum of heads", scores(lambda s: s - s.amax((1, -1), keepdim=True) * 1), because=""),
        refused("index of the maximum", scores(lambda s: s - s.max(-1, keepdim=True)[1]), because=""),
        refused("scores as integers", scores(lambda s: (s * 8).to(torch.int64).to(s.dtype)), because="cast"),
        refused("scores clamped", scores(lambda s: s.clamp(max=1)), because="clamp"),
        rewritten("factor as an integer", scores(lambda s: s * torch.tensor(2.7).to(torch.int64))),
        rewritten("least number taken", scores(least_taken)),
        rewritten("clamped at the least number", scores(lambda s: s.clamp(min=NEG))),
        refused("clamped at a number", scores(lambda s: s.clamp(min=-1e5)), because="clamp"),
        refused("larger of two scores", scores(lambda s: torch.maximum(s, s * 2)), because="max"),
        rewritten("mask expanded as the scores", scores(lambda s: s.masked_fill(FUTURE[None].expand_as(s), NEG))),
        rewritten("mask made like the scores", scores(lambda s: s + torch.zeros_like(s).masked_fill(FUTURE, NEG))),
        rewritten("sink beside", sunk, *INPUTS, BIAS.flatten()[:H]),
        rewritten("two sinks in front", sunk_in_front, *INPUTS, BIAS.flatten()[: H * 2].view(1, H, 1, 2)),
        rewritten("softmax plus one", softmax_plus_one),
        refused("sums of columns", by_sums(lambda e, total: e / total), because="not those of their rows"),
        refused("sums transposed", by_sums(lambda e, t: e / t[:, None].mT), because="not those of their rows"),
        refused("sums inverted", by_sums(lambda e, t: e * t.reciprocal()), because="not those of their rows"),
        refused("sums of columns after", by_sums(lambda e, t: e / t, after=True), because="not those of their rows"),
        rewritten("sums of rows", by_sums(lambda e, t: e / t[:, None].expand_as(e))),
        rewritten("sums of rows after", by_sums(lambda e, t: e / t[:, None], after=True)),
        refused("fill undone", undone(-1e4), because="undo"),
        refused("large fill undone", undone(-1e9), because="undo"),
        refused("small fill scaled down", scaled_fill, because="-10"),
        rewritten("infinite fill scaled down", scaled_infinite_fill),
        rewritten("a mask by fmod", masked(lambda: torch.fmod(torch.where(GAP < 0, -1e9, 0.0), 2e9))),
        rewritten("integers as a mask", masked(numbered), *INPUTS, PADDING.long()),
        rewritten("tril with a diagonal", masked(lambda: torch.ones(N, N, dtype=torch.bool).tril(3))),
        rewritten("both sides", masked(lambda: (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 6)),
    ],
)  # fmt: skip
def test_gives_what_eager_gives(function, inputs, because):
    with torch.no_grad():
        wanted = function(*(t.clone() for t in inputs))
        run, recorded = compiled(function)
        found = run(*(t.clone() for t in inputs))
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    (site,) = recorded.sites
    assert (site.refusal is None) == (because is None), site.refusal
    assert because is None or because in str(site.refusal)


def test_integers_are_no_mask_under_strict():
    """(1 - mask) * min with numbers other than 0 and 1: the tensor stays, and the result is that of eager."""
    function, numbers = masked(numbered), PADDING.long() * 2 - 1  # -1 counts as dropped in eager, as "not 0" in a mask
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(function, backend="sparsify", options={"inner": "eager", "target": "null", "strict": True})
        torch.testing.assert_close(run(*INPUTS, numbers), function(*INPUTS, numbers), atol=2e-5, rtol=2e-5)


def test_a_mask_that_breaks_the_reader_stays_a_tensor(monkeypatch, caplog):
    def broken(*_):
        raise ValueError("not enough values")

    monkeypatch.setattr("sparsify.passes.masks.elements.Elements.at", broken)
    function = masked(lambda: GAP >= 0)
    with torch.no_grad():
        run, recorded = compiled(function)
        torch.testing.assert_close(run(*INPUTS), function(*INPUTS), atol=2e-5, rtol=2e-5)
    (site,) = recorded.sites
    assert site.refusal is None and len(site.loads) == 1
    assert "could not be read" in caplog.text


def bmm(q, k, v):
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * D**-0.5, -1), v)


def head_major(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    found = torch.softmax(torch.einsum("bqhd,bkhd->hbqk", q, k) * D**-0.5, -1)
    return torch.einsum("hbqk,bkhd->bhqd", found, v)


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


MERGED = [t.flatten(0, 1) for t in INPUTS]
CROSS = [Q, K[:, :, :9], V[:, :, :9]]
WINDOW = {"window": 5}
BOTH = {"window": {"size": 5, "ahead": 5}}
SOME = {"0": "dense", "rest": WINDOW}
EARLIER, NEAR = (GAP >= 0) & (GAP < 5), (GAP > -6) & (GAP < 5)


def ahead(q, k, v):
    i = torch.arange(N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[None] <= i[:, None] + 3)


def around(q, k, v):
    i = torch.arange(N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] - i[None]).abs() <= 6)


def around_fewer(q, k, v):
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] - j[None]).abs() <= 6)


def last_rows(q, k, v):
    i, j = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j[None] <= i[:, None])


@pytest.mark.parametrize(
    ("function", "inputs", "rule", "wanted"),
    [
        (ahead, INPUTS, {"heads": WINDOW}, EARLIER),
        (around, INPUTS, {"heads": BOTH}, NEAR),
        (last_rows, [Q[:, :, 20:], K, V], {"heads": WINDOW, "kind": "cross"}, EARLIER[20:]),
        (around_fewer, [Q[:, :, :9], K, V], {"heads": WINDOW, "kind": "cross"}, "absolute positions"),
        (bmm, MERGED, {"heads": WINDOW}, EARLIER),
        (bmm, MERGED, {"heads": SOME}, "tells heads apart"),
        (bmm, MERGED, {"heads": {"column_stride": {"every": 4, "offset": "head"}}}, "tells heads apart"),
        (head_major, INPUTS, {"heads": WINDOW}, EARLIER),
        (head_major, INPUTS, {"heads": SOME}, "tells heads apart"),
        (plain, CROSS, {"heads": WINDOW}, "cross attention"),
        (plain, CROSS, {"heads": {"sinks": 3}}, (torch.arange(9) < 3).expand(N, 9)),
        (plain, CROSS, {"heads": {"window": 20}, "kind": "cross"}, None),
    ],
)
def test_a_spec_means_positions_and_heads_or_is_refused(function, inputs, rule, wanted):
    """`wanted`: what the spec and the model's mask keep, or why the site is refused; None: not compared."""
    with torch.no_grad():
        run, recorded = compiled(function, spec={"version": 1, "sites": [{"match": "*", **rule}]})
        found = run(*inputs)
    (site,) = recorded.sites
    if isinstance(wanted, str):
        assert wanted in str(site.refusal)
        torch.testing.assert_close(found, function(*inputs), atol=2e-5, rtol=2e-5)
        return
    assert site.refusal is None
    if wanted is not None:
        torch.testing.assert_close(
            found, F.scaled_dot_product_attention(*inputs, attn_mask=wanted), atol=2e-5, rtol=2e-5
        )


def test_scores_stay_as_wide_as_they_are():
    exact = torch.softmax(Q @ K.mT * 9, -1) @ V.bfloat16().float()
    with torch.no_grad():
        run, recorded = compiled(wide_scores)
        found = run(*INPUTS)
    assert recorded.sites[0].refusal is None and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)


def test_a_look_ahead_is_not_called_causal():
    with torch.no_grad():
        run, recorded = compiled(ahead)
        run(*INPUTS)
    assert (recorded.sites[0].mask_text, recorded.sites[0].q_offset) == ("k <= q + 3", 0)


def test_a_pattern_can_not_name_a_launchs_scalar():
    with pytest.raises(PatternError, match="unknown name '_x'"):
        expr("k <= q - _x")
