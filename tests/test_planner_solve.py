"""The planner's solver against trying everything, on drawn instances."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import InputError
from sparsify.planner.pricing import best_few
from sparsify.planner.solve import Problem, within_cost

NO_LIMIT = st.none()


@st.composite
def problems(draw, most=NO_LIMIT):
    """A few units in one or two layers, with a dense candidate (cost 1, no loss) and cheaper ones."""
    units, candidates, lengths = draw(st.integers(1, 4)), draw(st.integers(2, 4)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    losses = rng.random((units, candidates)) * 10.0 ** rng.integers(-3, 3, (units, 1))
    costs = rng.random((lengths, units, candidates)) / units
    losses[:, 0], costs[:, :, 0] = 0.0, 1 / units
    losses[rng.random(losses.shape) < 0.1] = np.inf
    losses[:, 0] = 0.0
    layers = np.sort(rng.integers(0, 2, units))
    layers = np.unique(layers, return_inverse=True)[1]
    return Problem(losses, costs, layers, draw(most))


def choices(problem):
    """Every allowed choice."""
    for chosen in itertools.product(range(problem.losses.shape[1]), repeat=len(problem.losses)):
        chosen = np.array(chosen)
        rules = [len(set(chosen[problem.layers == layer])) for layer in set(problem.layers)]
        if np.isfinite(problem.loss(chosen)) and (problem.most is None or max(rules) <= problem.most):
            yield chosen


def check(problem, budget):
    fits = [chosen for chosen in choices(problem) if problem.cost(chosen) <= budget + 1e-12]
    if not fits:
        least = min(problem.cost(chosen) for chosen in choices(problem))
        with pytest.raises(InputError, match="no choice comes to") as error:
            within_cost(problem, budget)
        assert least <= float(str(error.value).rsplit(" ", 1)[1]) <= least * 1.002 + 1e-9
        return
    best = min(problem.loss(chosen) for chosen in fits)
    found = within_cost(problem, budget)
    assert problem.cost(found.chosen) <= budget + 1e-6
    assert found.value == pytest.approx(problem.loss(found.chosen))
    assert found.value <= best * (1 + 1e-3) + 1e-9
    assert found.bound <= best * (1 + 1e-6) + 1e-9


@settings(max_examples=25, deadline=None)
@given(problems(), st.floats(0.05, 1.0))
def test_the_least_loss_within_a_budget(problem, budget):
    check(problem, budget)


@pytest.mark.parametrize("most", [3, 5])
def test_a_limit_of_as_many_rules_as_candidates_is_none(most):
    rng = np.random.default_rng(0)
    losses, costs = rng.random((8, 3)), rng.random((2, 8, 3)) / 16
    losses[:, 0], costs[:, :, 0] = 0.0, 1 / 8
    free, limited = (Problem(losses, costs, np.zeros(8, dtype=int), one) for one in (None, most))
    assert within_cost(limited, 0.5).value == pytest.approx(within_cost(free, 0.5).value)
    for budget in (0.01, 0.001):
        said = []
        for problem in (free, limited):
            with pytest.raises(InputError, match="no choice comes to") as error:
                within_cost(problem, budget)
            said.append(str(error.value))
        assert said[0] == said[1]


@settings(max_examples=25, deadline=None)
@given(problems(st.integers(1, 3)), st.floats(0.05, 1.0))
def test_with_few_rules_a_layer_the_bound_holds_and_the_choice_is_near_it(problem, budget):
    fits = [chosen for chosen in choices(problem) if problem.cost(chosen) <= budget + 1e-12]
    if not fits:
        with pytest.raises(InputError):
            within_cost(problem, budget)
        return
    found = within_cost(problem, budget)
    best = min(problem.loss(chosen) for chosen in fits)
    rules = [len(set(found.chosen[problem.layers == layer])) for layer in set(problem.layers)]
    assert max(rules) <= problem.most
    assert problem.cost(found.chosen) <= budget + 1e-6
    assert found.bound <= best * (1 + 1e-6) + 1e-9
    assert best <= found.value * (1 + 1e-6) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 7), st.integers(1, 4), st.integers(0, 2**32), st.booleans())
def test_the_best_few_are_those_of_all_sets(units, candidates, most, seed, knows):
    rng = np.random.default_rng(seed)
    prices = rng.normal(0, 10.0 ** rng.integers(-2, 3, (units, 1)), (units, candidates)).round(int(rng.integers(1, 9)))
    prices[rng.random(prices.shape) < 0.15] = np.inf
    prices[:, 0] = rng.normal(0, 1, units)  # dense, which every unit may have
    known = [rng.choice(candidates, min(most, candidates), replace=False)] if knows else []
    found = best_few(prices, most, known)
    assert len(found) <= most and found.tolist() == sorted(set(found.tolist()))
    sets = itertools.combinations(range(candidates), min(most, candidates))
    best = min(prices[:, list(one)].min(1).sum() for one in sets)
    assert prices[:, found].min(1).sum() == pytest.approx(best, rel=1e-9, abs=1e-9)


def large(most):
    rng = np.random.default_rng(0)
    share = np.sort(rng.uniform(0.01, 1, 60))
    share[-1] = 1
    losses = rng.lognormal(0, 2, (1024, 1)) * (1 - share) ** 2 * (1 + 0.3 * rng.random((1024, 60)))
    costs = np.tile(share, (1024, 1))[None] / 1024
    return Problem(losses, costs, np.repeat(np.arange(32), 32), most)


@pytest.mark.slow
@pytest.mark.parametrize("most", [None, 2, 3])
def test_a_large_model_is_solved_to_within_a_percent_in_ten_seconds(most):
    start = time.process_time()
    found = within_cost(large(most), 0.25)
    assert time.process_time() - start < 10
    assert found.gap <= 0.01


def test_a_limit_with_too_many_sets_goes_to_the_solver_whole():
    problem = large(5)
    few = Problem(problem.losses[:64], problem.costs[:, :64] * 16, problem.layers[:64], 5)
    found = within_cost(few, 0.5)
    assert all(len(set(found.chosen[few.layers == layer])) <= 5 for layer in range(2))
    free = within_cost(Problem(few.losses, few.costs, few.layers), 0.5)
    assert free.bound <= found.value * (1 + 1e-9)


def test_choices_are_taken_only_where_they_are_made():
    """Candidate 1 of the second layer takes the choice of the first one, where it is worth nothing by itself."""
    losses = np.array([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [0.0, 0.1, 9.0], [0.0, 0.1, 9.0]])
    costs = np.tile([0.25, 0.1, 0.05], (1, 4, 1))
    layers = np.array([0, 0, 1, 1])
    free = within_cost(Problem(losses, costs, layers), 0.3)
    assert free.chosen.tolist() == [2, 2, 1, 1]
    tied = Problem(losses, costs, layers, sources=((1, 0, 1),))
    found = within_cost(tied, 0.35)
    fits = [
        np.array(one) for one in itertools.product(range(3), repeat=4)
        if tied.cost(np.array(one)) <= 0.35 + 1e-9 and (1 in one[:2] or 1 not in one[2:])
    ]  # fmt: skip
    assert found.value == pytest.approx(min(tied.loss(one) for one in fits))
    assert 1 in found.chosen[:2] or 1 not in found.chosen[2:]
