from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deephyper_balsam.errors import SettingsError
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.optimizers.genetic import GeneticAlgorithm, cross_at_two_points
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.trial import Result, Trial


def plane(d: int = 5, bound: float = 32.768) -> HpProblem:
    problem = HpProblem("ackley")
    for i in range(d):
        problem.add_hyperparameter((-bound, bound), f"x{i}")
    return problem


def ackley(config: dict[str, Any]) -> float:
    """Ackley's function, turned to be maximised: 0 in the origin, about -22 far from it."""
    x = np.array(list(config.values()))
    return float(20 * np.exp(-0.2 * np.sqrt((x**2).mean())) + np.exp(np.cos(2 * np.pi * x).mean()) - 20 - np.e)


def best_of(method: str, seed: int, evaluations: int, workers: int) -> float:
    optimizer = make_optimizer(method, plane(), seed=seed, num_workers=workers)
    best = -np.inf
    while optimizer.num_asked < evaluations:
        results = [Result(trial.number, ackley(trial.config)) for trial in optimizer.ask(workers)]
        optimizer.tell(results)
        best = max(best, *(result.objective for result in results if result.objective is not None))
    return float(best)


def test_on_ackley_it_comes_at_least_twice_as_near_as_random_search() -> None:
    genetic, random = ([-best_of(m, seed, 2000, 50) for seed in range(3)] for m in ("ga", "random"))
    assert np.median(genetic) * 2 < np.median(random)


def tell(optimizer: GeneticAlgorithm, trials: list[Trial]) -> None:
    optimizer.tell(Result(trial.number, ackley(trial.config)) for trial in trials)


def test_it_waits_for_its_generation_and_not_longer() -> None:
    optimizer = GeneticAlgorithm(plane(), seed=0, population=6)
    first = optimizer.ask(4)
    assert len(first) == 4
    rest = optimizer.ask(4)
    assert len(rest) == 2
    assert optimizer.ask(4) == []
    assert not optimizer.exhausted
    tell(optimizer, [*rest, *first[1:]])
    assert optimizer.ask(1) == []
    tell(optimizer, first[:1])
    second = optimizer.ask(10)
    assert len(second) == 6
    assert {trial.origin.kind for trial in second} == {"genetic"}
    assert {trial.origin.told for trial in second} == {6}


def test_a_generation_asked_piece_by_piece_is_the_one_asked_at_once() -> None:
    whole, pieces = (GeneticAlgorithm(plane(), seed=3, population=8) for _ in range(2))
    for _ in range(3):
        one = whole.ask(8)
        other = [trial for _ in range(8) for trial in pieces.ask(1)]
        assert [t.config for t in one] == [t.config for t in other]
        tell(whole, one)
        tell(pieces, other)


def test_a_withdrawn_member_is_not_waited_for() -> None:
    optimizer = GeneticAlgorithm(plane(), seed=0, population=4)
    trials = optimizer.ask(4)
    tell(optimizer, trials[:3])
    assert optimizer.ask(1) == []
    optimizer.withdraw([trials[3].number])
    assert len(optimizer.ask(4)) == 4


def test_failed_members_are_no_parents() -> None:
    problem = HpProblem()
    problem.add_hyperparameter((0.0, 1.0), "x")
    problem.add_hyperparameter([f"c{i}" for i in range(9)], "c")
    shares = []
    for seed in range(5):
        optimizer = GeneticAlgorithm(problem, seed=seed, population=30)
        for _ in range(8):
            trials = optimizer.ask(30)
            optimizer.tell(
                Result(t.number, None, failure="bad") if t.config["x"] < 0.5 else Result(t.number, -t.config["x"])
                for t in trials
            )
        shares.append(np.mean([trial.config["x"] < 0.5 for trial in optimizer.ask(30)]))
    assert np.median(shares) < 0.5


def test_a_generation_that_failed_as_a_whole_is_followed_by_a_random_one() -> None:
    optimizer = GeneticAlgorithm(plane(), seed=0, population=10)
    for _ in range(3):
        trials = optimizer.ask(10)
        assert len(trials) == 10
        optimizer.tell(Result(trial.number, None, failure="all bad") for trial in trials)


def test_more_starting_points_than_members_all_belong_to_the_first_generation() -> None:
    problem = plane(1)
    for i in range(9):
        problem.add_starting_point(x0=float(i))
    optimizer = GeneticAlgorithm(problem, seed=0, population=4)
    first = optimizer.ask(20)
    assert [trial.config["x0"] for trial in first] == [float(i) for i in range(9)]
    tell(optimizer, first)
    assert len(optimizer.ask(20)) == 4


def test_warm_starts_are_parents_of_the_first_generation() -> None:
    distances: list[float] = []
    for seed in range(5):
        optimizer = GeneticAlgorithm(plane(2), seed=seed, population=20)
        near = np.random.default_rng(seed).normal(0.0, 0.5, (20, 2))
        configs = [{"x0": float(a), "x1": float(b)} for a, b in near]
        optimizer.tell(Result(None, ackley(config), config=config) for config in configs)
        distances += [abs(trial.config["x0"]) for trial in optimizer.ask(20)]
    assert np.median(distances) < 3.0


@pytest.mark.parametrize(
    "bad",
    [
        {"population": 1},
        {"population": 2.5},
        {"population": True},
        {"cx_prob": -0.1},
        {"mut_prob": 1.5},
        {"mut_prob": "high"},
        {"tournament_size": 0},
    ],
)
def test_an_option_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(bad))):
        GeneticAlgorithm(plane(), **bad)


def test_the_population_is_the_number_of_workers_but_not_tiny() -> None:
    assert GeneticAlgorithm(plane(), num_workers=64).population == 64
    assert GeneticAlgorithm(plane(), num_workers=2).population == 20


def test_crossover_swaps_one_stretch_and_loses_nothing() -> None:
    one, other = np.zeros(7), np.ones(7)
    for seed in range(50):
        a, b = cross_at_two_points(one, other, rng=np.random.default_rng(seed))
        assert (a + b == 1).all()
        assert 1 <= np.count_nonzero(np.diff(a)) + (a[0] != one[0]) <= 2
    assert not one.any()
    assert other.all()


def test_a_single_column_can_be_crossed() -> None:
    a, b = cross_at_two_points(np.zeros(1), np.ones(1), rng=np.random.default_rng(0))
    assert sorted([a[0], b[0]]) == [0.0, 1.0]
