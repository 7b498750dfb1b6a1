"""`sparsify.explain`: what the backend would make of a model, site by site."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import fx

from sparsify.backend import captured, check_rules, errors_as_they_are, never_dense, report_refusals
from sparsify.options import Options
from sparsify.passes import Capture, Site
from sparsify.passes.attach_spec import phase
from sparsify.passes.density import density_of, room_of
from sparsify.passes.masks.describe_bias import describe_bias
from sparsify.passes.nodes import hint, value
from sparsify.passes.recover_masks import is_causal
from sparsify.patterns import dense
from sparsify.patterns.head_rules import Compensation
from sparsify.patterns.lists import lists
from sparsify.patterns.select import Choice, selections
from sparsify.patterns.selector import Selector
from sparsify.ranges import of_numbers, text_of
from sparsify.report import GraphReport, PassTime, Report, SiteReport
from sparsify.walk import loads, variables

__all__ = ["Report", "explain"]

LIMIT = 1 << 20


def explain(
    model: Callable[..., Any],
    *args: Any,
    spec: Any = None,
    target: str | None = None,
    strict: bool = False,
    crossover: bool | None = None,
    learned: Any = None,
    **kwargs: Any,
) -> Report:
    """Runs `model(*args, **kwargs)` once under torch.compile and reports every attention site that is captured.

    Only the capture is real: the model's own code computes the result, and no kernel is built. The caller's grad mode
    counts, as it does for the backend: outside of torch.no_grad() a model with parameters is refused for its
    gradients. `spec`, `target`, `strict`, `crossover` and `learned` are the backend's options; a model's own argument
    of such a name has to be given by position. Raises SpecError for a spec that can't be read or that has a rule for
    no site of the model, and under `strict` RefusedError with all refusals.

    Nothing is computed where `model` and its inputs are fake tensors: under
    `torch._subclasses.fake_tensor.FakeTensorMode()` models of any size can be made and explained.
    """
    given = {"spec": spec, "target": target, "strict": strict, "crossover": crossover, "learned": learned}
    options = Options.read({name: value for name, value in given.items() if value is not None})
    captures: list[tuple[Capture, int]] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with errors_as_they_are():
            captures.append((captured(gm, example_inputs, options), len(gm.graph.nodes)))
        return gm.forward

    model = getattr(model, "_orig_mod", model)
    # Each call compiles anew: Dynamo's limit on recompilations must not end it, nor count it for the user's own.
    alone = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
        torch.compile(model, backend=record, **alone)(*args, **kwargs)
    if options.spec is not None:
        check_rules(options.spec, [site for capture, _ in captures for site in capture.sites])
    for site in (site for capture, _ in captures for site in capture.sites if site.refusal is not None):
        if why := never_dense(site, options.spec):
            site.notes.append(f"torch.compile raises this refusal: {why}")
    if strict:
        report_refusals([site for capture, _ in captures for site in capture.sites], strict=True)
    return report_of(captures)


def report_of(captures: list[tuple[Capture, int]]) -> Report:
    """The report of captures, each given with its number of nodes before."""
    sites, passes, graphs = [], [], []
    for number, (capture, before) in enumerate(captures):
        sites += [_site_report(site, number) for site in capture.sites]
        passes += [PassTime(number, step.name, step.seconds, step.changes) for step in capture.records]
        graphs.append(GraphReport(before, len(capture.graph.nodes), tuple(capture.notes)))
    return Report(tuple(sites), tuple(passes), tuple(graphs))


def _site_report(site: Site, graph: int) -> SiteReport:
    heads, q_len = _sizes(site.q, 1, 2)
    kv_heads, k_len = _sizes(site.k, 1, 2)
    patterns = site.patterns if site.patterns is not None else (dense(),) * (heads or 0)
    density, at_most, notes = _density(site, q_len, k_len)
    return SiteReport(
        address=site.address,
        layer=site.layer,
        kind=site.kind,
        graph=graph,
        form=site.form,
        mask=site.mask_text,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        patterns=patterns,
        density=density,
        at_most=at_most,
        target=site.target if site.open else "",
        dense=site.dense,
        use=site.use,
        phase=phase(site),
        bias=describe_bias(site.bias, site.load_names),
        sink="" if site.sink_bias is None else describe_bias(site.sink_bias, site.load_names),
        layout="" if site.laid_out is None or site.laid_out.chosen is None else str(site.laid_out.chosen),
        refusal=site.refusal,
        notes=(*site.notes, *notes),
    )


def _density(site: Site, q_len: int | None, k_len: int | None) -> tuple[float | None, bool, list[str]]:
    """What is kept, whether it is so much at most, and what to say of that."""
    if not site.programs or site.refusal is not None or not q_len or not k_len:
        return None, False, []
    offset = site.q_offset if isinstance(site.q_offset, int) else hint(value(site.q_offset))
    rooms = [[room_of(one, q_len, k_len, offset, is_causal(site)) for one in head] for head in _choices(site)]
    known = [next((room for room in head if room is not None), None) for head in rooms]
    unknown = any(loads(rule) or "b" in variables(rule) for rule in site.programs)
    density = density_of(site.programs, q_len, k_len, offset, known)
    told = text_of(of_numbers(head for head, room in enumerate(known) if rooms[head] and room is None))
    said = f"how many keys heads {told} keep is in the data: all that they may keep are counted"
    return density, unknown or any(rooms), [said] if told else []


def _choices(site: Site) -> list[list[Choice]]:
    """What each head chooses from the data here: some layers keep everything, and a compensation drops nothing."""
    return [
        [one.choice for one in selections(pattern)
         if lists(program) or not isinstance(one.choice.selector, Selector | Compensation)]
        for pattern, program in zip(site.patterns or (dense(),) * len(site.programs), site.programs, strict=True)
    ]  # fmt: skip


def _sizes(node: fx.Node | None, *dims: int) -> list[int | None]:
    return [None] * len(dims) if node is None else [hint(value(node).shape[dim]) for dim in dims]
