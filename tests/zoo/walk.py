"""Walk the zoo: capture each variant as the backend does, and count what is found against what really ran."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sparsify import bias, walk
from sparsify.backend import captured
from sparsify.expr import Load
from sparsify.options import Options
from sparsify.passes import Capture, Site
from sparsify.passes.nodes import op
from tests.zoo.anchors import Softmaxes, expected
from tests.zoo.entry import Call, Variant

LIMIT = 1 << 20
IN_PLACE = ("setitem", *(name for name in vars(operator) if name.startswith("i") and f"__{name}__" in vars(operator)))
SOFTMAXES = ("softmax", "_softmax", "_safe_softmax", "special_softmax", "scaled_dot_product_attention")


@dataclass
class Recorder:
    """A backend that runs the passes over each graph and then the graph as it was, and counts how often that ran.

    Dynamo may use one graph for several layers, so a site counts as often as its graph ran. ran: the softmaxes of the
    graphs as Dynamo made them.
    """

    options: dict[str, Any] = field(default_factory=dict)
    captures: list[Capture] = field(default_factory=list)
    runs: Counter[int] = field(default_factory=Counter)
    ran: int = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        number, alive = len(self.captures), _alive(gm)
        self.captures.append(captured(gm, example_inputs, Options.read({"crossover": False, **self.options})))

        def run(*inputs: Any) -> Any:
            self.runs[number] += 1
            with Softmaxes() as mode:
                result = alive(*inputs)
            self.ran += mode.found.total()
            return result

        return run


def _alive(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without what nobody reads: a pooled output that is thrown away is no site."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.eliminate_dead_code(lambda node: node.is_impure() or _has_effect(node))
    return fx.GraphModule(gm, graph)


def _has_effect(node: fx.Node) -> bool:
    """Whether a call changes a tensor, or the calls after it, as those do that enter and leave vmap."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = name.endswith("_") or name in IN_PLACE or bool(node.kwargs.get("inplace") or node.kwargs.get("out"))
    return changes or "functorch" in f"{getattr(node.target, '__module__', '')} {node.target}"


@dataclass
class Result:
    """What the walk found out about one variant.

    expected: attention sites that ran, outside: those that Dynamo put into no graph (it left their code to Python, or
    nothing reads their result); found: those that the passes made a site of; false: sites that are none.
    refused: by reason; masks: sites by how their mask is known (`mask_kind`). missed: what is known of the rest, for
    people. milliseconds: what all passes took.
    error: the walk of this variant failed; failed_in: "dynamo" where Dynamo alone fails, too.
    """

    entry: str
    family: str
    implementation: str
    call: str
    dynamic: bool
    held_out: bool = False
    expected: int = 0
    outside: int = 0
    found: int = 0
    false: int = 0
    rewritten: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    milliseconds: float = 0.0
    error: str = ""
    failed_in: str = ""

    @property
    def name(self) -> str:
        return f"{self.entry} {self.implementation} {self.call}{' dynamic' if self.dynamic else ''}"


def walked(variant: Variant) -> Result:
    """Builds the variant, runs it once eagerly and once under Dynamo with the passes."""
    entry = variant.entry
    result = Result(entry.name, entry.family, variant.implementation, variant.call, variant.dynamic, entry.held_out)
    model = entry.build(variant.implementation)
    wanted, others = _wanted(variant, model)
    result.expected = wanted.total()
    recorder = Recorder()
    try:
        run(model, entry.calls[variant.call](model), recorder, variant.dynamic)
    except Exception as error:
        result.error = _short(error)
        result.failed_in = "dynamo" if _dynamo_fails(variant, model) else "sparsify"
        return result
    result.outside = min(max(0, result.expected + others - recorder.ran), result.expected)
    _count(result, variant, recorder)
    return result


def _wanted(variant: Variant, model: nn.Module) -> tuple[Counter[str], int]:
    if variant.implementation == "flex_attention":  # eagerly that is not ATen: another one of this model has as many
        other = variant.entry.implementations[0]
        model = variant.entry.build(other)
    return expected(variant.entry, model, variant.entry.calls[variant.call](model))


@torch.no_grad()
def run(model: nn.Module, call: Call, backend: Any, dynamic: bool, options: dict[str, Any] | None = None) -> Any:
    """`model(**call)` under torch.compile, with nothing left of what was compiled before."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
        return torch.compile(model, backend=backend, dynamic=dynamic, options=options)(**call)


def _dynamo_fails(variant: Variant, model: nn.Module) -> bool:
    try:
        run(model, variant.entry.calls[variant.call](model), "eager", variant.dynamic)
    except Exception:
        return True
    return False


def _short(error: Exception) -> str:
    text = " ".join(str(error).partition("raised:")[2].split() or str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _count(result: Result, variant: Variant, recorder: Recorder) -> None:
    found: Counter[str] = Counter()
    for number, capture in enumerate(recorder.captures):
        times = recorder.runs[number]
        result.milliseconds += 1000 * sum(record.seconds for record in capture.records)
        anchors = {site.anchor for site in capture.sites}
        for site in capture.sites:
            found[site.address] += times
            _add(result, site, times)
            result.false += times if variant.entry.is_other(site.address) else 0
        result.missed += [
            f"no site: {chain(node)}" for node in capture.graph.nodes if op(node) in SOFTMAXES and node not in anchors
        ]
    total = found.total() - result.false
    result.false += max(0, total - result.expected)
    result.found = min(total, result.expected)
    if result.found + result.outside == result.expected:
        result.missed = [line for line in result.missed if not line.startswith("no site")]


def _add(result: Result, site: Site, times: int) -> None:
    result.forms.append(site.form)
    if site.refusal is not None:
        _increase(result.refused, site.refusal.reason, times)
        result.missed.append(f"refused ({site.refusal}) [{site.address}]: {chain(site.anchor)}")
        return
    result.rewritten += times
    _increase(result.masks, mask_kind(site), times)
    result.texts.append(site.mask_text)


def _increase(counts: dict[str, int], name: str, times: int) -> None:
    counts[name] = counts.get(name, 0) + times


def mask_kind(site: Site) -> str:
    """How a site's mask, bias and sink are known.

    "closed": from positions alone; "data": from vectors and tables, too, such as padding or one value for each k - q;
    "tensor": some of it is read from a tensor over queries and keys.
    """
    found = [*walk.loads(site.keep), *bias.loads(site.bias), *bias.loads(site.sink_bias or ())]
    return "tensor" if any(map(_is_square, found)) else "data" if found else "closed"


def _is_square(load: Load) -> bool:
    """Whether a load reads a tensor that has queries in one dimension and keys in another."""
    names = [walk.variables(index) & {"q", "k"} for index in load.index]
    return {"q"} in names and {"k"} in names


def chain(node: fx.Node, above: int = 6, below: int = 4) -> str:
    """The operations around a softmax, for people: up through first arguments, down through single users."""
    up, down, current = [], [], node
    for _ in range(above):
        sources = [a for a in current.all_input_nodes if a.op == "call_function"]
        if not sources:
            break
        current = sources[0]
        up.append(_name(current))
    current = node
    for _ in range(below):
        if not current.users:
            break
        current = next(iter(current.users))
        down.append(_name(current))
    return " > ".join([*reversed(up), f"[{_name(node)}]", *down])


def _name(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else ""
    return f"{op(node) or node.target}({shape})"
