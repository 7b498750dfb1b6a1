"""Rates from timed samples: least squares in relative error, with no rate below 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from sparsify.cost.machine import DECODE_BELOW, GROWS, Machine, Rates
from sparsify.cost.sample import Sample
from sparsify.cost.site import Site, site_of
from sparsify.cost.steps import STEPS
from sparsify.cost.timeline import timeline_of
from sparsify.patterns.spans import Array

ROUNDS = 3  # how cores share query tiles depends on the rates, which are fitted anew with what that gives
GUESSED = 0.03  # what a relative error of a guess weighs beside that of a time
CALL = ("launch", "cold", "fork")  # fields of `Machine`: what a call takes, whatever it does
LEAST = 1e-6  # nanoseconds: of a rate that must be above 0, where it can't be told from 0


def fitted(machine: Machine, samples: Sequence[Sample], nanoseconds: Sequence[float]) -> Machine:
    """The machine with the times of a call and the rates that fit the samples' times best; its own are a first guess.

    Steps that mostly go together can't be told apart by noisy times: the guess keeps one of them from being 0.
    """
    sites = [site_of(one.patterns, one.shape) for one in samples]
    times, guess = np.array(nanoseconds), np.maximum(_rates_in(machine), LEAST)
    for _ in range(ROUNDS):
        rows = np.stack([_row(site, machine) for site in sites])
        known = np.concatenate([rows / times[:, None], GUESSED * np.diag(1 / guess)])
        found, _ = nnls(known, np.concatenate([np.ones(times.size), np.full(guess.size, GUESSED)]))
        machine = _with_rates(machine, found)
    return machine


def _rates_in(machine: Machine) -> Array:
    """The times of a call and the rates, in the order of `_row`."""
    rates = [getattr(entry, name) for entry in machine.rates for name in STEPS]
    return np.array([*(getattr(machine, name) for name in CALL), *rates])


def _row(site: Site, machine: Machine) -> Array:
    """What is multiplied with the times of a call and with the rates of each dtype and head size of the machine, one
    after the other, and comes to the time of a site."""
    timeline, shape = timeline_of(site, machine, site.nest(machine)), site.shape
    span = timeline.span / max(float(timeline.times.sum()), 1e-9)
    done = timeline.steps * span
    parts = [np.array([1.0, float(shape.q_len < DECODE_BELOW), float(timeline.cores > 1)])]
    for entry in machine.rates:
        weight = machine.weight(entry, shape.dtype, shape.head_dim)
        grown = shape.head_dim / entry.head_dim if weight == 1.0 else 1.0
        scale = np.array([weight * (grown if name in GROWS else 1.0) for name in STEPS])
        parts.append(done * scale)
    return np.concatenate(parts)


def _with_rates(machine: Machine, found: Array) -> Machine:
    rates = []
    for i, entry in enumerate(machine.rates):
        values = found[len(CALL) + i * len(STEPS) :]
        named = {name: max(float(value), LEAST) for name, value in zip(STEPS, values, strict=False)}
        rates.append(Rates(dtype=entry.dtype, head_dim=entry.head_dim, tile=entry.tile, **named))
    call = dict(zip(CALL, map(float, found), strict=False))
    return machine.model_copy(update={**call, "rates": tuple(rates)})
