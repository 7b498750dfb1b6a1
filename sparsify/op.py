"""The custom ops `sparsify::attention` and `sparsify::attention_lse`: tensors, numbers and one canonical string, and
nothing else, so that graphs can be cached, exported, pickled and sent to other processes."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch

from sparsify.codegen import Launch, target
from sparsify.codegen.target import empty_lse, empty_output
from sparsify.program import Program
from sparsify.runtime import ready
from sparsify.sizes import size_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of q, k and v
LIBRARY = torch.library.Library("sparsify", "DEF")
ARGUMENTS = "(Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt q_offset, float scale, str program)"
LIBRARY.define(f"attention{ARGUMENTS} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"attention_lse{ARGUMENTS} -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(q, k, v, loads, q_offset, scale, program):  # type: ignore[no-untyped-def]
    out = ready.by_program(q, k, v, loads, q_offset, scale, program)
    if out is NotImplemented:
        launch = Launch(Program.parse(program), q, k, v, tuple(loads), q_offset, scale)
        out = target(launch.program.target).run(launch)
        target(launch.program.target).remember(launch, program)
    return out


@torch.library.register_fake("sparsify::attention", lib=LIBRARY)
def _fake(q, k, v, loads, q_offset, scale, program):  # type: ignore[no-untyped-def]
    return empty_output(q, v)


@torch.library.impl(LIBRARY, "attention_lse", "CompositeExplicitAutograd")
def _attention_lse(q, k, v, loads, q_offset, scale, program):  # type: ignore[no-untyped-def]
    parsed, lse = Program.parse(program), empty_lse(q)
    return target(parsed.target).run(Launch(parsed, q, k, v, tuple(loads), q_offset, scale, lse)), lse


@torch.library.register_fake("sparsify::attention_lse", lib=LIBRARY)
def _fake_lse(q, k, v, loads, q_offset, scale, program):  # type: ignore[no-untyped-def]
    return empty_output(q, v), empty_lse(q)


attention = torch.ops.sparsify.attention.default
# The output, and the natural logarithm of each row's sum of exp(score), float32 (B, Hq, Nq) (see `Target.run`).
attention_lse = torch.ops.sparsify.attention_lse.default


def called(q, k, v, loads, q_offset, scale, program):  # type: ignore[no-untyped-def]
    """The output of `attention`; of plain tensors without the way through the dispatcher, which takes some 25 us."""
    if not torch.compiler.is_compiling() and _undisturbed() and all(map(_plain, (q, k, v, *loads))):
        return _attention(q, k, v, loads, q_offset, scale, program)
    return attention(q, k, v, loads, q_offset, scale, program)


def remember(q, k, v, scale, program, pattern):  # type: ignore[no-untyped-def]
    """Has calls of `sparsify.attention` by this pattern, or these, find what one made; see `Target.remember`."""
    launch = Launch(Program.parse(program), q, k, v, (), k.shape[2] - q.shape[2], scale)
    target(launch.program.target).remember(launch, pattern)


def _undisturbed() -> bool:
    """Whether nobody would see or change a call on its way: no mode, transform, trace or profile is on."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what its memory holds."""
    return type(tensor) is torch.Tensor and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()


LIBRARY.define("sizes(Tensor like, SymInt n, str[] names) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "sizes", "CompositeExplicitAutograd")
def _sizes(like, n, names):  # type: ignore[no-untyped-def]
    """int64 (names,): the values of size variables for n keys: an op, as symbolic integers have no such arithmetic."""
    values = size_values(frozenset(names), n)
    return torch.tensor([values[name] for name in names], dtype=torch.int64, device=like.device)


@torch.library.register_fake("sparsify::sizes", lib=LIBRARY)
def _fake_sizes(like, n, names):  # type: ignore[no-untyped-def]
    return like.new_empty(len(names), dtype=torch.int64)


sizes = torch.ops.sparsify.sizes.default


LIBRARY.define("either(Tensor plain, Tensor whole) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "either", "CompositeExplicitAutograd")
def _either(plain, whole):  # type: ignore[no-untyped-def]
    return whole.clone()


@torch.library.register_fake("sparsify::either", lib=LIBRARY)
def _fake_either(plain, whole):  # type: ignore[no-untyped-def]
    return torch.empty_like(whole)


# One value computed twice, by plain operators and by one that hides them: a graph holds it only between passes.
either = torch.ops.sparsify.either.default


LIBRARY.define(
    f"probed{ARGUMENTS[:-1]}, str site, int probe) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
PROBES: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by their numbers, those of `sparsify.planner.probe`


@torch.library.impl(LIBRARY, "probed", "CompositeImplicitAutograd")
def _probed(q, k, v, loads, q_offset, scale, program, site, probe):  # type: ignore[no-untyped-def]
    """The attention as a probe wants it. It has a handle into this process, so no graph that is kept may hold it."""
    if isinstance(q, torch._subclasses.FakeTensor):
        return empty_output(q, v)
    return PROBES[probe].attend(site, Launch(Program.parse(program), q, k, v, tuple(loads), q_offset, scale))


probed = torch.ops.sparsify.probed.default
