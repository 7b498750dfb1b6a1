"""Decide: which pattern each head of a model gets, by predicted cost and measured loss.

    from sparsify.planner import plan
    found = plan(model, data, lengths=(1024, 2048), budget=0.5)
    torch.compile(model, backend="sparsify", options={"spec": found.spec()})

The flow is that of the files: `probe` catches a model's attentions, `candidates` says what a head may get, `profiles`
what each would cost in quality, `solve` chooses, `refine` looks again at what was chosen, `validate` reads what no
profile saw; `plan` holds what came out.
"""

from sparsify.planner.plan import Plan

__all__ = ["Plan"]
