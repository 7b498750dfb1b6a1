"""The oracle: attention under a dense boolean mask in float64. Every kernel's output is compared with this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify import bias
from sparsify.codegen.slots import asked, gathered, scattered, slot_count, tokens
from sparsify.codegen.target import Launch
from sparsify.patterns.dense_mask import position_env
from sparsify.walk import evaluate

if TYPE_CHECKING:
    import torch


def kept(launch: Launch, env: dict[str, Any] | None = None) -> torch.Tensor:
    """What the program's predicates keep, evaluated at every pair: bool (B, Hq, Nq, Nk), over slots where it has a
    layout. env: another than the launch's own `environment`."""
    import torch

    program, env = launch.program, environment(launch) if env is None else env
    shape = (*launch.q.shape[:2], env["q"].shape[-2], env["k"].shape[-1])
    rules = [torch.as_tensor(evaluate(keep, env), device=launch.q.device).expand(shape) for keep in program.keep]
    found = torch.stack([rules[rule][:, h] for h, rule in enumerate(program.heads)], dim=1)
    return found if program.keys is None else found & tokens(program.keys, "k", launch.k.shape[2], env)[1][:, :, None]


def kept_tokens(launch: Launch) -> torch.Tensor:
    """The same over the tokens of keys, (B, Hq, Nq, Nk), where they are laid out and queries are not."""
    keep, layout, k_len = kept(launch), launch.program.keys, launch.k.shape[2]
    assert launch.program.queries is None
    if layout is None:
        return keep
    token, _ = tokens(layout, "k", k_len, environment(launch))
    token = token.expand(*keep.shape[:2], -1)
    return keep.new_zeros(*keep.shape[:3], k_len).scatter_add_(-1, token[:, :, None].expand_as(keep), keep)


def environment(launch: Launch) -> dict[str, Any]:
    """What the names in a program's predicates and biases stand for, each broadcastable to (B, Hq, Nq, Nk)."""
    import torch

    program, device = launch.program, launch.q.device
    batch, heads, q_len = launch.q.shape[:3]
    k_len = launch.k.shape[2]
    known = {"N": k_len, "Nq": q_len} | dict(zip(program.sizes(), program.size_values(k_len), strict=True))
    known |= {f"_{i}": load for i, load in enumerate(launch.loads)}
    q_slots, k_slots = slot_count(program.queries, q_len, known), slot_count(program.keys, k_len, known)
    env = position_env(heads, q_slots, k_slots, launch.q_offset, device)
    env |= known | {"b": torch.arange(batch, device=device).view(-1, 1, 1, 1)}
    placed = {}
    if program.queries is not None:
        placed["q"] = asked(env["q"], tokens(program.queries, "q", q_len, env)[1][..., None])
    if program.keys is not None:
        placed["k"] = asked(env["k"], tokens(program.keys, "k", k_len, env)[1][:, :, None])
    return env | placed


def oracle(launch: Launch) -> torch.Tensor:
    """The output (B, Hq, Nq, Dv) in float64; a row that keeps nothing gives 0. Skips leave nothing out here."""
    return oracle_lse(launch)[0]


def oracle_lse(launch: Launch) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the lse (B, Hq, Nq) in float64 (see `Target.run`)."""
    import torch

    program, q_len = launch.program, launch.q.shape[2]
    out, lse = oracle_rows(launch)
    if program.queries is None:
        return out, lse
    token, filled = tokens(program.queries, "q", q_len, environment(launch))
    where = token.masked_fill(~filled, q_len).expand(*lse.shape)  # what empty slots have goes behind the last token
    rows = lse.new_full((*lse.shape[:2], q_len + 1), -torch.inf).scatter(-1, where, lse)[..., :q_len]
    return scattered(out, token, filled, q_len), rows


def oracle_rows(launch: Launch, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, Hq, rows, Dv) and the lse (B, Hq, rows) in float64, of some queries or of all; of slots where
    queries have a layout."""
    import torch

    program, group = launch.program, launch.q.shape[1] // launch.k.shape[1]
    q, k, v = launch.q.double(), *(t.double().repeat_interleave(group, dim=1) for t in (launch.k, launch.v))
    env = environment(launch)
    if program.queries is not None:
        q = gathered(q, *tokens(program.queries, "q", q.shape[2], env))
    if rows is not None:
        q, env = q[:, :, rows], env | {"q": env["q"][..., rows, :]}
    keep = kept(launch, env)
    if program.keys is not None:
        token, filled = tokens(program.keys, "k", k.shape[2], env)
        k, v = gathered(k, token, filled), gathered(v, token, filled)
    scores, cap = q @ k.transpose(-1, -2) * launch.scale, program.softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores + bias.evaluate(program.bias, env)
    scores = scores.masked_fill(~keep, -torch.inf)
    if program.sink is not None:
        logit = bias.evaluate(program.sink, env).to(scores).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : v.shape[2]]
    v = v.masked_fill(~keep.any(2).unsqueeze(-1), 0)  # not even a NaN is read of what nobody keeps
    return weights.nan_to_num(nan=0.0) @ v, torch.logsumexp(scores, dim=-1)
