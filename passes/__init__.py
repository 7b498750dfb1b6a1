"""Passes: from Dynamo's graph to a graph with one `sparsify.attention` op for each attention.

`pipeline(...)` is the ordered tuple; `run` runs it. A pass is a frozen dataclass in a file of its own.
"""

if __name__ != "sparsify.passes":
    raise ImportError("import sparsify.passes, not the bare folder passes")

from typing import Any

from sparsify.passes.attach_spec import AttachSpec
from sparsify.passes.canonicalise import Canonicalise
from sparsify.passes.check_sites import CheckSites
from sparsify.passes.choose_keys import ChooseKeys
from sparsify.passes.choose_target import ChooseTarget
from sparsify.passes.crossover import Crossover
from sparsify.passes.find_sites import FindSites
from sparsify.passes.functionalise import Functionalise
from sparsify.passes.lay_out import LayOut
from sparsify.passes.number_sites import NumberSites
from sparsify.passes.recover_masks import RecoverMasks
from sparsify.passes.remember_masks import RememberMasks
from sparsify.passes.runner import Capture, Pass, PassError, PassRecord, run
from sparsify.passes.settle import Settle
from sparsify.passes.site import Site
from sparsify.passes.sizes import Sizes
from sparsify.passes.splice import Splice


def pipeline(
    spec: Any = None,
    target: str = "auto",
    placed: bool = True,
    exact: bool = False,
    crossover: bool = True,
    verify: bool = False,
    learned: Any = None,
) -> tuple[Pass, ...]:
    """The passes in their order.

    placed: whether the addresses of sites can be relied on; exact: take no integers for a mask of 0 and 1 unproven;
    crossover: leave sites to Inductor where dense attention is faster; verify: keep what the sites were before;
    learned: the modules that score units of selections.
    """
    return (
        Canonicalise(),
        Functionalise(),
        Sizes(),
        FindSites(),
        CheckSites(),
        RecoverMasks(exact),
        NumberSites(),
        AttachSpec(spec, placed),
        ChooseKeys(learned or {}),
        LayOut(),
        ChooseTarget(target),
        Crossover(crossover),
        RememberMasks(verify),
        Splice(),
        Settle(),
    )


__all__ = ["Capture", "Pass", "PassError", "PassRecord", "Site", "pipeline", "run"]
