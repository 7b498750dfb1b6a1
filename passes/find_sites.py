"""Find sites: anchor at SDPA or softmax, and walk outward through operations that only transform the score."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from sparsify.errors import Refusal
from sparsify.passes.aliasing import Writes
from sparsify.passes.forms.heads import merged_from, split_heads, unrepeat
from sparsify.passes.forms.products import Weighted, weighted
from sparsify.passes.forms.scores import Scores, climb, reaches_product, regroups
from sparsify.passes.forms.sources import kind_of
from sparsify.passes.forms.whole import bodies, is_whole, whole_site
from sparsify.passes.nodes import (
    ATEN,
    CASTS,
    COPIES,
    VIEWS,
    argument,
    call,
    dtype,
    keeps_numbers,
    module_path,
    op,
    same,
    same_sizes,
    shape,
)
from sparsify.passes.runner import Capture
from sparsify.passes.site import Mask, Site


@dataclass(frozen=True)
class FindSites:
    """Forms to sites.

    Before: matmul(q, transpose(k)) > mul > add > softmax > to > dropout(eval) > matmul(v), or one SDPA call.
    After:  the graph computes what it did; `capture.sites` has a Site with q, k, v (KV heads not repeated; nodes that
            may be new, in front of the output), scale, softcap and masks, or with a Refusal that names the node that
            could not be followed.
    """

    def __call__(self, capture: Capture) -> None:
        for node in list(capture.graph.nodes):
            for site in [_site(node), *_inside(node)]:
                if site is not None:
                    _add(site, node, capture)


def _add(site: Site, node: fx.Node, capture: Capture) -> None:
    site.address = module_path(node, capture.names) or capture.home
    site.layer = _layer(site.address, len(capture.sites))
    if site.refusal is None:
        site.kind = kind_of(site.q, site.k)
    capture.sites.append(site)


def _inside(node: fx.Node) -> list[Site]:
    """The sites of graphs that a node decides to call, all refused: what is known of them ends at that node."""
    found = [_site(inner) for body in bodies(node) for inner in list(body.nodes)]
    sites = [Site(node, node, site.form) for site in found if site is not None]
    for site in sites:
        reason = f"the attention is inside a graph that {getattr(node.target, '_name', node.name)} calls"
        site.refuse(reason, "call the module without it, or under torch.no_grad() if it is a checkpoint")
    return sites


def _layer(address: str, ordinal: int) -> int:
    """The one integer of the module path, else the site's place in the graph."""
    numbers = [int(part) for part in address.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else ordinal


def _site(node: fx.Node) -> Site | None:
    name = op(node)
    if name == "scaled_dot_product_attention":
        return _from_sdpa(node)
    if name in ("softmax", "_softmax", "_safe_softmax", "special_softmax"):
        return _from_softmax(node)
    if is_whole(node):
        return whole_site(node)
    return None


def _from_sdpa(node: fx.Node) -> Site:
    q, k, v = node.args[:3]
    site = Site(node, node, "sdpa")
    if len(shape(q)) not in (3, 4):
        site.refuse(f"q has {len(shape(q))} dimensions", "SDPA over 3 or 4 dimensions is rewritten")
        return site
    if argument(node, "dropout_p", 0.0):
        site.refuse("dropout is active", "call model.eval()")
        return site
    scale = argument(node, "scale")
    site.scale = shape(q)[-1] ** -0.5 if scale is None else _number(scale)
    site.causal = bool(argument(node, "is_causal", False))
    mask = argument(node, "attn_mask")
    if mask is not None:
        import torch

        site.masks = [Mask("bool" if dtype(mask) == torch.bool else "add", mask)]
    if len(shape(q)) == 3:
        _lift(site, q, k, v, node)
    else:
        _set_heads(site, q, k, v, node)
    return site


def _number(scale: Any) -> Any:
    return scale.meta["val"] if isinstance(scale, fx.Node) else scale


def _from_softmax(node: fx.Node) -> Site | None:
    if argument(node, "dim") not in (-1, len(shape(node)) - 1) or len(shape(node)) < 3:
        return None
    end, steps, problem = _descend(node)
    if end is None:
        origin = None if problem is None else reaches_product(node.args[0])
        if origin is None:
            return None
        site = Site(node, node, "matmul > softmax")
        site.refusal = problem
        return site
    output, found = end
    scores = climb(node.args[0], node)
    if not scores:
        if reaches_product(node.args[0]) is None:
            return None  # a router or a pooling head: a softmax, but no product of queries and keys
        site = Site(node, output, "matmul > ... > softmax > matmul")
        site.refusal = scores
        return site
    site = Site(node, output, " > ".join([*scores.steps, "softmax", *steps, op(output)]))
    _check_path(site, scores)
    if site.refusal is None:
        _fill(site, scores, found)
    return site


def _check_path(site: Site, scores: Scores) -> None:
    """Refuses scores that are written to between two steps, and masks that are made of the scores."""
    path = [*scores.path, site.anchor]
    writes = Writes(site.anchor.graph)
    for node, reader in pairwise(path):
        writer = writes.between(node, reader)
        if writer is not None:
            site.refuse(f"{node.name} is changed in place by {writer.name} before the softmax", node=writer)
    for mask in scores.masks:
        if _is_made_of(mask.node, path[0]):
            hint = "kernels that never store the scores can't compute it"
            site.refuse(f"the mask {mask.node.name} is made of the scores", hint)


def _is_made_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node depends on another one, by the nodes between them."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current is source:
            return True
        if current not in seen and source < current:
            seen.add(current)
            queue.extend(current.all_input_nodes)
    return False


def _descend(node: fx.Node) -> tuple[Any, list[str], Refusal | None]:
    """From a softmax to the product with the values: ((product, values), steps, None), or why not."""
    steps: list[str] = []
    while True:
        users = list(node.users)
        products = [user for user in users if _weighs(user, node)]
        if products and len(users) > 1:
            return None, steps, _used_elsewhere(node, users, products[0])
        if products:
            found = weighted(products[0], node, products[0])
            if found is None:
                return None, steps, Refusal("this product of weights and values is not followed", str(products[0]))
            return (products[0], found), steps, None
        through = [user for user in users if _is_step(user, node)]
        if len(users) > 1 and any(_leads_to_product(user) for user in through):
            return None, steps, _used_elsewhere(node, users, None)
        if len(users) != 1:
            return None, steps, None
        if not through:
            follow = users[0].op == "call_function" and _leads_to_product(users[0])
            reason = f"the weights pass through {op(users[0]) or users[0].name}"
            return None, steps, Refusal(reason, str(users[0])) if follow else None
        if op(users[0]) == "dropout":
            if argument(users[0], "train") and argument(users[0], "p"):
                return None, steps, Refusal("dropout is active", str(users[0]), "call model.eval()")
            steps.append("dropout(eval)")
        elif op(users[0]) in CASTS:
            steps.append("to")
        node = users[0]


def _used_elsewhere(node: fx.Node, users: list[fx.Node], product: fx.Node | None) -> Refusal:
    others = ", ".join(user.name for user in users if user is not product)
    hint = "turn off output_attentions: a kernel that never stores the weights can't return them"
    return Refusal(f"the attention weights are also used by {others}", str(node), hint)


def _weighs(user: fx.Node, node: fx.Node) -> bool:
    name = op(user)
    if name in ("matmul", "bmm", "__matmul__"):
        return user.args[0] is node
    return name == "einsum" and node in user.args[1]


def _is_step(user: fx.Node, node: fx.Node) -> bool:
    if op(user) in (*CASTS, *COPIES, "dropout"):
        return user.args[0] is node and keeps_numbers(user)
    return op(user) in (*VIEWS, "expand", "slice") and regroups(node, user)


def _leads_to_product(node: fx.Node, depth: int = 6) -> bool:
    """Whether a value that comes from the weights is soon multiplied with something: an attention, then."""
    if depth == 0:
        return False
    return any(_weighs(user, node) or _leads_to_product(user, depth - 1) for user in node.users)


def _fill(site: Site, scores: Scores, found: Weighted) -> None:
    if scores.in_tanh:
        scores.softcap = 1.0
    site.scale, site.softcap, site.masks = scores.scale, scores.softcap, scores.masks
    site.heads_known = not scores.product.reordered
    q, k, v, before = scores.product.left, scores.product.right, found.values, site.output
    for name, factor in scores.multipliers:
        q = call(before, ATEN.mul.Tensor if name == "mul" else ATEN.div.Tensor, q, factor)
    ranks = [len(shape(n)) for n in (site.anchor, q, k, v)]
    if not set(ranks) <= {3, 4}:
        site.refuse(f"the scores have {ranks[0]} dimensions", "scores (B, H, Nq, Nk) and (B, Nq, Nk) are rewritten")
        return
    if not _is_unbroadcast(shape(site.anchor), shape(q), shape(k)):
        site.refuse(f"the scores {shape(site.anchor)} are broadcast beyond those of q {shape(q)} and k {shape(k)}")
        return
    site.output_order = found.order
    heads = _merged_heads(site, q, k, v) if ranks[1:] != [4, 4, 4] else None
    if heads is not None:
        site.merged = ranks[3] == 3
        _set_heads(site, *(split_heads(n, heads, before) for n in (q, k, v)), before)
    elif set(ranks) == {3}:
        _lift(site, q, k, v, before)
    elif set(ranks) == {4}:
        _set_heads(site, q, k, v, before)
    else:
        site.refuse("batch and heads are one dimension in some of q, k and v and two in others")


def _is_unbroadcast(scores: tuple[Any, ...], q: tuple[Any, ...], k: tuple[Any, ...]) -> bool:
    """Whether the scores have the batch and the heads of q, which may be merged there, and all its queries and keys."""
    batch = (scores[0] * scores[1],) if len(scores) == 4 and len(q) == 3 else scores[:-2]
    return same_sizes((*batch, *scores[-2:]), (*q[:-1], k[-2]))


def _merged_heads(site: Site, q: fx.Node, k: fx.Node, v: fx.Node) -> int | None:
    """The number of heads that q, k and v (B*H, N, D) have merged into their first dimension, if it is known."""
    if len(shape(site.anchor)) == 4:
        heads = shape(site.anchor)[1]
        return heads if isinstance(heads, int) else None
    if any(len(shape(mask.node)) > 2 for mask in site.masks) or site.output_order is not None:
        return None
    found = {shape(source)[1] if (source := merged_from(n)) is not None else None for n in (q, k, v)}
    heads = found.pop()
    return heads if not found and isinstance(heads, int) else None


def _lift(site: Site, q: fx.Node, k: fx.Node, v: fx.Node, before: fx.Node) -> None:
    """(B, N, D) is (B, 1, N, D): one head."""
    site.q, site.k, site.v = (call(before, ATEN.unsqueeze.default, n, 1) for n in (q, k, v))
    site.lifted, site.heads_known = True, False
    for mask in site.masks:
        if len(shape(mask.node)) == 3:
            mask.node = call(before, ATEN.unsqueeze.default, mask.node, 1)


def _set_heads(site: Site, q: fx.Node, k: fx.Node, v: fx.Node, before: fx.Node) -> None:
    """Sets q, k, v with repeated KV heads taken back, where both are repeated alike."""
    heads = shape(q)[1]
    short_k, short_v = unrepeat(k, 1, before), unrepeat(v, 1, before)
    if same(shape(short_k)[1], shape(short_v)[1]):
        k, v = short_k, short_v
    site.q, site.k, site.v = q, k, v
    kv_heads = shape(k)[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        site.refuse("the number of heads is dynamic", "mark the head dimension as static")
    elif heads % kv_heads or not same(kv_heads, shape(v)[1]):
        site.refuse(f"{heads} query heads are no multiple of {kv_heads} key heads and {shape(v)[1]} value heads")
