"""Rates from timed samples: least squares in relative error, with no rate below 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from sparsify.cost.machine import DECODE_BELOW, Machine, Rates
from sparsify.cost.sample import Sample
from sparsify.cost.site import Site, site_of
from sparsify.cost.steps import STEPS
from sparsify.cost.timeline import timeline_of
from sparsify.errors import InputError
from sparsify.patterns.spans import Array

ROUNDS = 3  # how cores share query tiles depends on the rates, which are fitted anew with what that gives
GUESSED = 0.1  # the weight of a guess's relative error, where that of a time has 1
CALL = ("launch", "cold", "fork")  # fields of `Machine`: what a call takes, whatever it does
MISFIT = {"attention": 0.2, "dense attention": 0.4}  # of half of the times; 0.07 and 0.1 to 0.27 on an idle machine
LEAST = 1e-6  # nanoseconds: of a rate that must be above 0, where it can't be told from 0


def fitted(machine: Machine, samples: Sequence[Sample], nanoseconds: Sequence[float]) -> Machine:
    """The machine with the times of a call and the rates that fit the samples' times best; its own are a first guess,
    and the samples are of its dtypes and head sizes.

    Steps that mostly go together can't be told apart by noisy times: the guess keeps one of them from being 0, and each
    rate lies on a line over head sizes, which neither falls nor begins below 0. So the sum of such steps is about right
    for sizes that weren't measured, too.
    """
    known = {(one.dtype, one.head_dim) for one in machine.rates}
    assert known >= {(one.shape.dtype, one.shape.head_dim) for one in samples}
    sites = [site_of(one.patterns, one.shape) for one in samples]
    times, guess, lines = np.array(nanoseconds), np.maximum(_rates_in(machine), LEAST), _lines(machine)
    for _ in range(ROUNDS):
        rows = np.stack([_row(site, machine) for site in sites])
        told = np.concatenate([rows / times[:, None], GUESSED * np.diag(1 / guess)])
        found, _ = nnls(told @ lines, np.concatenate([np.ones(times.size), np.full(guess.size, GUESSED)]))
        machine = _with_rates(machine, lines @ found)
    return machine


def predicted(machine: Machine, samples: Sequence[Sample]) -> Array:
    """Nanoseconds of the samples by the machine's rates, as they were fitted."""
    rates = _rates_in(machine)
    return np.array([_row(site_of(one.patterns, one.shape), machine) @ rates for one in samples])


def check_fit(what: str, found: Array, times: Array) -> None:
    """Raises InputError where half of the times or more are far from what was found for them; what: see MISFIT."""
    error = float(np.median(np.abs(found / times - 1)))
    if error > MISFIT[what]:
        how = f"no rates fit the times of {what}, half of which are off by {error:.0%} or more"
        raise InputError(f"calibrate: {how}: other work ran beside it; calibrate again while the machine is idle")


def _rates_in(machine: Machine) -> Array:
    """The times of a call and the rates, in the order of `_row`."""
    rates = [getattr(entry, name) for entry in machine.rates for name in STEPS]
    return np.array([*(getattr(machine, name) for name in CALL), *rates])


def _lines(machine: Machine) -> Array:
    """float64 (numbers of `_rates_in`, numbers of at least 0): the first are what this makes of the second, which are
    the times of a call; then for each dtype every step's rate at head size 0, and every step's growth from there to the
    greatest size."""
    call, count = len(CALL), len(STEPS)
    dtypes = list(dict.fromkeys(entry.dtype for entry in machine.rates))
    greatest = max(entry.head_dim for entry in machine.rates)
    found = np.zeros((call + len(machine.rates) * count, call + 2 * len(dtypes) * count))
    found[:call, :call] = np.eye(call)
    for i, entry in enumerate(machine.rates):
        rows, first = slice(call + i * count, call + (i + 1) * count), call + 2 * dtypes.index(entry.dtype) * count
        found[rows, first : first + count] = np.eye(count)
        found[rows, first + count : first + 2 * count] = np.eye(count) * entry.head_dim / greatest
    return found


def _row(site: Site, machine: Machine) -> Array:
    """What is multiplied with the times of a call and with the rates of each dtype and head size of the machine, one
    after the other, and comes to the time of a site."""
    timeline, shape = timeline_of(site, machine, site.nest(machine)), site.shape
    span = timeline.span / max(float(timeline.times.sum()), 1e-9)
    parts = [np.array([1.0, float(shape.q_len < DECODE_BELOW), float(timeline.cores > 1)])]
    for entry in machine.rates:
        own = (entry.dtype, entry.head_dim) == (shape.dtype, shape.head_dim)
        parts.append(timeline.steps * span * own)
    return np.concatenate(parts)


def _with_rates(machine: Machine, found: Array) -> Machine:
    rates = []
    for i, entry in enumerate(machine.rates):
        values = found[len(CALL) + i * len(STEPS) :]
        named = {name: max(float(value), LEAST) for name, value in zip(STEPS, values, strict=False)}
        rates.append(Rates(dtype=entry.dtype, head_dim=entry.head_dim, tile=entry.tile, **named))
    call = dict(zip(CALL, map(float, found), strict=False))
    return machine.model_copy(update={**call, "rates": tuple(rates)})
