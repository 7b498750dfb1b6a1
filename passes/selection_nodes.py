"""The nodes of a selection: the op that chooses, what it keeps between steps, the module that scores units."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from sparsify.errors import InputError
from sparsify.expr import TRUE, Expr, Load, Pred, Var, as_expr
from sparsify.passes.nodes import ATEN, call, hint, same, shape, size, value
from sparsify.passes.runner import Capture
from sparsify.passes.site import Site
from sparsify.patterns.head_rules import Lifetimes
from sparsify.patterns.reuse import Reuse
from sparsify.patterns.selector import Selector
from sparsify.selection.accumulate import buffers as sums_of
from sparsify.selection.accumulate import select_summed
from sparsify.selection.lifetimes import expiry
from sparsify.selection.site import Ask, lists_of, outputs, segments_of, select, usable_keys
from sparsify.selection.steps import Held, buffers, select_again

Learned = Mapping[str, Any]  # a module by its name, or several by the number of their layer


@dataclass(frozen=True)
class Lists:
    """The nodes of one choice, what `select` gives in turn, and the lengths that they are for."""

    nodes: tuple[fx.Node, ...]
    lengths: tuple[Any, Any]

    def fit(self, site: Site) -> bool:
        """Whether a site has those lengths, too; a guard says so for symbolic ones, as caches grow alike."""
        return all(bool(a == shape(node)[2]) for a, node in zip(self.lengths, (site.q, site.k), strict=True))

    def atoms(self, site: Site, selector: Selector) -> Pred:
        """The lists as one predicate, over new loads of the site; their order of the keys becomes the site's."""
        first = len(site.loads)
        site.loads += self.nodes
        site.load_names += tuple(node.name for node in self.nodes)
        heads = shape(site.q)[1], shape(site.k)[1]
        listed = lists_of(selector, first, *heads, _row(site, selector.unit.q))
        segments = segments_of(selector, len(site.loads) - 1, *heads, site.position)
        if segments is None:
            return listed
        site.segments = segments
        return segments.chosen(listed)


def _row(site: Site, unit: int) -> Expr:
    """A query's number from the first query on; 0 where all queries share one row of lists."""
    q_len = shape(site.q)[2]
    if isinstance(q_len, int) and q_len <= unit:
        return as_expr(0)
    return Var("q") - (as_expr(site.q_offset) if isinstance(site.q_offset, int) else Var("N") - Var("Nq"))


