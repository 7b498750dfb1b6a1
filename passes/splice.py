"""Splice: one op in place of each attention."""

from __future__ import annotations

import json
import operator
from dataclasses import asdict, dataclass

import torch
from torch import fx

from sparsify.op import attention, probed
from sparsify.passes.attach_spec import info
from sparsify.passes.choose_target import program_of
from sparsify.passes.forms.axes import EXPANDS, PERMUTES, REGROUPS
from sparsify.passes.nodes import ATEN, CASTS, COPIES, call, dtype, op, same, same_sizes, shape, size, value
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.selection.compensate import Dropped, attention_compensated
from sparsify.text import to_text

VIEWS = ("view", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "expand", "alias", "mT", "detach")


@dataclass(frozen=True)
class Splice:
    """Sites to ops.

    Before: arange > le > and > where > scaled_dot_product_attention(q, repeated k, repeated v, mask)
    After:  sparsify.attention(q, k, v, [], 0, 0.125, program); what only fed the old attention is gone.

    probe: the number of a `sparsify.planner.probe.Probe`: then the op is the one that asks this probe.
    """

    probe: int | None = None

    def __call__(self, capture: Capture) -> None:
        for site in capture.open_sites():
            old, new = site.output, _splice(site, self.probe)
            for other in capture.sites if new is not None else ():
                _read_instead(other, old, new)
        capture.graph.eliminate_dead_code()


def _splice(site: Site, probe: int | None) -> fx.Node | None:
    """The node that replaces the site's output; None where the site had to be refused."""
    old, new = site.output, rewritten(site, site.v, probe)
    if not same_kind(new, old):
        found, wanted = (f"{tuple(shape(n))} {dtype(n)}" for n in (new, old))
        return site.refuse(f"the kernel's output would be {found}, the attention's is {wanted}")
    old.replace_all_uses_with(new)
    forget_strides(new)
    return new


def _read_instead(site: Site, old: fx.Node, new: fx.Node) -> None:
    """A site that reads the output of another, with nothing between them, reads what replaces it."""
    for name in ("q", "k", "v"):
        if getattr(site, name) is old:
            setattr(site, name, new)


def rewritten(site: Site, values: fx.Node, probe: int | None = None) -> fx.Node:
    """New nodes that compute a site's output by the op, with values (B, Hkv, Nk, Dv) in the place of v."""
    before, made_of = site.output, _computed_in(site)
    q, k, v = (_prepared(node, site, made_of) for node in (site.q, site.k, values))
    given = (q, k, v, list(site.loads), site.q_offset, float(site.scale), program_of(site).text())
    if probe is not None:
        new = call(before, probed, *given, described(site), probe)
    elif site.dropped:
        found = call(before, attention_compensated, *given, Dropped.of(site.dropped).text())
        new = call(before, operator.getitem, found, 0)
    else:
        new = call(before, attention, *given)
    if made_of != dtype(before):
        new = call(before, ATEN.to.dtype, new, dtype(before))
    return new if site.restore is None else site.restore(new)


def described(site: Site) -> str:
    """What a probe is told of a site beside its tensors, as JSON: its `SiteInfo` and a query's position."""
    return json.dumps({**asdict(info(site)), "position": to_text(site.position), "placed": site.positions_known})


def same_kind(new: fx.Node, old: fx.Node) -> bool:
    return dtype(new) == dtype(old) and value(new).device == value(old).device and same_sizes(shape(new), shape(old))


def _computed_in(site: Site) -> torch.dtype:
    """The output's dtype, where q, k and v lose nothing in it; else the widest of theirs: scores of float32 whose
    weights were cast down are still made of float32."""
    made_of = dtype(site.output)
    for node in (site.q, site.k, site.v):
        if not _fits(node, made_of):
            made_of = torch.promote_types(made_of, dtype(node))
    return made_of


def _fits(node: fx.Node, wanted: torch.dtype) -> bool:
    """Whether a tensor is one of a dtype, or was just cast from it."""
    while torch.promote_types(dtype(node), wanted) != wanted:
        if op(node) not in (*CASTS, *COPIES, *REGROUPS, *PERMUTES, *EXPANDS):
            return False
        node = node.args[0]
    return True


def _prepared(node: fx.Node, site: Site, made_of: torch.dtype) -> fx.Node:
    """q, k or v in one dtype (autocast makes them differ) and in q's batch size."""
    if dtype(node) != made_of:
        node = call(site.output, ATEN.to.dtype, node, made_of)
    if not same(shape(node)[0], shape(site.q)[0]):
        node = call(site.output, ATEN.expand.default, node, [size(site.output, site.q, 0), -1, -1, -1])
    return node


def forget_strides(node: fx.Node) -> None:
    """The new output may have other strides than the old: a view that relied on them becomes a reshape."""
    for user in list(node.users):
        if op(user) in VIEWS:
            if op(user) == "view" and user.target is ATEN.view.default:
                user.target = ATEN.reshape.default
            forget_strides(user)
