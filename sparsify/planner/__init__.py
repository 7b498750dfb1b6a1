"""Decide: which pattern each head of a model gets, by predicted cost and measured quality.

    from sparsify.planner import plan
    found = plan(model, texts, lengths=(1024, 2048), budget=0.5)
    torch.compile(model, backend="sparsify", options={"spec": found.spec()})

Settings    what is asked                                                 (settings, arguments)
Readings    samples to profile, search and validate with                  (samples, readings)
Probe       a model whose captured attentions run by what is assigned     (probe, site_call, blocks)
Rig         the probe with candidates and an objective                    (rig, heads, candidates, objective)
Profile     what each candidate of each head loses                        (profiles, study, influence)
Problem     the knapsack, and its solution with a bound                   (solve, exchange)
refined     solved and profiled in turn, from mild to tight budgets       (refine, uniform)
Plan        the result                                                    (make, bound, plan, write, terminal)
Evidence    the result drawn, with the heads' attention                   (look, pictures, evidence)
"""

from sparsify.planner.make import plan
from sparsify.planner.plan import Plan

__all__ = ["Plan", "plan"]
