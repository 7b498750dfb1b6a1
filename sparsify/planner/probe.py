"""The probe: a model whose captured attentions run by what is assigned to their heads, and can be looked at.

It is torch.compile with the passes that find and raise attentions, and one op at each that asks the probe. The rest of
the graph runs as it is. So whatever the backend catches can be profiled, with no code for any model.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import fx

from sparsify import op
from sparsify.backend import errors_as_they_are
from sparsify.codegen import Launch
from sparsify.errors import InputError
from sparsify.passes import Capture, Site, run
from sparsify.passes.attach_spec import AttachSpec
from sparsify.passes.canonicalise import Canonicalise
from sparsify.passes.check_sites import CheckSites
from sparsify.passes.choose_target import ChooseTarget
from sparsify.passes.find_sites import FindSites
from sparsify.passes.functionalise import Functionalise
from sparsify.passes.number_sites import NumberSites
from sparsify.passes.recover_masks import RecoverMasks
from sparsify.passes.settle import Settle
from sparsify.passes.sizes import Sizes
from sparsify.passes.splice import Splice
from sparsify.patterns import Pattern
from sparsify.planner.site_call import SiteCall, Tables, attend
from sparsify.root import Root
from sparsify.spec import SiteInfo

LIMIT = 1 << 20
Key = tuple[str, int]  # the address of a site, and which use of it
Assignment = Mapping[Key, Sequence[Pattern | None]]  # of every head of some sites; None: as the model has it
_NUMBERS = itertools.count()


class Probe:
    """A model under the probe. `probe(*args, **kwargs)` runs it; its attentions do what `assigned` says.

    sites: those that were caught, by their key, in the order of their calls; refused: why others were not.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.number = next(_NUMBERS)
        op.PROBES[self.number] = self
        self.sites: dict[Key, SiteInfo] = {}
        self.refused: dict[str, str] = {}
        self.assigned: Assignment = {}
        self.watch: Callable[[SiteCall, torch.Tensor], torch.Tensor] | None = None
        self._tables: Tables = {}
        alone = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
        self._compiled = torch.compile(self.model, backend=self._backend, dynamic=False, **alone)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._tables = {}
        with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
            return self._compiled(*args, **kwargs)

    @contextlib.contextmanager
    def under(
        self, assigned: Assignment, watch: Callable[[SiteCall, torch.Tensor], torch.Tensor] | None = None
    ) -> Iterator[None]:
        """Runs inside have these patterns. watch: is given each call with its output, and returns the output to use."""
        before = self.assigned, self.watch
        self.assigned, self.watch = assigned, watch
        try:
            yield
        finally:
            self.assigned, self.watch = before

    def attend(self, site: str, launch: Launch) -> torch.Tensor:
        """What the op at a site does: see `sparsify.op`."""
        call = SiteCall.read(site, launch, self._tables)
        self.sites.setdefault(call.key, call.info)
        patterns = self.assigned.get(call.key) or (None,) * launch.q.shape[1]
        heads = {one: [head for head, other in enumerate(patterns) if other == one] for one in dict.fromkeys(patterns)}
        keeps = {pattern: call.keep(pattern, of) for pattern, of in heads.items()}
        out = attend(call, [keeps[pattern] for pattern in patterns])
        return out if self.watch is None else self.watch(call, out)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with errors_as_they_are(), torch.no_grad():
            root = Root.find()
            capture = Capture(gm, list(example_inputs), root.names, root.path, root.modules())
            run(self._passes(not root.partial or root.guard()), capture)
            for site in capture.sites:
                self._note(site)
        return capture.module.forward

    def _passes(self, placed: bool) -> tuple[Any, ...]:
        found = Canonicalise(), Functionalise(), Sizes(), FindSites(), CheckSites(), RecoverMasks(), NumberSites()
        return (*found, AttachSpec(None, placed), ChooseTarget("null"), Splice(self.number), Settle())

    def _note(self, site: Site) -> None:
        where = site.address or str(site.anchor)
        if site.refusal is not None:
            self.refused[where] = str(site.refusal)
        elif not site.positions_known:
            self.refused[where] = "the positions of its queries are not known"

    def check(self, name: str) -> None:
        """Raises InputError where nothing was caught. To be asked after a run."""
        if not self.sites:
            why = "; ".join(f"{where}: {reason}" for where, reason in self.refused.items())
            raise InputError(f"plan: {name}: no attention of the model can be rewritten{f' ({why})' if why else ''}")
