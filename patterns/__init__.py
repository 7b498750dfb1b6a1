"""Patterns: which (head, query, key) triples an attention keeps.

    from sparsify.patterns import causal, sinks, window
    streaming = (sinks(4) | window(1024)) & causal()

A pattern is a frozen, hashable value; `&`, `|` and `~` compose them. To add one, write a file like its neighbours
here and name its constructor in `PATTERNS` (`examples/add_a_pattern.py` walks through it).
"""

if __name__ != "sparsify.patterns":
    raise ImportError("import sparsify.patterns, not the bare folder patterns")

from sparsify.patterns.block_window import block_window
from sparsify.patterns.causal import causal
from sparsify.patterns.column_stride import column_stride
from sparsify.patterns.dense import dense
from sparsify.patterns.dilated import dilated
from sparsify.patterns.expression import expr
from sparsify.patterns.global_tokens import global_tokens
from sparsify.patterns.neighborhood import neighborhood
from sparsify.patterns.pattern import Pattern
from sparsify.patterns.presets import PRESETS
from sparsify.patterns.same_block import same_block
from sparsify.patterns.select import compensation, online, select, topk, topp
from sparsify.patterns.sinks import sinks
from sparsify.patterns.window import window

_CONSTRUCTORS = (
    dense,
    causal,
    window,
    sinks,
    dilated,
    same_block,
    block_window,
    column_stride,
    global_tokens,
    neighborhood,
    expr,
)
SELECTIONS = (select, topk, topp, online, compensation)  # those that need the data
# Every constructor that a spec can name, under that name: the primitives and the presets.
PATTERNS = {constructor.__name__: constructor for constructor in (*_CONSTRUCTORS, *SELECTIONS, *PRESETS)}

__all__ = ["PATTERNS", "PRESETS", "SELECTIONS", "Pattern", *(made.__name__ for made in (*_CONSTRUCTORS, *SELECTIONS))]
