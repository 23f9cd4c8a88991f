"""A search on a virtual clock: what the clock charges, what the report counts, and that a seed repeats it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from click.testing import CliRunner

from deephyper_balsam import HpProblem
from deephyper_balsam.cli import main
from deephyper_balsam.driver.session import SearchSession
from deephyper_balsam.driver.simulated_session import (
    SimulatedEvaluator,
    VirtualClock,
    normal_durations,
    own_durations,
)
from deephyper_balsam.driver.simulation import simulate
from deephyper_balsam.errors import SettingsError
from deephyper_balsam.trial import Trial


def line_problem() -> HpProblem:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    return problem


def run(job: Any) -> float:
    if job["x"] < 0.1:
        raise ValueError("too small")
    return float(job["x"])


def ten_seconds(_trial: Trial, _result: Any) -> float:
    return 10.0


def instant_timer() -> Any:
    return lambda: 0.0


def test_a_driver_that_computes_nothing_keeps_every_worker_busy() -> None:
    report = simulate(
        line_problem(), run, method="random", workers=4, minutes=10, duration=ten_seconds, timer=instant_timer()
    )
    assert report.utilization == pytest.approx(1.0)
    assert report.evaluations == 4 * 60
    assert report.manager_seconds == 0.0
    assert 0 < report.failures < 60
    assert report.best_objective == report.best_config["x"]  # type: ignore[index]


def test_what_the_driver_computes_passes_on_the_clock() -> None:
    # Each loop reads the timer three times: 2.5 s to tell and 2.5 s to ask
    ticks = count(0.0, 2.5)
    report = simulate(
        line_problem(), run, method="random", workers=1, minutes=10, duration=ten_seconds, timer=lambda: next(ticks)
    )
    assert report.manager_seconds > 0
    assert report.tell_seconds == pytest.approx(report.ask_seconds)
    assert report.longest_loop_seconds == pytest.approx(5.0)
    assert report.utilization < 1.0
    assert report.evaluations < 60


def test_a_trial_that_waits_starts_when_a_worker_becomes_free_however_late_the_driver_looks() -> None:
    clock = VirtualClock()
    evaluator = SimulatedEvaluator(run, 1, clock, ten_seconds)
    evaluator.submit([Trial(0, {"x": 0.5}), Trial(1, {"x": 0.6})])
    clock.advance(25.0)
    [first, second] = evaluator.collect()
    assert (first.started_at, first.ended_at) == (0.0, 10.0)
    assert (second.started_at, second.ended_at) == (10.0, 20.0)
    assert evaluator.collect() == []
    assert evaluator.busy_s(25.0) == 20.0


def test_only_waiting_trials_are_withdrawn() -> None:
    clock = VirtualClock()
    evaluator = SimulatedEvaluator(run, 1, clock, ten_seconds)
    evaluator.submit([Trial(number, {"x": 0.5}) for number in range(3)])
    assert evaluator.cancel() == [1, 2]
    clock.advance(100.0)
    assert [result.number for result in evaluator.collect()] == [0]


def test_the_same_submission_made_again_runs_once() -> None:
    clock = VirtualClock()
    evaluator = SimulatedEvaluator(run, 2, clock, ten_seconds)
    for _ in range(2):
        evaluator.submit([Trial(0, {"x": 0.5})])
    clock.advance(100.0)
    assert len(evaluator.collect()) == 1


def test_the_backlog_covers_what_completes_while_the_driver_is_busy() -> None:
    clock = VirtualClock()
    evaluator = SimulatedEvaluator(run, 100, clock, ten_seconds)
    assert evaluator.backlog == 0
    evaluator.submit([Trial(0, {"x": 0.5})])
    clock.advance(10.0)
    evaluator.collect()
    evaluator.delay_s = 0.5
    assert evaluator.backlog == 5
    evaluator.delay_s = 1e6
    assert evaluator.backlog == 100


def test_it_fulfils_the_protocol_of_evaluators() -> None:
    assert isinstance(SimulatedEvaluator(run, 1, VirtualClock(), ten_seconds), SearchSession)


def test_a_failed_run_still_takes_its_time_and_is_a_result() -> None:
    clock = VirtualClock()
    evaluator = SimulatedEvaluator(run, 1, clock, ten_seconds)
    evaluator.submit([Trial(0, {"x": 0.05})])
    clock.advance(10.0)
    [result] = evaluator.collect()
    assert result.objective is None
    assert result.failure == "ValueError: too small"


def test_durations_come_from_seed_and_trial_number_alone() -> None:
    [first, other] = [normal_durations(60, 20, seed) for seed in (1, 2)]
    trial = Trial(3, {"x": 0.5})
    result: Any = None
    assert first(trial, result) == normal_durations(60, 20, 1)(trial, result)
    assert first(trial, result) != other(trial, result)
    assert first(trial, result) != first(replace(trial, number=4), result)
    with pytest.raises(SettingsError, match=r"mean > 0"):
        normal_durations(0, 1, 1)


def test_the_run_functions_own_time_can_be_used() -> None:
    report = simulate(line_problem(), run, method="random", workers=2, minutes=5e-4, duration=own_durations)
    assert report.evaluations > 0


@pytest.mark.parametrize("method", ["random", "ga", "ambs"])
def test_the_same_seed_gives_the_same_search_when_the_clock_does(method: str) -> None:
    first, second = (
        simulate(
            line_problem(),
            run,
            method=method,
            workers=3,
            minutes=60,
            max_evals=30,
            duration=normal_durations(60, 20, 5),
            seed=5,
            timer=instant_timer(),
        )
        for _ in range(2)
    )
    assert first == second
    assert first.evaluations >= 30


def test_an_exhausted_space_ends_the_simulation() -> None:
    problem = HpProblem("small")
    problem.add_hyperparameter([1, 2, 3, 4], "k")
    report = simulate(problem, lambda job: job["k"], method="random", workers=2, minutes=60, duration=ten_seconds)
    assert (report.evaluations, report.best_objective) == (4, 4.0)


@pytest.mark.parametrize(("workers", "minutes"), [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_values_out_of_range_are_refused(workers: int, minutes: float) -> None:
    with pytest.raises(SettingsError, match="must hold"):
        simulate(line_problem(), run, workers=workers, minutes=minutes, duration=ten_seconds)


def test_the_command_prints_a_table_and_json() -> None:
    arguments = ["simulate", "--problem", "ackley", "--method", "random", "--workers", "4", "--minutes", "5"]
    arguments += ["--duration-mean", "60", "--duration-std", "20"]
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0
    assert "utilization" in table.output
    answer = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert {"utilization", "evaluations", "best_objective", "manager_seconds"} <= set(answer)
    assert 0.9 < answer["utilization"] <= 1.0
    assert answer["best_objective"] < 0
