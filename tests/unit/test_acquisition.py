from __future__ import annotations

import ConfigSpace as cs
import numpy as np
import pytest

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.optimizers.acquisition import (
    INITIAL_DESIGNS,
    FloatArray,
    Neighbourhood,
    candidate_pool,
    score,
    unit_design,
)
from deephyper_balsam.problem.hp_problem import HpProblem


def neighbourhood() -> Neighbourhood:
    problem = HpProblem("space")
    problem.add_hyperparameter((0.0, 1.0), "x")
    problem.add_hyperparameter((1, 5), "n")
    problem.add_hyperparameter(["a", "b", "c"], "kind")
    problem.add_hyperparameter((1e-4, 1.0, "log-uniform"), "rate")
    problem.add_hyperparameter("one", "constant")
    problem.add_condition(cs.EqualsCondition(problem["rate"], problem["kind"], "a"))
    problem.add_forbidden_clause(
        cs.ForbiddenAndConjunction(
            cs.ForbiddenEqualsClause(problem["kind"], "b"), cs.ForbiddenEqualsClause(problem["n"], 5)
        )
    )
    return Neighbourhood(problem.encoder)


def test_confidence_bound_prefers_the_low_and_the_uncertain() -> None:
    mean, std = np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.1, 2.0])
    assert np.argmin(score("LCB", mean, std, 0.0, 1.96, 0.0)) == 2
    assert np.argmin(score("LCB", mean, std, 0.0, 0.0, 0.0)) == 0


@pytest.mark.parametrize("name", ["EI", "PI"])
def test_improvement_is_ranked_even_where_it_is_all_but_impossible(name: str) -> None:
    mean = np.array([1.0, 5.0, 20.0, 1e3, 1e6])
    scores = score(name, mean, np.full(5, 0.1), 0.0, 0.0, 0.0)
    assert np.isfinite(scores).all()
    assert (np.diff(scores) > 0).all()


def test_expected_improvement_is_its_closed_form() -> None:
    # phi(0) = 0.3989 at a mean equal to the best, with a deviation of 2
    assert score("EI", np.array([1.0]), np.array([2.0]), 1.0, 0.0, 0.0)[0] == pytest.approx(-np.log(2 * 0.3989423))


@pytest.mark.parametrize("name", ["LCB", "EI", "PI"])
def test_a_candidate_that_will_fail_is_the_last_choice(name: str) -> None:
    mean, std = np.array([-1.0, 0.5, 0.8]), np.full(3, 0.3)
    fail = np.array([1.0, 0.0, 0.0])
    assert np.argmin(score(name, mean, std, 0.0, 1.0, 0.0, fail, worst=1.0)) == 1
    assert np.argmax(score(name, mean, std, 0.0, 1.0, 0.0, fail, worst=1.0)) == 0


def test_an_unknown_criterion_or_design_is_refused() -> None:
    with pytest.raises(SettingsError, match="UCB"):
        score("UCB", np.zeros(1), np.ones(1), 0.0, 1.0, 0.0)
    with pytest.raises(SettingsError, match="grid"):
        unit_design("grid", 3, 2, np.random.default_rng(0))


@pytest.mark.parametrize("name", INITIAL_DESIGNS)
@pytest.mark.parametrize("n", [1, 7, 16])
def test_a_design_has_its_size_and_stays_in_the_cube(name: str, n: int) -> None:
    points = unit_design(name, n, 3, np.random.default_rng(0))
    assert points.shape == (n, 3)
    assert ((points >= 0) & (points <= 1)).all()
    assert (points == unit_design(name, n, 3, np.random.default_rng(0))).all()


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_moves_stay_in_the_space(scale: float) -> None:
    near = neighbourhood()
    rng = np.random.default_rng(0)
    parents = near.encoder.sample(300, rng)
    for children in (near.mutate(parents, np.full(300, scale), rng), near.cross(parents, 300, rng)):
        assert near.encoder.legal(children).all()
        assert np.array_equal(near.encoder.canonical(children), children, equal_nan=True)
        assert len(children) > 200


def test_small_moves_reach_neighbouring_integers_and_other_choices() -> None:
    near = neighbourhood()
    rng = np.random.default_rng(0)
    parent = near.encoder.encode([{"x": 0.5, "n": 3, "kind": "c", "constant": "one"}])
    children = near.mutate(np.repeat(parent, 2000, axis=0), np.full(2000, 0.01), rng)
    layers = {config["n"] for config in near.encoder.decode(children)}
    assert layers == {2, 3, 4}
    assert set(children[:, 2]) == {0.0, 1.0, 2.0}
    assert np.abs(children[:, 0] - 0.5).max() < 0.1


def test_small_moves_reach_neighbouring_integers_on_a_log_scale() -> None:
    problem = HpProblem("log")
    problem.add_hyperparameter((1, 1000, "log-uniform"), "units")
    problem.add_hyperparameter((0.0, 1.0), "x")
    near = Neighbourhood(problem.encoder)
    for units in (1, 2, 50, 1000):
        parent = near.encoder.encode([{"units": units, "x": 0.5}])
        children = near.mutate(np.repeat(parent, 2000, axis=0), np.full(2000, 1e-3), np.random.default_rng(0))
        reached = {config["units"] for config in near.encoder.decode(children)}
        assert {max(1, units - 1), units, min(1000, units + 1)} <= reached
        assert max(abs(other - units) for other in reached) <= 3 + 0.05 * units


def test_the_local_search_finds_the_minimum_of_its_criterion() -> None:
    problem = HpProblem("cube")
    for i in range(4):
        problem.add_hyperparameter((0.0, 1.0), f"x{i}")
    near = Neighbourhood(problem.encoder)

    def bowl(rows: FloatArray) -> FloatArray:
        return ((rows - 0.7) ** 2).sum(axis=1)[None, :]

    lowest = []
    for seed in range(5):
        rows, scores = candidate_pool(near, np.empty((0, 4)), bowl, np.random.default_rng(seed))
        lowest.append(scores.min())
        assert scores.shape == (1, len(rows))
    assert np.median(lowest) < 0.02
