"""What a selector keeps, in plain numpy: `selection_steps` for every entry of the batch, and lines."""

from __future__ import annotations

import math

from selection_steps import Item, best, join_units, unit_sets, view_scores


def reference(selector, q, k, *, scale, position, valid, causal, scores=None):
    """kept[b][list][row] is a tuple of sets, one for each of the selector's lists; and the smallest gap met."""
    kept, gap = [], math.inf
    for b in range(len(q)):
        item = Item(selector, q[b].astype(float), k[b].astype(float), scale, list(position[b]), list(valid[b]), causal)
        kept.append(line_sets(item) if selector.lines else unit_sets(item, None if scores is None else scores[b]))
        gap = min(gap, item.gap)
    return kept, gap


def line_sets(item):
    """Blocks and left-over columns of each row."""
    s, m = item.s, item.k.shape[1]
    scores, shown, slots, _ = view_scores(item, None)
    columns, diagonals = [], []
    for table, seen in zip(scores, shown, strict=True):
        column, diagonal = {}, {}
        for a, (_, [i], _) in enumerate(slots):
            for j in range(m):
                if seen[a, j]:
                    column[j] = column.get(j, 0.0) + table[a, j]
                    offset = item.position[i] - j
                    diagonal[offset] = diagonal.get(offset, 0.0) + table[a, j]
        columns.append([column])
        diagonals.append([diagonal])
    if s.heads.when == "unit":
        columns, diagonals = join_units(item, columns), join_units(item, diagonals)
    usable = [j for unit in item.units for j in unit]
    out = []
    for column, diagonal in zip(columns, diagonals, strict=True):
        first = set(range(usable[0], usable[0] + s.lines.first)) & set(column[0]) if usable else set()
        last = set(range(s.lines.last)) & set(diagonal[0])
        verticals = first | best_rest(item, column[0], first, s.lines.verticals)
        slashes = last | best_rest(item, diagonal[0], last, s.lines.slashes)
        out.append([row_lines(item, r, verticals, slashes) for r in range(len(item.rows))])
    return out


def best_rest(item, table, lead, number):
    return best(item, {x: v for x, v in table.items() if x not in lead}, number - len(lead))


def row_lines(item, r, verticals, slashes):
    size, reach = item.s.unit.k, item.reach(r)
    if not item.rows[r]:
        return set(), set()
    ends = [item.position[i] for i in item.rows[r]]
    blocks = {(p - o) // size for p in range(min(ends), max(ends) + 1) for o in slashes} & reach
    return blocks, {j for j in verticals if j <= max(ends) and j // size not in blocks}
