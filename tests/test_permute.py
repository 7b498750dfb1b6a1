"""Keys sorted inside segments: PBS-Attn's rule in plain numpy, and what must hold of any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sparsify
from sparsify import backend
from sparsify.codegen import Launch
from sparsify.codegen.oracle import kept_tokens
from sparsify.errors import InputError, PatternError, RefusedError
from sparsify.functional_plan import plan
from sparsify.options import Options
from sparsify.patterns import Pattern, causal, select, sinks, window
from sparsify.patterns.presets import pbs_attn
from sparsify.patterns.selector import Budget, Force, Heads, Lines, Permute, Score, Selector, Unit
from sparsify.program import Program
from sparsify.selection import choose
from sparsify.selection.example import kept_of_made_up
from sparsify.selection.permute import key_order
from sparsify.selection.site import select as make_lists
from sparsify.spec import Spec

CLEAR = 1e-6  # a decision that hangs on less than this is left to rounding


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Pbs:
    """PBS-Attn's rule for one batch entry, in float64: q (H, N, D), k (J, M, D), of which keys `valid` may be used.

    The queries are the last ones of the keys. `gap`: how clear the least clear decision was.
    """

    def __init__(self, q, k, valid, share, block, segment, last):
        self.q, self.k, self.valid = q.astype(float), k.astype(float), valid
        self.share, self.block, self.segment, self.last = share, block, segment, last
        self.scale, self.gap = q.shape[-1] ** -0.5, np.inf
        self.position = np.arange(k.shape[1])[k.shape[1] - q.shape[1] :]
        self.alive = [i for i, p in enumerate(self.position) if valid[p]]

    def order(self, j):
        """The sorted tokens of each whole segment, for key head j."""
        group = len(self.q) // len(self.k)
        end = (self.position[self.alive[-1]] + 1) // self.segment * self.segment
        tokens = [t for t in range(end) if self.valid[t]]
        if not tokens:
            return []
        looks = [self.q[h, i] for h in range(j * group, (j + 1) * group) for i in self.alive[-self.last :]]
        mean = softmax(np.array(looks) @ self.k[j, tokens].T * self.scale).mean(0)
        score = dict(zip(tokens, mean, strict=True))
        found = []
        for start in range(0, end, self.segment):
            mine = range(start, start + self.segment)
            ranked = sorted(mine, key=lambda t: (-score.get(t, -1.0), t))
            for cut in range(self.block, self.segment, self.block):
                if ranked[cut] in score:
                    self.gap = min(self.gap, (score[ranked[cut - 1]] - score[ranked[cut]]) * len(tokens))
            found.append(ranked)
        return found

    def keep(self):
        """(H, N, M) bool over tokens."""
        keep = np.zeros((len(self.q), self.q.shape[1], self.k.shape[1]), bool)
        if not self.alive:
            return keep
        first = int(np.argmax(self.valid))
        for h in range(len(self.q)):
            j = h * len(self.k) // len(self.q)
            order = self.order(j)
            for row in range(0, self.q.shape[1], self.block):
                mine = [i for i in self.alive if row <= i < row + self.block]
                if mine:
                    blocks = self.blocks(h, j, order, mine, first)
                    for i in mine:
                        self.row(keep[h, i], self.position[i], blocks)
        return keep & self.valid

    def row(self, out, p, blocks):
        own = p // self.segment
        for t in (t for block in blocks for t in block):
            out[t] |= t // self.segment < own
        out[own * self.segment : p + 1] = True

    def blocks(self, h, j, order, mine, first):
        """The blocks of sorted keys, as lists of tokens, that a row of queries chooses."""
        before = self.position[mine[-1]] // self.segment
        found = [s[c : c + self.block] for s in order[:before] for c in range(0, self.segment, self.block)]
        found = [[t for t in block if self.valid[t]] for block in found]
        found = [block for block in found if block]
        if not found:
            return []
        means = np.array([self.k[j, block].mean(0) for block in found])
        weights = softmax(means @ self.q[h, mine].mean(0) * self.scale)
        ranked = sorted(range(len(found)), key=lambda u: -weights[u])
        total = np.cumsum(weights[ranked])
        self.gap = min(self.gap, np.abs(total[:-1] - self.share).min(initial=np.inf))
        number = int((total < self.share).sum()) + 1
        if number < len(ranked):
            self.gap = min(self.gap, weights[ranked[number - 1]] - weights[ranked[number]])
        return [block for u, block in enumerate(found) if u in ranked[:number] or first in block]


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def kept(pattern: Pattern, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B, H, N, M): what the program and the lists of `sparsify.attention` keep of tokens."""
    heads, kv_heads, scale = q.shape[1], k.shape[1], q.shape[-1] ** -0.5
    where = (0, None, None, "q - N + Nq") if mask is None else (1, "keep", "b, 0, 0, k", "q - N + Nq")
    loads = [] if mask is None else [mask]
    text, asks, _ = plan((pattern.rule,) * heads, where, ((), 0), heads, kv_heads, q.shape[2] == 1, "cpu")
    offset = k.shape[2] - q.shape[2]
    for ask in asks:
        loads += make_lists(q, k, loads[:1], None, offset, scale, ask)
    return kept_tokens(Launch(Program.parse(text), q, k, k, tuple(loads), offset, scale))


