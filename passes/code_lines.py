"""The lines of the model's own code that nodes come from: what a reader of a refusal looks for first."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import torch
from torch import fx

from sparsify.errors import CodeLine
from sparsify.passes.runner import Capture

FRAME = re.compile(r'^ *File "([^"\n]+)", line (\d+), in .*\n? *(.*)$', re.MULTILINE)
INSTALLED = re.compile(r"^.*/(?:site|dist)-packages/")
TORCH = os.path.dirname(torch.__file__) + os.sep


def locate(capture: Capture) -> None:
    """Gives each refusal the line that made its node; that of the site's anchor where the node is gone."""
    nodes = {node.name: node for node in capture.graph.nodes}
    for site in capture.sites:
        refusal = site.refusal
        if refusal is not None and refusal.line is None:
            line = code_line(nodes.get(refusal.node, site.anchor)) or code_line(site.anchor)
            site.refusal = replace(refusal, line=line)


def code_line(node: fx.Node) -> CodeLine | None:
    """The innermost line outside of torch that Dynamo (or a re-trace, which keeps it) noted for a node, or None."""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    file, line, code = next((frame for frame in reversed(frames) if not frame[0].startswith(TORCH)), frames[-1])
    return CodeLine(_short(file), int(line), code.strip())


def _short(file: str) -> str:
    """A path without what every reader knows: the folder of installed packages, or the current one."""
    short = INSTALLED.sub("", file)
    here = os.getcwd() + os.sep
    return short.removeprefix(here)
