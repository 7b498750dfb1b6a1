"""Selection: the pipeline of a `Selector` as plain tensor operations of fixed capacity.

No `nonzero`, `unique` or `item`, and no shape that depends on data: under torch.compile a choice is part of the graph.

Letters of shapes: B batch, H query heads, J key heads, L lists (1, J or H), N queries, R rows of queries that share a
choice, M keys, U units of keys, A and C what the views of queries and keys hold, C capacity where an index ends on it.
Masks and positions have batch 1 where nothing differs in the batch.
"""

from sparsify.selection.choose import choose

__all__ = ["choose"]
