"""Operators that hide an attention, and those that hold whole graphs: what is left of them after canonicalising."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from sparsify.passes.canonical.flex import masks_by_blocks
from sparsify.passes.nodes import op
from sparsify.passes.site import Site

FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
FLEX = "flex_attention"


def is_whole(node: fx.Node) -> bool:
    """Whether a node hides an attention that no plain operators stand beside."""
    if op(node) not in FUSED and getattr(node.target, "_name", None) != FLEX:
        return False
    readers = [node, *(user for user in node.users if user.target is operator.getitem)]
    return not any(op(user) == "sparsify::either" for reader in readers for user in reader.users)


def whole_site(node: fx.Node) -> Site:
    """The site of such a node, refused with the reason that it was not opened for."""
    name = op(node) or FLEX
    site = Site(node, node, name)
    others = [user for user in node.users if user.target is operator.getitem and user.args[1] != 0 and user.users]
    if others and name == FLEX:
        site.refuse("the log-sum-exp of flex_attention is used, too", "call it without return_lse and return_aux")
    elif others:
        site.refuse("the attention weights are also used", "call the layer with need_weights=False")
    elif name == FLEX and masks_by_blocks(_block_mask(node)):
        site.refuse(
            "the block mask has lists of blocks and no mask_mod, and nothing but a run can tell what they leave out",
            "make it with create_block_mask and a mask_mod that says what is kept",
        )
    elif name == FLEX:
        site.refuse(
            "score_mod or mask_mod works on more than single elements",
            "index captured tensors down to one element, with [b, h, q, k] as they are given",
        )
    else:
        site.refuse("an attention over nested tensors", "pad the batch: pass enable_nested_tensor=False")
    return site


def _block_mask(node: fx.Node) -> tuple[Any, ...]:
    """The operator's block mask with the graph of its mask_mod in place of the name."""
    *lists, mask_mod = node.args[4]
    return *lists, getattr(node.graph.owning_module, str(mask_mod.target), None)


def bodies(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order operator calls; flex_attention's are those of its functions."""
    if not isinstance(node.target, HigherOrderOperator) or node.target._name == FLEX:
        return []
    owner = node.graph.owning_module
    held = [getattr(owner, str(arg.target), None) for arg in node.all_input_nodes if arg.op == "get_attr"]
    return [module.graph for module in held if isinstance(module, fx.GraphModule)]
