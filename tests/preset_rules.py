"""The rules of published systems that choose by data, restated by hand in plain numpy for one batch entry.

Each takes q (H, N, D) and k (J, M, D) of the same length or with one query, and gives a bool mask (H, N, M).
"""

from __future__ import annotations

import math

import numpy as np


def causal(n: int, m: int) -> np.ndarray:
    return np.arange(m)[None] <= np.arange(m - n, m)[:, None]


def of_heads(k: np.ndarray, heads: int) -> np.ndarray:
    """Keys of each query head."""
    return np.repeat(k, heads // len(k), 0)


def pages_of(k: np.ndarray, size: int) -> list[np.ndarray]:
    return [k[i : i + size] for i in range(0, len(k), size)]


def top(scores, count: int) -> list[int]:
    """The best indices, ties to the lowest."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: max(count, 0)]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def page_mask(pages, size: int, m: int) -> np.ndarray:
    mask = np.zeros(m, bool)
    for page in pages:
        mask[page * size : (page + 1) * size] = True
    return mask


def quest(q, k, scale, budget, page, grouped):
    heads, m = len(q), k.shape[1]
    bounds = []
    for h in range(heads):
        pages = pages_of(of_heads(k, heads)[h], page)[:-1]
        bounds.append([np.maximum(q[h, 0] * p.min(0), q[h, 0] * p.max(0)).sum() for p in pages])
    if grouped:
        group = heads // len(k)
        bounds = [np.sum(bounds[h // group * group : h // group * group + group], 0) for h in range(heads)]
    last = (m - 1) // page
    return np.stack([page_mask([*top(b, max(3, budget // page)), last], page, m)[None] for b in bounds])


def kinetics(q, k, scale, pages, page):
    heads, m, group = len(q), k.shape[1], len(q) // len(k)
    last, masks = (m - 1) // page, []
    for h in range(heads):
        j = h // group
        means = [p.mean(0) for p in pages_of(k[j], page)]
        scores = [np.mean([q[g, 0] @ mean for g in range(j * group, j * group + group)]) for mean in means]
        middle = [1 + i for i in top(scores[1:last], pages)]
        masks.append(page_mask([0, last, *middle], page, m)[None])
    return np.stack(masks)


def delta(q, k, scale, pages, local, page):
    heads, m = len(q), k.shape[1]
    attention = softmax(np.einsum("hd,hmd->hm", q[:, 0], of_heads(k, heads)) * scale).max(0)
    scores = [attention[i : i + page].sum() for i in range(0, m, page)]
    scores[max(0, len(scores) - local) :] = [math.inf] * min(local, len(scores))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return np.repeat(page_mask(order[:pages], page, m)[None, None], heads, 0)


def tidal_decode(q, k, scale, tokens):
    scores = np.einsum("hd,hmd->hm", q[:, 0], of_heads(k, len(q)))
    return np.stack([page_mask(top(row, tokens), 1, k.shape[1])[None] for row in scores])


def less_is_more(q, k, scale, tokens, recent):
    heads, m = len(q), k.shape[1]
    local = int(recent * tokens)
    scores = np.einsum("hd,hmd->hm", q[:, 0], of_heads(k, heads))[:, : max(0, m - local)]
    ranked, merged = [top(row, tokens - local) for row in scores], []
    for rank in range(len(ranked[0])):
        for row in ranked:
            if row[rank] not in merged:
                merged.append(row[rank])
    kept = [*merged[: tokens - local], *range(max(0, m - local), m)]
    return np.repeat(page_mask(kept, 1, m)[None, None], heads, 0)


def token_select(q, k, scale, tokens, sinks, local, chunk):
    heads, n, m = len(q), q.shape[1], k.shape[1]
    mask = np.zeros((heads, n, m), bool)
    for begin in range(0, n, chunk):
        end = min(begin + chunk, n)
        first = m - n + begin  # where the chunk's first query stands
        votes = np.zeros(m)
        low, high = min(sinks, m), max(min(sinks, m), first - local + 1)
        for h in range(heads):
            if high > low:
                votes[low:high] += softmax(of_heads(k, heads)[h, low:high] @ q[h, begin:end].mean(0) * scale)
        kept = [low + i for i in top(votes[low:high], tokens)] + [*range(low), *range(high, m)]
        mask[:, begin:end] = page_mask(kept, 1, m)
    return mask & causal(n, m)


def long_heads(q, k, scale, tokens, chunk):
    heads, n, m = len(q), q.shape[1], k.shape[1]
    mask = np.zeros((heads, n, m), bool)
    for h in range(heads):
        chunks = pages_of(of_heads(k, heads)[h], chunk)
        landmarks = [softmax(c @ c.mean(0) * scale) @ c for c in chunks]
        for i in range(n):
            own = (m - n + i) // chunk
            fixed = {0, own, max(own - 1, 0)}
            others = [c for c in range(own + 1) if c not in fixed]
            room = max(0, tokens // chunk - len(fixed))
            best = [others[x] for x in top([q[h, i] @ landmarks[c] for c in others], room)]
            mask[h, i] = page_mask([*fixed, *best], chunk, m)
    return mask & causal(n, m)


def hip(q, k, scale, tokens, chunk, queries, sinks, local):
    heads, n, m = len(q), q.shape[1], k.shape[1]
    mask = np.zeros((heads, n, m), bool)
    for begin in range(0, n, queries):
        rows = range(begin, min(begin + queries, n))
        first, last = m - n + rows[0], m - n + rows[-1]
        best = np.full((heads, m + chunk), -np.inf)  # each key's score with any query of the block that sees it
        for h in range(heads):
            for t in range(last + 1):
                best[h, t] = max(q[h, i] @ of_heads(k, heads)[h, t] for i in rows if m - n + i >= t)
        seen = range(last // chunk + 1)
        scores = [max(best[h, representative(best[h], c * chunk, chunk, last)] for h in range(heads)) for c in seen]
        fixed = {t // chunk for t in range(last + 1) if t < sinks or t > first - local}
        others = [c for c in seen if c not in fixed]
        kept = [*fixed, *(others[x] for x in top([scores[c] for c in others], tokens // chunk))]
        mask[:, rows] = page_mask(kept, chunk, m)
    return mask & causal(n, m)


def representative(best, start, size, last):
    """Halving: on with the half whose middle key is better, as long as there is a half to the right."""
    while size > 1:
        size //= 2
        middle = [start + size // 2, start + size + size // 2]
        if start + size <= last and best[middle[1]] > best[middle[0]]:
            start += size
    return start


def last_attention(q, k, scale, count):
    """softmax of the last queries, (count, M), and where each stands."""
    n, m = len(q), len(k)
    count = min(count, n)
    logits = np.where(causal(n, m)[n - count :], q[n - count :] @ k.T * scale, -np.inf)
    return softmax(logits), np.arange(m - count, m)


def minference_lines(q, k, scale, verticals, slashes, queries, first, last):
    heads, n, m = len(q), q.shape[1], k.shape[1]
    mask = np.zeros((heads, n, m), bool)
    for h in range(heads):
        attention, at = last_attention(q[h], of_heads(k, heads)[h], scale, queries)
        columns = attention.sum(0)
        columns[:first] = np.inf
        diagonals = np.zeros(m)
        for row, p in zip(attention, at, strict=True):
            for j in range(p + 1):
                diagonals[p - j] += row[j]
        diagonals[:last] = np.inf
        vertical, slash = top(columns, max(30, verticals)), top(diagonals, max(50, slashes))
        for begin in range(0, n, 64):
            rows = range(begin, min(begin + 64, n))
            blocks = {(m - n + i - o) // 64 for i in rows for o in slash if m - n + i - o >= 0}
            for i in rows:
                mask[h, i] = page_mask(blocks, 64, m)
                mask[h, i, vertical] = True
    return mask & causal(n, m)


def block_means(x: np.ndarray, size: int) -> np.ndarray:
    return np.stack([part.mean(0) for part in pages_of(x, size)])


def expand(blocks: np.ndarray, rows: int, size: int, n: int, m: int) -> np.ndarray:
    return np.kron(blocks, np.ones((rows, size), bool)).astype(bool)[..., :n, :m]


def minference_blocks(q, k, scale, blocks, block):
    heads, n = len(q), q.shape[1]
    found = []
    for h in range(heads):
        scores = block_means(q[h], block) @ block_means(of_heads(k, heads)[h], block).T
        kept = np.zeros(scores.shape, bool)
        for r, row in enumerate(scores):
            kept[r, [r, *top(row[:r], blocks - 1)]] = True
        found.append(expand(kept, block, block, n, n))
    return np.stack(found) & causal(n, n)


def covered(mass: np.ndarray, share: float) -> int:
    """How many of the greatest hold a share, one more than those that stay within it."""
    return int((np.cumsum(np.sort(mass)[::-1]) <= share).sum()) + 1


def flex_prefill(q, k, scale, gamma, tau, least, block):
    heads, n = len(q), q.shape[1]
    count, least = -(-n // block), -(-least // block)
    found = []
    for h in range(heads):
        keys = of_heads(k, heads)[h]
        attention, at = last_attention(q[h], keys, scale, block)
        columns, diagonals = attention.mean(0), np.zeros(n)
        for row, p in zip(attention, at, strict=True):
            for j in range(p + 1):
                diagonals[p - j] += row[j] / len(attention)
        on_blocks = np.array([columns[i : i + block].sum() for i in range(0, n, block)])
        off_blocks = np.array([diagonals[i : i + block].sum() for i in range(0, n, block)])
        estimate = softmax(block_means(keys, block) @ q[h, -block:].mean(0) * scale)
        middle = (on_blocks + estimate) / 2
        divergence = sum((x * np.log(x / middle)).sum() / 2 for x in (on_blocks, estimate)) ** 0.5
        by_blocks = divergence < tau
        numbers = [max(least, covered(x, gamma) // block + 1) for x in (columns, diagonals)]
        vertical, slash = [least, least] if by_blocks else numbers
        on_blocks[0] = off_blocks[0] = np.inf
        kept = np.zeros((count, count), bool)
        kept[:, top(on_blocks, vertical)] = True
        for offset in top(off_blocks, slash):
            kept |= np.eye(count, k=-offset, dtype=bool)
        if by_blocks:
            scores = block_means(q[h], block) @ block_means(keys, block).T * scale
            weights = softmax(np.where(np.tri(count, dtype=bool), scores, -np.inf)).ravel()
            order = top(weights, len(weights))
            held = np.cumsum(weights[order])
            kept.ravel()[order[: int((held < gamma * count).sum()) + 1]] = True
        found.append(expand(kept & np.tri(count, dtype=bool), block, block, n, n))
    return np.stack(found) & causal(n, n)


def x_attention(q, k, scale, tau, stride, block):
    heads, n = len(q), q.shape[1]
    size = -(-n // block) * block
    padded = [np.concatenate([x, np.zeros((len(x), size - n, x.shape[2]))], 1) for x in (q, of_heads(k, heads))]
    groups, count, found = size // stride, size // block, []
    alive = -(-n // stride)
    for h in range(heads):
        reverse = padded[0][h].reshape(groups, stride, -1)[:, ::-1].reshape(groups, -1)
        scores = reverse @ padded[1][h].reshape(groups, -1).T * scale / stride
        weights = softmax(np.where(np.tri(groups, dtype=bool), scores, -np.inf))
        weights[alive:] = 0
        per = block // stride
        mass = weights.reshape(count, per, count, per).sum((1, 3))
        kept = np.zeros((count, count), bool)
        for r in range(count):
            fixed = {0, r}
            order = sorted(fixed) + [u for u in top(mass[r], count) if u not in fixed]
            held = 0.0
            for u in order:
                if u in fixed or held < tau * mass[r].sum():
                    kept[r, u] = u <= r
                held += mass[r, u]
        found.append(expand(kept, block, block, n, n))
    return np.stack(found) & causal(n, n)


def flash_prefill(q, k, scale, alpha, block, sinks, local, last_rows, least):
    heads, n = len(q), q.shape[1]
    count, found = -(-n // block), []
    for h in range(heads):
        means = block_means(of_heads(k, heads)[h], block)
        kept = np.zeros((count, count), bool)
        for r in range(count):
            rows = np.arange(r * block, min((r + 1) * block, n))
            ends = np.minimum((np.arange(count) + 1) * block, n) - 1
            past = ends[None] <= rows[:, None]
            logits = np.where(past, q[h, rows] @ means.T * scale, -np.inf)
            scores = np.exp(logits - logits.max()).sum(0) if past.any() else np.zeros(count)
            if past.any():
                kept[r] = (scores >= alpha * scores.max()) & past.any(0)
                kept[r, [u for u in top(scores, least) if past[:, u].any()]] = True
            kept[r, :sinks] = True
            kept[r, max(0, r - local + 1) : r + 1] = True
            kept[r] |= r >= count - last_rows
        found.append(expand(kept & np.tri(count, dtype=bool), block, block, n, n))
    return np.stack(found) & causal(n, n)


def dhsa(q, k, scale, density, queries, block):
    heads, n = len(q), q.shape[1]
    keys = of_heads(k, heads)
    scores = np.mean([block_means(q[h], queries) @ block_means(keys[h], block).T for h in range(heads)], 0)
    kept = np.zeros(scores.shape, bool)
    for r, row in enumerate(scores):
        last = min((r + 1) * queries, n) - 1
        seen = last // block + 1
        fixed = {0, *range(r * queries // block, seen)}
        others = [u for u in range(seen) if u not in fixed]
        room = max(0, math.ceil(round(density * seen, 9)) - len(fixed))
        kept[r, [*fixed, *(others[i] for i in top(row[others], room))]] = True
    return np.repeat((expand(kept, queries, block, n, n) & causal(n, n))[None], heads, 0)


def self_similarity(x: np.ndarray) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (unit @ unit.T).mean()


def sparge_attention(q, k, scale, mass, similarity, queries, block):
    heads, n, m, found = len(q), q.shape[1], k.shape[1], []
    for h in range(heads):
        keys = of_heads(k, heads)[h]
        rows = [self_similarity(x) < similarity for x in pages_of(q[h], queries)]
        columns = np.array([self_similarity(x) < similarity for x in pages_of(keys, block)])
        scores = block_means(q[h], queries) @ block_means(keys, block).T * scale
        kept = np.zeros(scores.shape, bool)
        for r, row in enumerate(scores):
            if not columns.all():
                weights = softmax(np.where(columns, -np.inf, row))
                order = top(weights, len(weights))
                kept[r, order[: int((np.cumsum(weights[order]) < mass).sum()) + 1]] = True
            kept[r] |= columns | rows[r]
        found.append(expand(kept, queries, block, n, m))
    return np.stack(found)


def moba(q, k, scale, keep, chunk):
    heads, n, m = len(q), q.shape[1], k.shape[1]
    mask = np.zeros((heads, n, m), bool)
    for h in range(heads):
        means = block_means(of_heads(k, heads)[h], chunk)
        for i in range(n):
            own = (m - n + i) // chunk
            gates = means[: own + 1] @ q[h, i]
            gates[own] = np.inf
            mask[h, i] = page_mask(top(gates, keep), chunk, m)
    return mask & causal(n, m)


def nsa_selection(q, k, scale, keep, block):
    heads, n, m, group = len(q), q.shape[1], k.shape[1], len(q) // len(k)
    mask = np.zeros((heads, n, m), bool)
    for j in range(len(k)):
        means = block_means(k[j], block)
        for i in range(n):
            p = m - n + i
            own = p // block
            past = [u for u in range(len(means)) if min((u + 1) * block, m) - 1 <= p]
            votes = np.zeros(own + 1)
            for h in range(j * group, j * group + group):
                if past:
                    votes[past] += softmax(means[past] @ q[h, i] * scale)
            fixed = {0, own, max(own - 1, 0)}
            others = [u for u in past if u not in fixed]
            best = [others[x] for x in top(votes[others], keep - len(fixed))]
            mask[j * group : j * group + group, i] = page_mask([*fixed, *best], block, m)
    return mask & causal(n, m)


def vsa(q, k, scale, sparsity, tile):
    heads, n, m, found = len(q), q.shape[1], k.shape[1], []
    for h in range(heads):
        scores = block_means(q[h], tile) @ block_means(of_heads(k, heads)[h], tile).T
        kept = np.zeros(scores.shape, bool)
        for r, row in enumerate(scores):
            kept[r, top(row, math.ceil(round((1 - sparsity) * len(row), 9)))] = True
        found.append(expand(kept, tile, tile, n, m))
    return np.stack(found)
