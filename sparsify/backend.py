"""The backend: what torch.compile calls with each graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from sparsify.errors import RefusedError, SparsifyError
from sparsify.options import Options
from sparsify.passes import Capture, Site, pipeline, run

log = logging.getLogger("sparsify")
_logged: set[tuple[str, str]] = set()


def sparsify_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point `sparsify` of `torch_dynamo_backends`: rewrites the attention of a graph, compiles the rest.

    `options` are those of `sparsify.options.Options`; `mode` is Inductor's. Raises InputError or SpecError for what a
    user gave wrongly, and RefusedError under `strict`.
    """
    try:
        chosen = Options.read(options)
        capture = captured(gm, example_inputs, chosen)
        report_refusals(capture.sites, chosen.strict)
    except SparsifyError as error:
        raise as_users_own(error) from None
    rewritten = any(site.refusal is None for site in capture.sites)
    return compile_rest(capture.module if rewritten else gm, example_inputs, chosen.inner, mode)


def captured(gm: fx.GraphModule, example_inputs: list[Any], options: Options) -> Capture:
    """The graph after all passes. `gm` itself stays as it is."""
    capture = Capture(gm, list(example_inputs))
    run(pipeline(options.spec, options.target), capture)
    return capture


def report_refusals(sites: list[Site], strict: bool) -> None:
    """Logs each refusal once; under `strict` raises RefusedError with all of them."""
    refused = [(site.address or str(site.anchor), site.refusal) for site in sites if site.refusal is not None]
    if refused and strict:
        lines = "\n".join(f"  {address}: {refusal}" for address, refusal in refused)
        raise RefusedError(f"{len(refused)} of {len(sites)} attention sites were refused, and strict is on:\n{lines}")
    for address, refusal in refused:
        if (address, refusal.reason) not in _logged:
            _logged.add((address, refusal.reason))
            log.warning("attention at %s stays as it is: %s", address, refusal)


def compile_rest(gm: fx.GraphModule, example_inputs: list[Any], inner: str, mode: str | None) -> Callable[..., Any]:
    """The rest of the graph, through Inductor or as it is."""
    if inner == "eager":
        return gm.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode and mode != "default" else None
    return compile_fx(gm, example_inputs, config_patches=patches)


def as_users_own(error: SparsifyError) -> Exception:
    """The error in a form that Dynamo hands to the user as it is, instead of as its own BackendCompilerFailed."""
    kind = type(error)
    wrapped = type(kind.__name__, (kind, torch._dynamo.exc.ShortenTraceback), {"__module__": kind.__module__})
    raised = wrapped(*error.args, first_useful_frame=None)
    return raised
