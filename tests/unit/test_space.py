from __future__ import annotations

import ConfigSpace as cs
import numpy as np
import pytest

from deephyper_balsam.errors import ProblemError
from deephyper_balsam.problem.hp_problem import HpProblem


def problem_of(*values: object) -> HpProblem:
    problem = HpProblem()
    for i, value in enumerate(values):
        problem.add_hyperparameter(value, f"x{i}")
    return problem


def test_values_are_scaled_as_the_docstring_says() -> None:
    problem = problem_of((0.0, 10.0), (1e-4, 1e0, "log-uniform"), (1, 5), [16, 32, 64], ["a", "b", "c"], 7)
    row = problem.encoder.encode([{"x0": 2.5, "x1": 1e-2, "x2": 2, "x3": 32, "x4": "c", "x5": 7}])
    assert row[0] == pytest.approx([0.25, 0.5, 0.25, 0.5, 2.0, 0.0])


def test_bounds_are_reached_exactly() -> None:
    problem = problem_of((0.1, 0.7), (3e-5, 0.7, "log-uniform"), (3, 999, "log-uniform"), (-7, 9))
    low, high = problem.encoder.decode(np.array([[0.0] * 4, [1.0] * 4]))
    assert list(low.values()) == [0.1, 3e-5, 3, -7]
    assert list(high.values()) == [0.7, 0.7, 999, 9]
    assert problem.encoder.encode([low, high]).tolist() == [[0.0] * 4, [1.0] * 4]


def test_anything_outside_is_clipped_and_missing_values_become_the_default() -> None:
    problem = problem_of((0.0, 1.0), ["a", "b", "c"])
    rows = problem.encoder.canonical(np.array([[-3.0, 9.0], [np.nan, np.nan], [2.0, 0.6]]))
    assert rows.tolist() == [[0.0, 2.0], [0.5, 0.0], [1.0, 1.0]]


def test_every_value_of_a_discrete_column_has_its_share_of_the_unit_interval() -> None:
    problem = problem_of((1, 4), [1, 2], ["a", "b", "c"])
    u = (np.arange(1200) + 0.5) / 1200
    configs = problem.encoder.decode(problem.encoder.from_unit_cube(np.stack([u, u, u], axis=1)))
    assert [sum(c["x0"] == k for c in configs) for k in (1, 2, 3, 4)] == [300] * 4
    assert [sum(c["x1"] == k for c in configs) for k in (1, 2)] == [600] * 2
    assert [sum(c["x2"] == k for c in configs) for k in "abc"] == [400] * 3


def test_a_log_uniform_integer_favours_small_values() -> None:
    problem = problem_of((1, 1000, "log-uniform"))
    rows = problem.encoder.sample(4000, np.random.default_rng(0))
    values = np.array([config["x0"] for config in problem.encoder.decode(rows)])
    assert 18 < np.median(values) < 27
    assert values.min() == 1


def test_weights_and_normals_are_drawn_with_their_distribution() -> None:
    problem = HpProblem()
    problem.add_hyperparameter(cs.CategoricalHyperparameter("c", ["a", "b"], weights=[0.9, 0.1]))
    problem.add_hyperparameter({"mu": 0.0, "sigma": 0.5, "lower": -5.0, "upper": 5.0}, "n")
    problem.add_hyperparameter(cs.BetaFloatHyperparameter("b", alpha=2, beta=8, lower=0.0, upper=1.0))
    configs = problem.encoder.decode(problem.encoder.sample(4000, np.random.default_rng(0)))
    assert 0.87 < np.mean([config["c"] == "a" for config in configs]) < 0.93
    assert 0.45 < np.std([config["n"] for config in configs]) < 0.55
    assert 0.18 < np.mean([config["b"] for config in configs]) < 0.22


def test_a_child_of_an_inactive_parent_is_inactive() -> None:
    problem = problem_of(["on", "off"], [1, 2], (0.0, 1.0))
    problem.add_condition(cs.EqualsCondition(problem["x1"], problem["x0"], "on"))
    problem.add_condition(cs.EqualsCondition(problem["x2"], problem["x1"], 2))
    rows = problem.encoder.canonical(np.array([[0.0, 1.0, 0.3], [0.0, 0.0, 0.3], [1.0, 1.0, 0.3]]))
    assert problem.encoder.decode(rows) == [
        {"x0": "on", "x1": 2, "x2": 0.3},
        {"x0": "on", "x1": 1},
        {"x0": "off"},
    ]
    assert problem.encoder.active(rows).tolist() == [[True] * 3, [True, True, False], [True, False, False]]


def test_conditions_hold_wherever_their_parents_were_added() -> None:
    problem = problem_of((0.0, 1.0), [1, 2], ["on", "off"])
    problem.add_condition(cs.EqualsCondition(problem["x1"], problem["x2"], "on"))
    problem.add_condition(cs.EqualsCondition(problem["x0"], problem["x1"], 2))
    assert problem.encoder.decode(problem.encoder.canonical(np.array([[0.3, 1.0, 1.0]]))) == [{"x2": "off"}]


