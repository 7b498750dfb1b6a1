"""The selection pipeline in plain numpy and loops, float64: what `choose` is tested against. It shares no code with it.

The order of the steps is the normative one: views, combine, causality and domain, heads (query, pre), norm, heads
(token), pool, heads (unit), forced units, budget. One batch entry at a time; a kept set is a Python set of units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import numpy as np


@dataclass
class Item:
    """One batch entry: q (H, N, D), k (J, M, D), position (N,), valid (M,), and the smallest gap of any decision."""

    s: object
    q: np.ndarray
    k: np.ndarray
    scale: float
    position: list
    valid: list
    causal: bool
    gap: float = math.inf
    rows: list = field(default_factory=list)
    units: list = field(default_factory=list)

    def __post_init__(self):
        q_unit, k_unit = self.s.unit.q, self.s.unit.k
        n, m = self.q.shape[1], self.k.shape[1]
        alive = [i for i in range(n) if self.usable(i)]
        self.rows = [[i for i in alive if i // q_unit == r] for r in range(math.ceil(n / q_unit))]
        self.units = [[j for j in range(m) if self.valid[j] and j // k_unit == u] for u in range(math.ceil(m / k_unit))]
        self.alive = alive

    def usable(self, i):
        p = self.position[i]
        one = len(self.position) == 1
        return p >= 0 and not (self.causal and not one and p < len(self.valid) and not self.valid[p])

    def visible(self, queries, tokens, how):
        """Whether queries, looked at together, see a view of these keys."""
        if not tokens or not queries:
            return False
        if not self.causal:
            return True
        horizon = max(self.position[i] for i in queries)
        return tokens[0] <= horizon if how == "touch" else tokens[-1] <= horizon

    def near(self, gap):
        self.gap = min(self.gap, abs(gap))

    def reach(self, r):
        return {u for u, tokens in enumerate(self.units) if self.visible(self.rows[r], tokens, "touch")}


def argument(word):
    return int(word.split("(")[1][:-1]) if "(" in word else 0


def query_slots(item):
    """[(row or None for all, queries, vector function of a head's queries)]."""
    s, n = item.s, item.q.shape[1]
    if s.score.qview.startswith("last"):
        return [(None, [i], lambda x, i=i: x[i]) for i in item.alive[-argument(s.score.qview) :]]
    stride = argument(s.score.kview)
    if stride:
        groups = [list(range(g, min(g + stride, n))) for g in range(0, n, stride)]
        return [
            (g[0] // s.unit.q, [i for i in g if i in item.alive], lambda x, g=g: reverse(item, x, g)) for g in groups
        ]
    if s.score.qview == "mean":
        return [(r, row, lambda x, row=row: x[row].mean(0)) for r, row in enumerate(item.rows)]
    return [(i // s.unit.q, [i] if i in item.alive else [], lambda x, i=i: x[i]) for i in range(n)]


def reverse(item, x, group):
    return {t - group[0]: x[t] for t in group if t in item.alive}


def key_slots(item):
    """[(unit, tokens)]"""
    s, m = item.s, item.k.shape[1]
    stride = argument(s.score.kview)
    if s.score.kview in ("mean", "minmax", "attn_pool", "rep_search"):
        return list(enumerate(item.units))
    step = stride or 1
    return [(g // s.unit.k, [j for j in range(g, min(g + step, m)) if item.valid[j]]) for g in range(0, m, step)]


def product(item, query, keys, tokens):
    """One score; keys is a key head's (M, D)."""
    kview = item.s.score.kview
    if kview.startswith("strided"):
        stride = argument(kview)
        pairs = [(query.get(stride - 1 - j % stride), keys[j]) for j in tokens]
        return sum(float(a @ b) for a, b in pairs if a is not None) / stride * item.scale
    if kview == "minmax":
        low, high = keys[tokens].min(0), keys[tokens].max(0)
        return sum(max(a * x, a * y) for a, x, y in zip(query, low, high, strict=True)) * item.scale
    if kview == "attn_pool":
        weights = np.exp(keys[tokens] @ keys[tokens].mean(0) * item.scale)
        return float(query @ (weights / weights.sum() @ keys[tokens])) * item.scale
    return float(query @ keys[tokens].mean(0)) * item.scale


def joined(matrices, lists, op):
    """Arrays of heads to arrays of lists."""
    size = len(matrices) // lists
    how = {"sum": np.sum, "mean": np.mean, "max": np.max}[op]
    return [how(matrices[i * size : (i + 1) * size], axis=0) for i in range(lists)]


def view_scores(item, forced):
    """Scores of the views for each head or list after step 6, what is visible, and the slots."""
    s, lists = item.s, item.s.lists(len(item.q), len(item.k))
    queries = list(item.q)
    if s.heads.when == "query":
        queries = joined(queries, lists, s.heads.op)
    rows, columns = query_slots(item), key_slots(item)
    scores, shown = [], []
    for h, x in enumerate(queries):
        keys = item.k[h * len(item.k) // len(queries)]
        table, seen = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), bool)
        for a, (row, who, vector) in enumerate(rows):
            for c, (unit, tokens) in enumerate(columns):
                if not item.visible(who, tokens, s.score.causal):
                    continue
                if s.score.domain == "middle" and unit in forced[h * len(forced) // len(queries)][row]:
                    continue
                if s.score.kview == "rep_search":
                    mates = [slot for slot in rows if slot[0] == row]
                    tokens = [representative(item, mates, x, keys, unit, tokens)]
                    if not item.visible(who, tokens, "touch"):
                        continue
                seen[a, c], table[a, c] = True, product(item, vector(x), keys, tokens)
        scores.append(table)
        shown.append(seen)
    if s.heads.when == "pre":
        scores, shown = joined(scores, lists, s.heads.op), shown[:1] * lists
    scores = [normed(item, table, seen, rows) for table, seen in zip(scores, shown, strict=True)]
    if s.heads.when == "token":
        scores, shown = joined(scores, lists, s.heads.op), shown[:1] * lists
    return scores, shown[: len(scores)], rows, columns


def representative(item, slots, x, keys, unit, tokens):
    """The token that is found by halving a unit, by its best score with any of the slots that see it."""
    scored = {}
    for token in tokens:
        found = [
            product(item, vector(x), keys, [token]) for _, who, vector in slots if item.visible(who, [token], "touch")
        ]
        if found:
            scored[token] = max(found)
    size = item.s.unit.k
    start = unit * size
    while size > 1:
        size //= 2
        there = [any(begin <= token < begin + size for token in scored) for begin in (start, start + size)]
        left, right = (scored.get(begin + size // 2, -math.inf) for begin in (start, start + size))
        if all(there) and max(left, right) > -math.inf:
            item.near(left - right)
        start += size if there[1] and (not there[0] or right > left) else 0
    return start


def normed(item, table, seen, rows):
    out, parts = np.zeros_like(table), np.zeros_like(table)
    for a in range(len(table)):
        if not seen[a].any():
            continue
        if item.s.score.norm == "softmax":
            e = np.where(seen[a], np.exp(table[a] - table[a][seen[a]].max()), 0)
            out[a] = e / e.sum()
        elif item.s.score.norm == "accumulated":
            e = np.where(seen[a], np.exp(table[a] - table[a][seen[a]].max()), 0)
            parts[a] = e / e.sum()
        elif item.s.score.norm == "exp_rowmax":
            mates = [b for b in range(len(table)) if rows[b][0] == rows[a][0] and seen[b].any()]
            top = max(table[b][seen[b]].max() for b in mates)
            out[a] = np.where(seen[a], np.exp(table[a] - top), 0)
        else:
            out[a] = table[a]
    if item.s.score.norm == "accumulated":
        running = np.zeros(table.shape[1])
        for a in range(len(table)):
            if rows[a][1]:
                running = running * item.s.score.decay + parts[a]
            out[a] = np.where(seen[a], running, 0)
    return out


def unit_tables(item, forced):
    """For each list, for each row: {unit: score} of what competes."""
    s = item.s
    scores, shown, rows, columns = view_scores(item, forced)
    tables = []
    for table, seen in zip(scores, shown, strict=True):
        tables.append([pooled(item, table, seen, rows, columns, r) for r in range(len(item.rows))])
    return join_units(item, tables) if s.heads.when == "unit" else tables


def pooled(item, table, seen, rows, columns, r):
    s, found = item.s, {}
    mine = [a for a, (row, _, _) in enumerate(rows) if row in (r, None)]
    for u, tokens in enumerate(item.units):
        own = [c for c, (unit, _) in enumerate(columns) if unit == u]
        values = [table[a, c] for a in mine for c in own if seen[a, c]]
        if values and item.visible(
            item.rows[r], tokens, s.score.causal if s.score.qview.startswith("last") else "touch"
        ):
            found[u] = {"sum": sum(values), "max": max(values), "mean": sum(values) / len(values)}[s.score.pool]
    width = argument(s.score.smooth)
    if not width:
        return found
    near = {u: [found[v] for v in found if abs(u - v) <= width // 2] for u in found}
    return {u: max(v) if s.score.smooth.startswith("max") else sum(v) / len(v) for u, v in near.items()}


def join_units(item, tables):
    s, lists = item.s, item.s.lists(len(item.q), len(item.k))
    size = len(tables) // lists
    out = []
    for i in range(lists):
        group = tables[i * size : (i + 1) * size]
        out.append([])
        for r in range(len(group[0])):
            if s.heads.op == "best_rank":
                out[-1].append(round_robin(item, [table[r] for table in group]))
            elif size == 1:
                out[-1].append(group[0][r])
            else:
                how = {"sum": sum, "max": max, "mean": lambda v: sum(v) / len(v)}[s.heads.op]
                out[-1].append({u: how([table[r][u] for table in group]) for u in group[0][r]})
    return out


def round_robin(item, tables):
    """Everyone's best, then everyone's second, and so on; the merged order as scores."""
    orders = [ordered(item, table, every=True) for table in tables]
    merged = []
    for rank in range(len(orders[0])):
        for order in orders:
            if order[rank] not in merged:
                merged.append(order[rank])
    return {u: -float(place) for place, u in enumerate(merged)}


def ordered(item, table, every=False):
    order = sorted(table, key=lambda u: (-table[u], u))
    if every:
        for u, v in pairwise(order):
            item.near(table[u] - table[v])
    return order


def best(item, table, number):
    """The best units of a table, ties to the lowest."""
    order = ordered(item, table)
    if 0 < number < len(order):
        item.near(table[order[number - 1]] - table[order[number]])
    return set(order[: max(number, 0)])


def forced_sets(item):
    """For each query head, for each row: the forced units, and whether the row keeps all."""
    force, size = item.s.force, item.s.unit.k
    usable = [j for unit in item.units for j in unit]
    out, dense = [], []
    full = [r for r, row in enumerate(item.rows) if row]
    last = full[len(full) - force.last_rows :] if force.last_rows else []
    for h in range(len(item.q)):
        keys = item.k[h * len(item.k) // len(item.q)]
        out.append([])
        dense.append([])
        for r, row in enumerate(item.rows):
            units = set()
            if usable and force.sink:
                if force.of == "units":
                    units |= set(range(usable[0] // size, usable[0] // size + force.sink))
                else:
                    units |= {j // size for j in range(usable[0], usable[0] + force.sink)}
            for p in (item.position[i] for i in row):
                if force.of == "units":
                    units |= {p // size - back for back in range(force.local)}
                else:
                    units |= {(p - back) // size for back in range(force.local)}
            if force.exempt is not None:
                units |= {u for u, tokens in enumerate(item.units) if unlike(item, keys, tokens)}
            out[-1].append(units & item.reach(r))
            dense[-1].append(r in last or (force.exempt is not None and unlike(item, item.q[h], row)))
    return out, dense


def unlike(item, x, tokens):
    if not tokens:
        return True
    pairs = [(x[i], x[j]) for i in tokens for j in tokens]
    cosine = sum(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs) / len(pairs)
    item.near(cosine - item.s.force.exempt)
    return cosine < item.s.force.exempt


def chosen_sets(item, table, forced):
    """For one list, the units that the budget chooses in each row."""
    b, counted = item.s.budget, item.s.force.counted
    per_head = {(r, u): x for r, row in enumerate(table) for u, x in row.items()}
    rows = range(len(table))
    seen = [item.reach(r) for r in rows]
    if b.rule in ("topk", "ratio"):
        rest = [{u: x for u, x in table[r].items() if u not in forced[r]} for r in rows]
        if b.per == "head":
            return ratio_per_head(item, rest, forced, seen)
        wanted = [b.value if b.rule == "topk" else clamp(share(len(seen[r]), b.value), b) for r in rows]
        return [best(item, rest[r], wanted[r] - (len(forced[r]) if counted else 0)) for r in rows]
    if b.per == "head":
        given = {(r, u) for r in rows for u in forced[r]}
        chosen = measured(item, per_head, given if counted else set())
        sets = [{u for row, u in chosen if row == r} for r in rows]
    else:
        sets = [measured(item, table[r], forced[r] if counted else set()) for r in rows]
    if b.min or b.max is not None:
        for r in rows:
            lead = forced[r] if counted else set()
            full = {**table[r], **{u: 0.0 for u in lead if u not in table[r]}}
            number = min(clamp(len(sets[r] | lead), b), len(full))
            sets[r] = best(item, {u: x for u, x in full.items() if u not in lead}, number - len(lead))
    return sets


def ratio_per_head(item, rest, forced, seen):
    b, counted, rows = item.s.budget, item.s.force.counted, range(len(rest))
    wanted = share(sum(len(x) for x in seen), b.value) - (sum(len(x) for x in forced) if counted else 0)
    chosen = best(item, {(r, u): x for r in rows for u, x in rest[r].items()}, wanted)
    sets = [{u for row, u in chosen if row == r} for r in rows]
    if not (b.min or b.max is not None):
        return sets
    lead = [len(forced[r]) if counted else 0 for r in rows]
    return [best(item, rest[r], clamp(len(sets[r]) + lead[r], b) - lead[r]) for r in rows]


def share(count, ratio):
    return math.ceil(Fraction(str(ratio)) * count)


def clamp(number, budget):
    number = max(number, budget.min)
    return number if budget.max is None else min(number, budget.max)


def measured(item, table, lead):
    """topp, relmax, threshold over a table; `lead` comes first in the sum."""
    b = item.s.budget
    if not table and not lead:
        return set()
    if b.rule == "threshold":
        for x in table.values():
            item.near(x - b.value)
        return {u for u, x in table.items() if x >= b.value}
    if b.rule == "relmax":
        top = max(table.values())
        for x in table.values():
            item.near((x - b.value * top) if x != top else math.inf)
        return {u for u, x in table.items() if x >= b.value * top}
    order = sorted(lead) + ordered(item, {u: x for u, x in table.items() if u not in lead})
    total, running, kept = sum(table.values()), 0.0, set()
    for u in order:
        if kept:
            item.near(running - b.value * total)
            if running >= b.value * total:
                break
        kept.add(u)
        running += table.get(u, 0.0)
    if len(kept) < len(order) and kept:
        tail = order[len(kept)]
        if order[len(kept) - 1] not in lead:
            item.near(table[order[len(kept) - 1]] - table[tail])
    return kept | lead


def unit_sets(item, scores):
    forced, dense = forced_sets(item)
    lists = item.s.lists(len(item.q), len(item.k))
    if scores is None:
        tables = unit_tables(item, forced)
    else:
        scores = [scores[i * len(scores) // max(lists, len(scores))] for i in range(max(lists, len(scores)))]
        rows = range(len(item.rows))
        own = [forced[i * len(forced) // len(scores)] for i in range(len(scores))]
        tables = join_units(item, [[learned(item, x, r, f) for r in rows] for x, f in zip(scores, own, strict=True)])
    out = []
    for i in range(lists):
        h = i * len(item.q) // lists
        sets = chosen_sets(item, tables[i], forced[h])
        rows = range(len(item.rows))
        out.append([(item.reach(r) if dense[h][r] else sets[r] | forced[h][r],) for r in rows])
    return out


def learned(item, table, r, forced):
    seen = [u for u, tokens in enumerate(item.units) if item.visible(item.rows[r], tokens, item.s.score.causal)]
    middle = item.s.score.domain == "middle"
    return {u: float(table[r, u]) for u in seen if not (middle and u in forced[r])}
