"""The backend: what torch.compile calls with each graph."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from sparsify import env
from sparsify.errors import RefusedError, SparsifyError, SpecError
from sparsify.options import Options
from sparsify.passes import Capture, PassError, Site, pipeline, run
from sparsify.passes.attach_spec import info
from sparsify.passes.code_lines import locate
from sparsify.patterns.presets import semantics_of
from sparsify.root import Root
from sparsify.verify import verified

log = logging.getLogger("sparsify")
_logged: set[tuple[str, str]] = set()
# What the graphs of a model keep between calls (`Capture.kept`), for as long as there is the model.
_KEPT: WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def sparsify_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point `sparsify` of `torch_dynamo_backends`: rewrites the attention of a graph, compiles the rest.

    `options` are those of `sparsify.options.Options`; `mode` is Inductor's. Raises InputError or SpecError for what a
    user gave wrongly, and RefusedError under `strict`, or for a site that is refused a pattern native to its model.
    """
    with errors_as_they_are():
        chosen = Options.read(options)
        chosen.check_modules()
        capture = captured(gm, example_inputs, chosen)
        report_refusals(capture.sites, chosen.strict, chosen.spec)
    rewritten = any(site.open for site in capture.sites)
    compiled = compile_rest(capture.module if rewritten else gm, example_inputs, chosen.inner, mode)
    return verified(compiled, capture) if chosen.verify and rewritten else compiled


def captured(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> Capture:
    """The graph after all passes. `gm` itself stays as it is. Raises SpecError for a rule that no model can use."""
    root = Root.find()
    kept = {} if root.model is None else _KEPT.setdefault(root.model, {})
    capture = Capture(gm, list(example_inputs), root.names, root.path, root.modules(), kept=kept)
    placed = options.spec is None or not root.partial or root.guard()
    run_passes(capture, options, placed)
    locate(capture)
    if options.spec is not None and capture.sites and capture.classes:
        check_rules(options.spec, capture.sites, list(capture.classes))
    return capture


def run_passes(capture: Capture, options: Options, placed: bool) -> None:
    """All passes over a capture, whose graph stays as it was given where one of them fails."""
    given = capture.module
    passes = pipeline(
        options.spec, options.target, placed, options.strict, options.crossover, options.verify, options.learned
    )
    try:
        run(passes, capture)
    except PassError as error:
        if not env.net():
            raise
        give_up(capture, given, error, options.strict)


def give_up(capture: Capture, gm: fx.GraphModule, error: PassError, strict: bool) -> None:
    """A pass failed: the graph stays as it was given, and the user hears of it once. RefusedError under `strict`."""
    text = f"{error}; the graph stays as it is"
    if strict:
        raise RefusedError(f"{text}, and strict is on") from error
    capture.module, capture.failure = gm, str(error)
    capture.notes.append(text)
    for site in capture.sites:
        site.refuse(str(error), "a mistake in sparsify: please report it, with the log of level DEBUG")
    if ("", text) not in _logged:
        _logged.add(("", text))
        log.warning("%s: a mistake in sparsify, please report it", text)
        log.debug("the pass failed with", exc_info=error)


def check_rules(spec: Any, sites: list[Site], modules: Sequence[str] = ()) -> None:
    """Raises SpecError for a rule that none of all sites uses.

    modules: given where the sites are those of one graph only (graph breaks, decoding without the encoder): then a rule
    that fits one of these is no mistake yet; `sparsify.explain` sees all sites and decides.
    """
    from sparsify.spec import unmatched_rules

    wrong = unmatched_rules(spec, [info(site) for site in sites], modules)
    if wrong:
        raise SpecError(wrong[0])


def report_refusals(sites: list[Site], strict: bool, spec: Any = None) -> None:
    """Logs each refusal once for what torch.compile made, however often that recompiles.

    Under `strict` raises RefusedError with all of them; so it does of those that never stay dense, whatever it says.
    """
    refused = [site for site in sites if site.refusal is not None]
    raised = [site for site in refused if strict or never_dense(site, spec)]
    if raised:
        why = "strict is on" if strict else " and ".join(dict.fromkeys(never_dense(site, spec) for site in raised))
        lines = "\n".join(f"  {site.address or site.anchor}: {site.refusal}" for site in raised)
        raise RefusedError(f"{len(raised)} of {len(sites)} attention sites were refused, and {why}:\n{lines}")
    compiling = _compiling()
    told = set() if compiling is None else vars(compiling).setdefault("sparsify_told", set())
    for site in refused:
        address, refusal = site.address or str(site.anchor), site.refusal
        if (address, refusal.reason) not in told:
            told.add((address, refusal.reason))
            log.warning("attention at %s stays as it is: %s", address, refusal)


def _compiling() -> Any:
    """What torch.compile made of this backend, and is calling it now; None where something else calls."""
    kind = getattr(torch, "_TorchCompileWrapper", ())
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def never_dense(site: Site, spec: Any) -> str:
    """Why dense attention is no way out where a site is refused, or "": the spec is wrong about its tokens, or gives
    some head a pattern that models are trained with, so that with dense attention the model is another one."""
    if site.misfit:
        return "their tokens are not those of the spec's grids"
    rule = None if spec is None else spec.rule(info(site))
    native = rule is not None and any(semantics_of(group.pattern) == "native" for group in rule.groups)
    return "their patterns are native to the model, which dense attention is not" if native else ""


def compile_rest(gm: fx.GraphModule, example_inputs: list[Any], inner: str, mode: str | None) -> Callable[..., Any]:
    """The rest of the graph, through Inductor or as it is."""
    if inner == "eager":
        return gm.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _name_own_tensors(gm)
    patches = list_mode_options(mode) if mode and mode != "default" else None
    return compile_fx(gm, example_inputs, config_patches=patches)


def _name_own_tensors(gm: fx.GraphModule) -> None:
    """Gives the tensors that passes added to the graph a source, which AOTAutograd wants of each."""
    known = getattr(gm, "_param_name_to_source", None)
    if known is not None:
        names = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
        gm._param_name_to_source = {name: ConstantSource(f"sparsify.{name}") for name in names} | known


@contextlib.contextmanager
def errors_as_they_are() -> Iterator[None]:
    """Lets our errors through Dynamo as what they are, instead of as its own BackendCompilerFailed."""
    try:
        yield
    except SparsifyError as error:
        raise _shown(error) from None


def _shown(error: SparsifyError) -> Exception:
    kind = type(error)

    class Shown(kind, torch._dynamo.exc.ShortenTraceback):  # type: ignore[misc, valid-type]
        first_useful_frame = None

        def __init__(self, *args: object) -> None:
            Exception.__init__(self, *args)

    Shown.__name__, Shown.__qualname__, Shown.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Shown(*error.args)
