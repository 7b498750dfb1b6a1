"""An SDPA call as an attention in axes."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.passes.forms.arrange import Unplaced
from sparsify.passes.forms.assemble import Parts
from sparsify.passes.forms.axes import Axis, Dim, Layout, aligned, fresh
from sparsify.passes.forms.products import Factor
from sparsify.passes.forms.scores import Side
from sparsify.passes.nodes import argument, dtype, same, shape, value
from sparsify.passes.site import Site


def from_sdpa(site: Site) -> Parts:
    """The parts of scaled_dot_product_attention(q (..., H, Nq, D), k, v), whose heads may be grouped."""
    node = site.anchor
    q, k, v = node.args[:3]
    if argument(node, "dropout_p", 0.0):
        raise Unplaced("dropout is active: call model.eval()")
    scale = argument(node, "scale")
    site.scale = shape(q)[-1] ** -0.5 if scale is None else value(scale)
    site.causal = bool(argument(node, "is_causal", False))
    if not shape(k)[-2] == shape(v)[-2]:  # one symbol from here on, where caches of keys and values came with two
        raise Unplaced(f"there are {shape(k)[-2]} keys and {shape(v)[-2]} values")
    rows, keys, inner, values = (fresh((n,))[0] for n in (shape(q)[-2], shape(k)[-2], shape(q)[-1], shape(v)[-1]))
    batch = _batch(site, [shape(n)[:-2] for n in (q, k, v)])
    tensors = [(q, (rows, inner)), (k, (keys, inner)), (v, (keys, values))]
    q_factor, k_factor, v_factor = (Factor(n, (*_of(batch, n), *ends)) for n, ends in tensors)
    scores = (*batch, rows, keys)
    mask = argument(node, "attn_mask")
    masks = []
    if mask is not None:
        kind: Any = "bool" if dtype(mask) == torch.bool else "add"
        masks = [Side(mask, aligned(mask, scores), kind)]
    made = (*batch, rows, values)
    return Parts(q_factor, k_factor, v_factor, rows, keys, scores, made, [scores], masks)


def _batch(site: Site, sizes: list[tuple[Any, ...]]) -> Layout:
    """The leading dimensions; KV heads that are fewer are each shared by several query heads in a row."""
    widest = max(sizes, key=len)
    found: list[Dim] = []
    for i in range(-len(widest), 0):
        given = [size[i] for size in sizes if len(size) >= -i and not same(size[i], 1)]
        found.append((Axis(given[0]),) if given else ())
    if len(widest) >= 1 and argument(site.anchor, "enable_gqa", False):
        heads, shared = sizes[0][-1], sizes[1][-1]
        if not isinstance(heads, int) or not isinstance(shared, int) or heads % shared or shared != sizes[2][-1]:
            raise Unplaced(f"{heads} query heads are no multiple of {shared} key and {sizes[2][-1]} value heads")
        if found[-1] and 1 < shared < heads:
            found[-1][0].parts = (Axis(shared), Axis(heads // shared))
    return tuple(found)


def _of(batch: Layout, node: Any) -> Layout:
    """The leading dimensions of one tensor."""
    sizes = shape(node)[:-2]
    inner = batch[len(batch) - len(sizes) :]
    found = []
    for dim, size in zip(inner, sizes, strict=True):
        parts = dim[0].parts if dim else ()
        grouped = bool(parts) and not same(size, dim[0].size)
        found.append(() if same(size, 1) else parts[:1] if grouped else dim)
    return tuple(found)