def dense(q, k, v, keep) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = (q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(nan=0.0) @ v


@st.composite
def cases(drawn: st.DrawFn):
    """Odd lengths, GQA, chunks at the end, padding on either side, blocks of one token and segments of one block."""
    block = drawn(st.sampled_from([1, 4, 8]))
    segment = block * drawn(st.integers(1, 4))
    keys = drawn(st.integers(1, 90))
    queries = keys if drawn(st.booleans()) else drawn(st.integers(1, keys))
    kv_heads, group, batch = drawn(st.integers(1, 2)), drawn(st.integers(1, 3)), drawn(st.integers(1, 2))
    valid = np.ones((batch, keys), bool)
    pad = drawn(st.integers(0, keys // 2))
    if drawn(st.booleans()):
        valid[0, :pad] = False
    else:
        valid[0, keys - pad :] = False
    q, k = draw(drawn(st.integers(0, 10**6)), (batch, kv_heads * group, queries, 8), (batch, kv_heads, keys, 8))
    share = drawn(st.sampled_from([0.2, 0.5, 0.9]))
    return q, k, valid, (share, block, segment, drawn(st.sampled_from([1, 3, 40])))


@settings(max_examples=60)
@given(cases())
def test_pbs_attn_keeps_what_its_rule_keeps(case):
    q, k, valid, fields = case
    assume(q.shape[2] > 1)
    found = kept(pbs_attn(*fields), q, k, torch.tensor(valid)[:, None, None]).numpy()
    for b in range(len(q)):
        rule = Pbs(q[b].numpy(), k[b].numpy(), valid[b], *fields)
        expected = rule.keep()
        assume(rule.gap > CLEAR)
        alive = rule.alive  # a query that is padding chooses nothing, and nobody reads it
        assert np.array_equal(found[b][:, alive], expected[:, alive])


@pytest.mark.parametrize("target", ["null", "cpp"])
@pytest.mark.parametrize(("queries", "keys"), [(110, 110), (45, 110)])
def test_attention_is_dense_attention_under_the_kept_set(monkeypatch, target, queries, keys):
    monkeypatch.setenv("SPARSIFY_TARGET", target)
    q, k, v = draw(1, (2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 24))
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., :21] = False
    pattern = pbs_attn(0.4, 16, 32, 20)
    keep = kept(pattern, q, k, mask)
    assert 0.1 < keep.float().mean() < 0.8 * 0.5 * (2 if queries < keys else 1)
    found = sparsify.attention(q, k, v, pattern, mask=mask)
    torch.testing.assert_close(found.double(), dense(q, k, v, keep), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["null", "cpp"])
def test_a_budget_of_everything_is_dense_whatever_the_order(monkeypatch, target):
    """Sorting and reading by the order leaves dense attention as it is, with a bias, a window and sinks on top."""
    monkeypatch.setenv("SPARSIFY_TARGET", target)
    q, k, v, bias = draw(2, (2, 2, 53, 16), (2, 1, 53, 16), (2, 1, 53, 16), (2, 2, 53, 53))
    rule = (window(30) | sinks(3)) & causal()
    found = sparsify.attention(q, k, v, everything_sorted(16) & rule, mask=bias)
    added = bias.masked_fill(~rule.mask(2, 53, 53), -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setenv("SPARSIFY_TARGET", "null")  # another kernel would sort no other way
    grouped = sparsify.attention(q, k, v, everything_sorted(24, "kv_group") & causal())
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(grouped, expected, atol=1e-5, rtol=1e-5)


def everything_sorted(segment: int, scope: str = "head") -> Pattern:
    heads = {"scope": scope}
    return select({"rule": "ratio", "value": 1.0}, {"q": 8, "k": 8}, heads=heads, permute={"segment": segment})


def test_what_is_beside_a_sorted_selection_is_over_tokens():
    """A union with sinks keeps those tokens wherever they were sorted to."""
    q, k = draw(3, (1, 2, 70, 8), (1, 1, 70, 8))
    lone, both = (kept(p & causal(), q, k) for p in (few(), few() | sinks(3)))
    extra = torch.zeros(70, 70, dtype=torch.bool)
    extra[:, :3] = True
    assert torch.equal(both, lone | (extra & torch.ones(70, 70, dtype=torch.bool).tril()))
    assert not torch.equal(both, lone)


def few() -> Pattern:
    return select({"rule": "topk", "value": 2}, {"q": 4, "k": 4}, permute={"segment": 12, "qview": "last(5)"})


@settings(max_examples=40)
@given(cases())
def test_an_order_permutes_each_segment_by_falling_scores(case):
    q, k, valid, (_, block, segment, last) = case
    selector = Selector(Budget("topk", 1), Unit(1, block), permute=Permute(segment, f"last({last})"))
    position = torch.arange(k.shape[2])[None, -q.shape[2] :]
    order = key_order(selector, q, k, scale=1.0, position=position, valid=torch.tensor(valid))
    token = torch.arange(k.shape[2])
    assert order.dtype == torch.int32 and torch.equal(order.sort(-1).values, token.int().expand_as(order))
    assert torch.equal(order // segment, (token // segment).expand_as(order))
    for b, head in np.ndindex(order.shape[:2]):
        seen = [int(p) for p in position[0] if valid[b, p]]
        usable = torch.tensor(valid)[b][order[b, head].long()]
        for start in range(0, max(seen, default=-1) + 2 - segment, segment):
            part = usable[start : start + segment]
            assert not (part[1:] & ~part[:-1]).any()  # what may not be used comes last


def test_a_change_of_any_field_changes_the_choice():
    q, k = draw(5, (2, 4, 96, 8), (2, 2, 96, 8))
    base = {
        "budget": {"rule": "topk", "value": 3},
        "unit": {"q": 8, "k": 4},
        "permute": {"segment": 16, "qview": "last(8)"},
    }
    one = kept(select(**base) & causal(), q, k)
    for change in (
        {"permute": {"segment": 8, "qview": "last(8)"}},
        {"permute": {"segment": 16, "qview": "last(1)"}},
        {"force": {"sink": 1, "of": "tokens"}},
        {"heads": {"scope": "head"}},
        {"permute": None},
    ):
        assert not torch.equal(kept(select(**base | change) & causal(), q, k), one), change


BUDGET, UNIT, SORTED = Budget("topk", 4), Unit(8, 8), Permute(16)
LINES = {"unit": UNIT, "score": Score("last(4)", norm="softmax"), "lines": Lines(1, 1)}
BAD = [
    (lambda: Permute(0), "permute.segment: expected an integer >= 1, found 0"),
    (lambda: Permute(8, "token"), "permute.qview: 'token' is not known"),
    (
        lambda: Selector(BUDGET, UNIT, permute=Permute(20)),
        "permute.segment: expected a multiple of unit.k = 8, found 20",
    ),
    (lambda: Selector(**LINES, permute=SORTED), "permute: lines are columns and diagonals of keys in their own order"),
    (lambda: Selector(BUDGET, UNIT, learned="net", permute=SORTED), "permute: the hook 'net' scores units of keys in"),
    (
        lambda: Selector(BUDGET, UNIT, heads=Heads("layer"), permute=SORTED),
        "heads.scope: each key head has its own order of keys, so 'head' or 'kv_group', found 'layer'",
    ),
    (lambda: Selector(BUDGET, UNIT, force=Force(local=1), permute=SORTED), "force.local: with permute a query's own"),
    (lambda: Selector(BUDGET, UNIT, force=Force(sink=1), permute=SORTED), "force.of: units of sorted keys have no fi"),
    (lambda: Selector(BUDGET, UNIT, permute={"segment": 16}), "permute: expected a Permute, found {'segment': 16}"),
    (lambda: select({"rule": "topk", "value": 1}, permute={"size": 8}), "permute.size: no such field"),
    (lambda: select({"rule": "topk", "value": 1}, permute={}), "permute.segment: must be given"),
    (lambda: pbs_attn(1.5), "pbs_attn.share: expected a number above 0 and at most 1, found 1.5"),
    (lambda: pbs_attn(segment=200), "pbs_attn.segment: expected a multiple of the block of 128, found 200"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_has_no_meaning_is_told_clearly(build, message):
    with pytest.raises(PatternError) as caught:
        build()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_attention_cannot_sort_is_told_clearly():
    q, k = draw(6, (1, 2, 32, 8), (1, 2, 32, 8))
    mixed = "attention: pattern: the heads share one order of keys, and only some of them have the selection that sorts"
    for pattern, message in (
        ([few() & causal(), causal()], mixed),
        ([few() & causal(), everything_sorted(16) & causal()], mixed),
        (few(), "attention: pattern: the selection sorts keys inside segments, which a causal attention alone can"),
    ):
        with pytest.raises(InputError) as caught:
            sparsify.attention(q, k, k, pattern)
        assert str(caught.value).startswith(message)
    with pytest.raises(InputError, match="the selection serves prefill, and this is decode"):
        sparsify.attention(q[:, :, -1:], k, k, pbs_attn())


def test_wrong_orders_are_told_clearly():
    q, k = draw(7, (1, 2, 32, 8), (1, 2, 32, 8))
    at = {"scale": 1.0, "position": torch.arange(32)[None]}
    for permute, order, causal_, message in (
        (SORTED, None, True, "order: expected the keys' order for this selector, found NoneType"),
        (None, torch.arange(32).expand(1, 2, -1), True, "order: expected none for this selector, found Tensor"),
        (SORTED, torch.arange(32)[None, None], True, "order: expected (batch, key heads, keys) = (1, 2, 32), found"),
        (SORTED, torch.arange(32).expand(1, 2, -1), False, "causal: with permute a query sees earlier segments and"),
    ):
        with pytest.raises(InputError) as caught:
            choose(Selector(BUDGET, UNIT, permute=permute), q, k, **at, causal=causal_, order=order)
        assert str(caught.value).startswith(message)


def test_a_picture_shows_sorted_blocks():
    found = kept_of_made_up(pbs_attn(0.5, 16, 32, 16), 200, 200).numpy()
    assert found.shape == (200, 200) and not np.triu(found, 1).any()
    own = np.arange(200)[:, None] // 32 == np.arange(200) // 32
    assert (found | ~np.tril(own)).all()
    blocks = found[160:, :160].reshape(40, 10, 16)
    assert (blocks.any(-1) & ~blocks.all(-1)).any()  # blocks of slots are no blocks of tokens


def test_in_a_graph_all_heads_of_a_site_read_keys_by_one_order():
    q, k, v = draw(8, (2, 4, 75, 8), (2, 2, 75, 8), (2, 2, 75, 8))
    fields = {"share": 0.4, "block": 8, "segment": 16, "last": 10}
    padding = torch.ones(2, 1, 1, 75, dtype=torch.bool)
    padding[1, ..., :13] = False

    def attend(q, k, v, padding):
        row = torch.arange(75)
        return F.scaled_dot_product_attention(q, k, v, padding & (row <= row[:, None]), enable_gqa=True)

    found = compiled(attend, {"pbs_attn": fields}, q, k, v, padding)
    expected = dense(q, k, v, kept(pbs_attn(**fields), q, k, padding))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, attend(q, k, v, padding), atol=1e-3)


@pytest.mark.parametrize(
    ("heads", "causal_", "message"),
    [
        ({"0": "causal", "rest": "pbs_attn"}, True, "the heads share one order of keys, and only some of them have"),
        ({"all": ["pbs_attn"]}, True, ""),
        (few(), False, "the selection sorts keys inside segments, which a causal attention alone can tell apart"),
    ],
)
def test_a_site_that_cannot_be_sorted_is_refused(heads, causal_, message):
    q, k = draw(9, (1, 2, 40, 8), (1, 2, 40, 8))

    def attend(q, k):
        return F.scaled_dot_product_attention(q, k, k, is_causal=causal_)

    if not message:
        torch.testing.assert_close(compiled(attend, heads, q, k), attend(q, k))  # of one segment: dense
        return
    with pytest.raises(RefusedError, match=message):
        compiled(attend, heads, q, k)


def test_layers_that_take_a_choice_take_its_order():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model, found = torch.nn.Sequential(Layer(), Layer()), []
    rule = select({"rule": "topk", "value": 1}, {"q": 8, "k": 8}, permute={"segment": 16}, reuse={"layers": {0: 1}})
    spec = Spec(sites=[{"match": "*", "heads": rule}])

    def record(gm, inputs):
        found.append(backend.captured(gm, inputs, Options.read({"target": "null", "spec": spec})))
        return found[-1].module.forward

    (x,) = draw(10, (1, 2, 70, 8))
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend=record, fullgraph=True)(x)
    assert [site.refusal for site in found[0].sites] == [None, None]
    assert sum("sparsify.select" in str(node.target) for node in found[0].graph.nodes) == 1
    keep = kept(select({"rule": "topk", "value": 1}, {"q": 8, "k": 8}, permute={"segment": 16}) & causal(), x, x)
    middle = dense(x, x, x, keep).float()
    torch.testing.assert_close(out.double(), dense(middle, middle, middle, keep), atol=1e-5, rtol=1e-5)


def compiled(attend, heads, *inputs: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    spec = Spec(sites=[{"match": "*", "heads": heads}])
    options = {"target": "null", "inner": "eager", "strict": True, "spec": spec}
    with torch.no_grad():
        return torch.compile(attend, backend="sparsify", options=options, fullgraph=True)(*inputs)