def test_the_matrix_that_is_given_is_never_changed() -> None:
    problem = problem_of((0.0, 1.0), (1, 5))
    given = np.array([[np.nan, 7.0], [0.3, 0.2]])
    before = given.copy()
    encoder = problem.encoder
    for method in (encoder.canonical, encoder.snap, encoder.legal, encoder.keys, encoder.decode):
        method(given)
    assert np.array_equal(given, before, equal_nan=True)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 1)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(n, 2\), but got"):
        problem_of((0, 1), (0, 1)).encoder.canonical(np.zeros(shape))


def test_no_rows_are_no_rows() -> None:
    encoder = problem_of((0, 1), ["a", "b"]).encoder
    empty = encoder.sample(0, np.random.default_rng(0))
    assert empty.shape == (0, 2)
    assert encoder.decode(empty) == []
    assert encoder.keys(empty) == []
    assert encoder.encode([]).shape == (0, 2)
    assert encoder.snap(empty).shape == (0, 2)


@pytest.mark.parametrize("config", [{"x0": "a", "x1": "a"}, {"x0": 1, "x1": "z"}, {"x0": 1, "x1": ["a"]}])
def test_encode_names_the_value_that_it_cannot_take(config: dict[str, object]) -> None:
    with pytest.raises(ProblemError, match=r"`x[01]` must be"):
        problem_of((0, 1), ["a", "b"]).encoder.encode([config])


def test_a_sampler_of_ones_own_is_used() -> None:
    problem = problem_of((0.0, 1.0), (0.0, 1.0))
    problem.add_forbidden_clause(cs.ForbiddenGreaterThanRelation(problem["x0"], problem["x1"]))
    rows = problem.encoder.sample(
        50, np.random.default_rng(0), lambda n, rng: np.column_stack([rng.random(n) / 2, 0.5 + rng.random(n) / 2])
    )
    assert rows.shape == (50, 2)
    assert (rows[:, 0] <= 0.5).all()
    assert (rows[:, 1] >= 0.5).all()


def test_sampling_where_almost_nothing_is_legal_ends_with_an_error() -> None:
    problem = problem_of((0.0, 1.0), (0.0, 1.0))
    problem.add_forbidden_clause(cs.ForbiddenGreaterThanRelation(problem["x0"], problem["x1"]))
    problem.add_forbidden_clause(cs.ForbiddenLessThanRelation(problem["x0"], problem["x1"]))
    with pytest.raises(ProblemError, match="leave almost nothing of the space"):
        problem.encoder.sample(3, np.random.default_rng(0))
    assert problem.encoder.sample(3, np.random.default_rng(0), partial=True).shape == (0, 2)


def test_a_sample_depends_on_its_generator_alone() -> None:
    problem = problem_of((0.0, 1.0), (0.0, 1.0), (1, 9))
    problem.add_forbidden_clause(cs.ForbiddenGreaterThanRelation(problem["x0"], problem["x1"]))
    first = problem.encoder.sample(20, np.random.default_rng(7))
    problem.encoder.sample(1000, np.random.default_rng(8))
    assert np.array_equal(first, problem.encoder.sample(20, np.random.default_rng(7)))


def test_an_encoder_is_a_snapshot_of_its_space() -> None:
    problem = problem_of(["a", "b"], (1, 5))
    problem.add_forbidden_clause(cs.ForbiddenEqualsClause(problem["x1"], 5))
    encoder = problem.encoder
    assert problem.encoder is encoder
    problem.add_hyperparameter((0, 1), "a_new_one")
    assert problem.encoder is not encoder
    assert all(c["x1"] != 5 for c in encoder.decode(encoder.sample(100, np.random.default_rng(0))))


def test_enumerate_stops_at_its_limit_and_at_reals() -> None:
    problem = problem_of((1, 100), (1, 100))
    assert problem.encoder.enumerate(9_999) is None
    rows = problem.encoder.enumerate(10_000)
    assert rows is not None
    assert len(rows) == 10_000
    assert problem_of((0.0, 1.0)).encoder.enumerate(10**9) is None


def test_no_hyperparameter_of_any_size_loses_a_value() -> None:
    problem = problem_of((0, 2**53 - 1), (-(2**40), 2**40), (1, 10**9, "log-uniform"))
    rng = np.random.default_rng(0)
    configs = problem.encoder.decode(problem.encoder.snap(rng.random((500, 3))))
    assert problem.encoder.decode(problem.encoder.encode(configs)) == configs


def test_a_key_stays_short_in_a_wide_space_and_tells_neighbours_apart() -> None:
    problem = HpProblem("wide")
    for index in range(100):
        problem.add_hyperparameter((0.0, 1.0), f"x{index}")
    rows = np.full((3, 100), 0.5)
    rows[1, 99] = 0.5 + 1e-11
    first, second, third = problem.encoder.keys(rows)
    assert len(first) == 16
    assert first == third
    assert first != second
