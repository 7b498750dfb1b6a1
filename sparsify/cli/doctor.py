"""`sparsify doctor`: what this machine can run, and why not more."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from sparsify.errors import Refusal, SparsifyError


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is None for what is neither good nor bad."""

    name: str
    ok: bool | None
    found: str
    hint: str = ""


def doctor(
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Build Triton's kernels for all chips; list registers, spills, shared memory."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what this machine can run, and say why not more. Exits with 1 when no target works."""
    from sparsify.cli.output import console, print_json
    from sparsify.progress import progress

    if kernels:
        _kernels(json)
        return
    findings = []
    with progress() as bar:
        task = bar.add_task("", total=len(CHECKS))
        for check in CHECKS:
            bar.update(task, description=check.__name__.strip("_").replace("_", " "))
            findings.append(check())
            bar.advance(task)
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        console().print(_table(findings))
    if not any(finding.ok for finding in findings if finding.name in ("target cpp", "target triton")):
        raise typer.Exit(1)


def _table(findings: list[Finding]):  # type: ignore[no-untyped-def]
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: ""}
    for finding in findings:
        hint = f"\n[dim]{_plain(finding.hint)}[/]" if finding.hint else ""
        table.add_row(marks[finding.ok], f"[bold]{finding.name}[/]", _plain(finding.found) + hint)
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _python() -> Finding:
    return Finding("python", None, f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    import torch

    return Finding("torch", None, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _processor() -> Finding:
    from sparsify.runtime import machine_isa

    try:
        isa = machine_isa()
    except SparsifyError as error:
        return Finding("processor", False, str(error))
    bf16 = ", with bf16 dot products" if isa.bf16_dot else ""
    forced = " (SPARSIFY_ISA)" if os.environ.get("SPARSIFY_ISA") else ""
    return Finding("processor", True, f"{isa.name} kernels{bf16}{forced}")


def _compiler() -> Finding:
    from sparsify.runtime import find_compiler

    try:
        found = find_compiler()
    except SparsifyError as error:
        return Finding("compiler", False, str(error))
    if isinstance(found, Refusal):
        return Finding("compiler", False, found.reason, found.hint)
    return Finding("compiler", True, f"{' '.join(found.command)}: {found.version}")


def _cache() -> Finding:
    from sparsify import env

    folder = env.cache_dir()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("cache", False, f"{folder} can't be written", "set SPARSIFY_CACHE_DIR to a folder that can be")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    return Finding("cache", True, f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def _tuned() -> Finding:
    """What `sparsify tune` found, as far as it is for this machine and software."""
    from sparsify import env
    from sparsify.runtime import tuned
    from sparsify.tuner.targets import tunable

    path, (entries, why) = env.tuned(), tuned.held()
    if path is None or why or not entries:
        found = "none: SPARSIFY_TUNED is 0" if path is None else why or f"none in {path}"
        hint = "kernels run as by default" if why else "sparsify tune --grid finds what is fastest on this machine"
        return Finding("tuned kernels", None, found, hint)
    wrong = []
    for number, entry in enumerate(entries.values()):
        try:
            tunable(entry.target).check(entry.values)
        except SparsifyError as error:
            wrong.append(f"tuned[{number}]: {error}")
    if wrong:
        return Finding("tuned kernels", False, f"{path}: {wrong[0]}", "such a kernel runs as by default")
    mine = [entry for entry in entries.values() if tunable(entry.target).holds(entry)]
    others = f", {len(entries) - len(mine)} for others, which are ignored" if len(mine) < len(entries) else ""
    return Finding("tuned kernels", None, f"{len(mine)} for this machine and software{others} ({path})")


def _triton() -> Finding:
    try:
        return Finding("triton", None, version("triton"))
    except PackageNotFoundError:
        return Finding("triton", None, "not installed", "pip install 'sparsify[triton]' to run on GPUs")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", None, "none that torch can use")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", True, ", ".join(names))


def _cpp_target() -> Finding:
    return _target("cpp", "cpu")


def _triton_target() -> Finding:
    return _target("triton", "cuda")


def _target(name: str, device: str) -> Finding:
    """Whether a target builds a small kernel and computes the right thing with it."""
    from sparsify.codegen import target

    label = f"target {name}"
    try:
        refusal = target(name).unavailable()
        if refusal is not None:
            return Finding(label, False, refusal.reason, refusal.hint)
        return _tried(name, device)
    except SparsifyError as error:
        return Finding(label, False, str(error))


def _tried(name: str, device: str) -> Finding:
    import time

    import torch

    from sparsify.codegen import Launch, target
    from sparsify.codegen.oracle import oracle
    from sparsify.patterns import causal, sinks, window
    from sparsify.program import Program

    device = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    program = Program.of([((sinks(4) | window(30)) & causal()).keep()] * 2, target=name)
    q, k, v = torch.randn(3, 1, 2, 100, 32, device=device).unbind(0)
    launch = Launch(program, q, k, v, (), 0, 32**-0.5)
    start = time.perf_counter()
    found = target(name).run(launch)
    error = float((found.double() - oracle(launch)).abs().max())
    took = time.perf_counter() - start
    if not error < 1e-2:
        return Finding(f"target {name}", False, f"a small kernel is wrong by {error:.2g}", "please report this")
    return Finding(f"target {name}", True, f"builds and runs a small kernel ({took:.2f} s, error {error:.0e})")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python, _torch, _processor, _compiler, _cache, _tuned, _triton, _gpu, _cpp_target, _triton_target,
)  # fmt: skip


def _kernels(as_json: bool) -> None:
    """The table of Triton's ahead-of-time catalogue."""
    from rich.table import Table

    from sparsify.cli.output import console, print_json
    from sparsify.codegen.triton.resources import kernel_resources
    from sparsify.progress import progress

    with progress() as bar:
        task = bar.add_task("building kernels", total=None)
        rows = kernel_resources(progress=lambda done, every: bar.update(task, completed=done, total=every))
    if as_json:
        print_json([{"kernel": row.kernel, "arch": row.arch, **asdict(row.takes)} for row in rows])
        return
    table = Table("kernel", "chip", box=None, padding=(0, 1, 0, 0))
    for title in ("registers", "spills", "shared"):
        table.add_column(title, justify="right")
    table.add_column("matrix")
    for row in rows:
        takes = row.takes
        spills = f"[red]{takes.spills}[/]" if takes.spills else "0"
        table.add_row(_plain(row.kernel), row.arch, str(takes.registers), spills, str(takes.shared), takes.matrix)
    console().print(table)
