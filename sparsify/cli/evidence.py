"""What `sparsify plan` draws beside the spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli.output import remark
from sparsify.errors import InputError
from sparsify.progress import progress

if TYPE_CHECKING:
    from sparsify.planner.pictures import Pictures
    from sparsify.planner.plan import Plan
    from sparsify.planner.samples import Tokenizer


def origin(found: Plan) -> str:
    """Where a spec comes from, for its first lines."""
    from sparsify import __version__
    from sparsify.planner.evidence import Evidence, percent, signed, tokens

    evidence, mark = Evidence(found), Evidence(found).chosen
    lines = [
        f"Planned by sparsify {__version__} for {found.model.name} ({found.model.fingerprint}).",
        f"Budget: {evidence.budget}, on {found.machine}; profiled at {tokens(found.lengths)} tokens.",
    ]
    if mark is not None:
        loss = f"{signed(mark.loss)} {found.unit} at {percent(mark.point.cost)} of the cost"
        lines.append(f"{evidence.measure.capitalize()}: {loss}.")
    return "\n".join([*lines, *filter(None, [found.missed])])


def draw_evidence(found: Plan, model: Any, texts: Sequence[str], tokenizer: Tokenizer, out: Path) -> list[Path]:
    """Writes a plan's evidence beside its spec `out`, as a page and, where there is matplotlib, a PNG; their paths.

    The heads' attention is pictured on a piece of the texts of the longest length; facts are planted in it where all
    attention is causal, so that heads that look for them show it.
    """
    from sparsify.planner.evidence import write_evidence

    with progress() as bar:
        bar.add_task("drawing the heads' attention", total=None)
        pictures = _pictures(found, model, texts, tokenizer)
        drawn = [write_evidence(found, out.with_suffix(".html"), pictures)]
        try:
            drawn.append(write_evidence(found, out.with_suffix(".png"), pictures))
        except InputError as error:
            remark(f"no {out.with_suffix('.png')}: {error}")
    return drawn


def _pictures(found: Plan, model: Any, texts: Sequence[str], tokenizer: Tokenizer) -> Pictures:
    import torch

    from sparsify.planner.look import pictures
    from sparsify.planner.samples import Stream

    planted = float(all(site.causal for site in found.sites))
    (sample,) = Stream.of(texts, tokenizer).samples(max(found.lengths), 1, 0.5, planted)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    seen = pictures(found, model, **{name: value.to(device) for name, value in sample.inputs.items()})
    facts = ", in whose first quarter facts are planted that its last quarter asks for again" if planted else ""
    return replace(seen, text=f"a piece of the text{facts}")