@dataclass(frozen=True)
class Chooser:
    """Makes the nodes of a choice, in front of a site's output."""

    capture: Capture
    learned: Learned = field(default_factory=dict)

    def lists(self, site: Site, selector: Selector, reuse: Reuse, causal: bool) -> Lists | None:
        """The nodes; None where the site had to be refused."""
        before, k = site.output, site.k
        one = bool(same(shape(site.q)[2], 1))
        ask = Ask(selector, site.position, usable_keys(site.keep, one), causal)
        if not same(shape(k)[0], shape(site.q)[0]):
            k = call(before, ATEN.expand.default, k, [size(before, site.q, 0), -1, -1, -1])
        given = (site.q, k, list(site.loads))
        numbers = (site.q_offset, float(site.scale))
        if reuse.by_steps and one:
            held = self._kept(site, k, buffers, "a choice that holds for several steps", selector, reuse)
            found = held and call(before, select_again, *given, *numbers, Held.of(ask, reuse).text(), *held)
        elif selector.score.norm == "accumulated" and one:
            sums = self._kept(site, k, sums_of, "a sum that goes on", selector, reuse)
            found = sums and call(before, select_summed, *given, *numbers, ask.text(), *sums)
        else:
            scores = None if selector.learned is None else self._unit_scores(site, k, selector)
            found = call(before, select, *given, scores, *numbers, ask.text()) if site.open else None
        if found is None:
            return None
        parts = tuple(call(before, operator.getitem, found, i) for i in range(outputs(selector)))
        return Lists(parts, (shape(site.q)[2], shape(k)[2]))

    def living(self, site: Site, lifetimes: Lifetimes) -> Pred:
        """The keys whose last position isn't before the query, over a new load of the site."""
        types = self._scores(site, site.k, lifetimes.learned)
        if types is None:
            return TRUE
        found, (heads, kv_heads) = tuple(value(types).shape), (shape(site.q)[1], shape(site.k)[1])
        if len(found) != 4 or found[1] != kv_heads or found[3] != 3:
            site.refuse(f"the module '{lifetimes.learned}' gives {found}, not types (batch, {kv_heads}, keys, 3)")
            return TRUE
        node = call(site.output, expiry, types, lifetimes.window)
        which = as_expr(0) if kv_heads == 1 else Var("h") if kv_heads == heads else Var("h") // (heads // kv_heads)
        last = Load(f"_{len(site.loads)}", (Var("b"), which, Var("k")))
        site.loads += (node,)
        site.load_names += (node.name,)
        return last >= site.position

    def _kept(
        self, site: Site, k: fx.Node, make: Any, what: str, selector: Selector, reuse: Reuse
    ) -> list[fx.Node] | None:
        """Buffers of the graph, one row for each of the batch; None where the site had to be refused.

        The model's graphs share them: decoding goes on where Dynamo compiles the same step anew.
        """
        batch, heads, _, head_dim = shape(site.q)
        if not isinstance(batch, int):
            return site.refuse(f"{what} is kept for each row of a batch of fixed size")
        try:
            made = make(selector, batch, heads, shape(k)[1], head_dim, value(site.q).device)
        except InputError as error:
            return site.refuse(str(error))
        key = (site.address, site.use, selector, reuse, *((one.shape, one.device) for one in made.values()))
        made = self.capture.kept.setdefault(key, made)
        return [self._buffer(site.output, f"kept_{site.output.name}_{name}", held) for name, held in made.items()]

    def _buffer(self, before: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        """A new buffer of the graph, read before a node."""
        self.capture.module.register_buffer(name, tensor)
        with self.capture.graph.inserting_before(before):
            node = self.capture.graph.get_attr(name)
        node.meta["val"] = detect_fake_mode([value(before)]).from_tensor(tensor, static_shapes=True)
        return node

    def _unit_scores(self, site: Site, k: fx.Node, selector: Selector) -> fx.Node | None:
        """The scores of units that a module gives, of the shape that `choose` takes."""
        scores = self._scores(site, k, str(selector.learned))
        if scores is None:
            return None
        (batch, heads, queries, _), (_, kv_heads, keys, _), unit = shape(site.q), shape(k), selector.unit
        rows = 1 if same(queries, 1) else -(-queries // unit.q)
        wanted, found = (batch, rows, -(-keys // unit.k)), shape(scores)
        right = len(found) == 4 and found[1] in (1, kv_heads, heads)
        if not right or any(hint(a) != hint(b) for a, b in zip(wanted, (found[0], *found[2:]), strict=True)):
            counts = ", ".join(map(str, sorted({1, kv_heads, heads})))
            allowed = f"(batch {batch}, heads {counts}, rows {rows}, units {wanted[2]})"
            return site.refuse(f"the module '{selector.learned}' gives {tuple(found)}, not scores {allowed}")
        return scores

    def _scores(self, site: Site, k: fx.Node, name: str) -> fx.Node | None:
        """What a module gives for q and k."""
        module = self.learned.get(name)
        if not isinstance(module, nn.Module) or isinstance(module, nn.ModuleList):
            module = _of_layer(module, site.layer)
        if module is None:
            advice = f"give options={{'learned': {{'{name}': module}}}}, or a list or mapping of modules by layer"
            return site.refuse(f"no module '{name}' was given that scores the units of layer {site.layer}", advice)
        target = f"learned_{name}_{site.output.name}".replace(".", "_").replace("-", "_")
        self.capture.module.add_submodule(target, module)
        with self.capture.graph.inserting_before(site.output):
            node = self.capture.graph.call_module(target, (site.q, k))
        try:
            node.meta["val"] = _fake_scores(module, value(site.q), value(k))
        except Exception as error:
            self.capture.graph.erase_node(node)
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            return site.refuse(f"the module '{name}' fails for q {shape(site.q)} and k {shape(k)}: {reason[0]}")
        return node


def _of_layer(modules: Any, layer: int | None) -> nn.Module | None:
    """The module of a layer, of a list or a mapping by layer."""
    if modules is None or layer is None:
        return None
    try:
        return modules[layer]
    except (KeyError, IndexError):
        return None


def _fake_scores(module: nn.Module, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """What a module gives for fake tensors."""
    mode = detect_fake_mode([q])
    own = {name: mode.from_tensor(tensor, static_shapes=True)
           for name, tensor in (*module.named_parameters(), *module.named_buffers())}  # fmt: skip
    with torch.no_grad(), enable_python_dispatcher(), mode:
        return torch.func.functional_call(module, own, (q, k))
