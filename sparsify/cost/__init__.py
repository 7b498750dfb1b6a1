"""What an attention costs: its tile program counted, and timed by a machine's rates, without running it.

from sparsify import cost
cost.estimate([pattern] * 8, length=8192, head_dim=64)              # on this machine
cost.estimate([pattern] * 32, kv_heads=8, length=2**17, head_dim=128, dtype="bfloat16", machine="h100")

Site        patterns as a kernel's program: static rules, lists, layouts   (site, choosing)
Nest        the tiles of a target                                          (nest)
Tiles       key tiles of all query tiles, by class                         (spans, tiles, kept)
Steps       how often each step of a kernel is made                        (steps)
Machine     what a step takes                                              (machine, find, calibrate)
SiteCost    steps timed, and handed out to cores                           (schedule, time)
Estimate    the result                                                     (estimate)
"""

from sparsify.cost.estimate import Estimate, HeadCost, estimate
from sparsify.cost.find import machine, names, save
from sparsify.cost.machine import Machine

__all__ = ["Estimate", "HeadCost", "Machine", "estimate", "machine", "names", "save"]
