"""A search on a virtual clock: what the clock charges, what the report counts, and that a seed repeats it."""

from __future__ import annotations

import json
import statistics
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path
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
from deephyper_balsam.node.stoppers import parse_stopper
from deephyper_balsam.trial import Trial, TrialState


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


# --- early discarding ------------------------------------------------------------------------------------------------


def trains(job: Any) -> float:
    """Eight epochs towards `x`, which is told from the first one on."""
    for epoch in range(1, 9):
        job.record(epoch, job["x"] * epoch / 8)
        if job.stopped():
            break
    return float(job.objective)


def eighty_seconds(_trial: Trial, _result: Any) -> float:
    return 80.0


def evaluator_of(text: str, workers: int = 1, run: Any = trains, **options: Any) -> tuple[VirtualClock, Any]:
    clock = VirtualClock()
    stopper = parse_stopper(text)
    return clock, SimulatedEvaluator(run, workers, clock, eighty_seconds, stopper=stopper, **options)


def trials(*values: float) -> list[Trial]:
    return [Trial(number, {"x": value}) for number, value in enumerate(values)]


def test_a_run_is_stopped_at_the_virtual_time_of_its_rung_with_the_value_it_had() -> None:
    clock, evaluator = evaluator_of("sha:max=8,competing=1")
    evaluator.submit(trials(0.9, 0.45))
    clock.advance(1000.0)
    [whole, stopped] = evaluator.collect()
    assert (whole.objective, whole.stopped, whole.started_at, whole.ended_at) == (0.9, False, 0.0, 80.0)
    assert (stopped.objective, stopped.stopped) == (0.45 / 8, True)
    assert (stopped.started_at, stopped.ended_at) == (80.0, 90.0)
    assert stopped.curve == ((1.0, 0.45 / 8),)
    assert evaluator.line(1)["m:stopped"] is True
    assert evaluator.line(1)["m:budget"] == 1.0
    assert evaluator.busy_s(1000.0) == 90.0
    assert (evaluator.num_stopped, evaluator.saved_s) == (1, 70.0)


def test_a_decision_rests_on_what_all_others_had_recorded_by_then_and_no_later() -> None:
    # The second begins 5 s later: at its first rung the first one's value is known, and at 3 epochs again
    clock, evaluator = evaluator_of("sha:max=8,competing=1", workers=2)
    evaluator.submit(trials(0.3)[:1])
    clock.advance(5.0)
    evaluator.submit([Trial(1, {"x": 0.9})])
    clock.advance(1000.0)
    assert [result.number for result in evaluator.collect()] == [
        0,
        1,
    ]  # the worse one was first: nobody to compare with
    clock, evaluator = evaluator_of("sha:max=8,competing=1", workers=2)
    evaluator.submit(trials(0.9)[:1])
    clock.advance(5.0)
    evaluator.submit([Trial(1, {"x": 0.3})])
    clock.advance(1000.0)
    assert [(result.number, result.stopped) for result in evaluator.collect()] == [(1, True), (0, False)]
    [(first, before), (second, after), *_] = evaluator.decisions
    assert (first, before.n, before.stop) == (0, 0, False)
    assert (second, after.n, after.stop, after.cutoff) == (1, 1, True, 0.9 / 8)


def test_a_worker_whose_run_was_stopped_takes_the_next_at_once() -> None:
    clock, evaluator = evaluator_of("epoch:1")
    evaluator.submit(trials(0.1, 0.2, 0.3))
    clock.advance(1000.0)
    assert [result.ended_at for result in evaluator.collect()] == [10.0, 20.0, 30.0]


def test_time_passes_to_the_next_end_and_not_to_every_record() -> None:
    clock, evaluator = evaluator_of("sha:max=8,competing=5", workers=2)
    evaluator.open("s", {"problem": {}}, max_evals=2)
    evaluator.submit(trials(0.1, 0.2))
    evaluator.wait(0.5, threading.Event())
    evaluator.wait(0.5, threading.Event())
    assert clock.now == 80.0
    assert len(evaluator.collect()) == 2


def test_a_run_that_never_asks_is_not_stopped() -> None:
    def never_asks(job: Any) -> float:
        job.record(1, 0.0)
        job.record(2, job["x"])
        return float(job["x"])

    clock, evaluator = evaluator_of("epoch:1", run=never_asks)
    evaluator.submit(trials(0.5))
    clock.advance(1000.0)
    [result] = evaluator.collect()
    assert (result.objective, result.stopped, result.ended_at) == (0.5, False, 80.0)


def test_a_run_that_asks_late_is_stopped_when_it_asks() -> None:
    def asks_at_three(job: Any) -> float:
        for epoch in range(1, 9):
            job.record(epoch, job["x"])
            if epoch == 3:
                job.stopped()
        return float(job["x"])

    clock, evaluator = evaluator_of("epoch:1", run=asks_at_three)
    evaluator.submit(trials(0.5))
    clock.advance(1000.0)
    [result] = evaluator.collect()
    assert (result.stopped, result.ended_at, result.curve[-1][0]) == (True, 30.0, 3.0)


def test_a_run_that_would_fail_later_is_stopped_before() -> None:
    def fails_at_the_end(job: Any) -> float:
        job.record(1, 0.1)
        job.stopped()
        job.record(2, 0.1)
        raise ValueError("diverged")

    clock, evaluator = evaluator_of("epoch:1", run=fails_at_the_end)
    evaluator.submit(trials(0.5))
    clock.advance(1000.0)
    [result] = evaluator.collect()
    assert (result.objective, result.failure, result.traceback) == (0.1, None, None)


def test_max_is_learnt_from_the_first_that_finishes() -> None:
    clock, evaluator = evaluator_of("sha:competing=1")
    evaluator.submit(trials(0.9, 0.8))
    clock.advance(1000.0)
    evaluator.collect()
    assert [(number, decision.rung) for number, decision in evaluator.decisions] == [(0, 1), (0, 3), (1, 1)]
    clock, evaluator = evaluator_of("median:competing=1")  # its rungs have no end until then
    evaluator.submit(trials(0.8, 0.9))
    clock.advance(1000.0)
    assert not any(result.stopped for result in evaluator.collect())
    assert [decision.n for _, decision in evaluator.decisions] == [*[0] * 8, *[1] * 7, 0]  # nothing is left to save


def test_the_best_stopped_ones_go_on_when_all_were_submitted() -> None:
    clock, evaluator = evaluator_of("epoch:1", workers=2, finish_top=2)
    evaluator.open("s", {"problem": {}}, max_evals=4)
    evaluator.submit(trials(0.1, 0.4, 0.2))
    clock.advance(30.0)
    assert all(result.stopped for result in evaluator.collect())
    evaluator.submit([Trial(3, {"x": 0.3})])
    clock.advance(10.0)
    [last] = evaluator.collect()
    assert last.stopped
    assert evaluator.counts[TrialState.RUNNING] == 2
    assert evaluator.line(3)["job_status"] == "RUNNING"
    clock.advance(70.0)
    finished = evaluator.collect()
    assert {(result.number, result.objective, result.stopped) for result in finished} == {
        (1, 0.4, False),
        (3, 0.3, False),
    }
    assert {result.ended_at for result in finished} == {110.0}
    assert evaluator.line(1)["m:stopped"] is False
    assert evaluator.counts[TrialState.DONE] == 4
    assert evaluator.busy_s(1000.0) == 4 * 10 + 2 * 70
    assert evaluator.num_stopped == 2


def test_none_goes_on_while_a_running_one_may_still_be_stopped() -> None:
    clock, evaluator = evaluator_of("epoch:1", workers=2, finish_top=1)
    evaluator.open("s", {"problem": {}}, max_evals=2)
    evaluator.submit(trials(0.1))
    clock.advance(5.0)
    evaluator.submit([Trial(1, {"x": 0.9})])
    clock.advance(5.0)
    [first] = evaluator.collect()
    assert first.number == 0
    assert evaluator.counts[TrialState.DONE] == 1
    clock.advance(1000.0)
    assert [(result.number, result.stopped) for result in evaluator.collect()] == [(1, True), (1, False)]


def test_what_would_go_on_and_is_withdrawn_stays_as_it_was_stopped() -> None:
    clock, evaluator = evaluator_of("epoch:1", finish_top=2)
    evaluator.open("s", {"problem": {}}, max_evals=2)
    evaluator.submit(trials(0.1, 0.2))
    clock.advance(20.0)
    evaluator.collect()
    assert evaluator.counts[TrialState.READY] == 1
    assert evaluator.cancel() == []
    assert evaluator.counts[TrialState.READY] == 0
    assert evaluator.line(0)["m:stopped"] is True
    assert evaluator.line(0)["objective"] == 0.1 / 8


def test_every_trial_has_a_folder_of_its_own_that_is_gone_afterwards() -> None:
    seen = []

    def checkpoints(job: Any) -> float:
        assert not list(job.folder.iterdir())
        (job.folder / "model").write_text("weights")
        seen.append(job.folder)
        return 1.0

    clock, evaluator = evaluator_of("none", run=checkpoints)
    evaluator.submit(trials(0.1, 0.2))
    clock.advance(1000.0)
    assert len(evaluator.collect()) == 2
    assert len(set(seen)) == 2
    assert not any(folder.exists() for folder in seen)


def simulated(stopper: str, seed: int, **options: Any) -> Any:
    return simulate(
        line_problem(),
        trains,
        method="random",
        workers=8,
        minutes=1e5,
        max_evals=80,
        duration=normal_durations(80, 20, seed),
        seed=seed,
        timer=instant_timer(),
        stopper=stopper,
        **options,
    )


def test_a_stopped_search_finds_the_same_with_a_third_of_the_worker_hours() -> None:
    shares, losses = [], []
    for seed in range(5):
        full, stopped = simulated("none", seed), simulated("sha:max=8,factor=3,competing=5", seed)
        assert (full.stopped, full.worker_hours_saved) == (0, 0.0)
        assert stopped.evaluations == 80
        assert stopped.worker_hours + stopped.worker_hours_saved == pytest.approx(full.worker_hours)
        shares.append(stopped.worker_hours / full.worker_hours)
        losses.append(full.best_objective - stopped.best_objective)
    assert statistics.median(shares) < 0.4
    assert statistics.median(losses) == 0.0


def test_one_epoch_and_the_best_finished_through_the_whole_loop() -> None:
    report = simulated("epoch:1", 1, finish_top=10)
    assert report.evaluations == 80
    assert report.stopped == 70
    assert report.best_objective == simulated("none", 1).best_objective
    assert report == simulated("epoch:1", 1, finish_top=10)


def test_a_loss_is_compared_as_a_loss() -> None:
    clock = VirtualClock()
    stopper = parse_stopper("sha:max=8,competing=1")
    evaluator = SimulatedEvaluator(trains, 1, clock, eighty_seconds, minimize=True, stopper=stopper)
    evaluator.submit(trials(0.1, 0.9, 0.05))
    clock.advance(1000.0)
    assert [(result.number, result.stopped) for result in evaluator.collect()] == [(0, False), (1, True), (2, False)]
    assert evaluator.line(1)["objective"] == -0.9 / 8


@pytest.mark.parametrize(
    "options", [{"finish_top": 3}, {"finish_top": 3, "stopper": "epoch:1"}, {"finish_top": 3, "max_evals": 9}]
)
def test_finish_top_needs_a_stopper_and_a_number_of_evaluations(options: Any) -> None:
    with pytest.raises(SettingsError, match=r"finish_top.*stopper.*max_evals"):
        simulate(line_problem(), trains, workers=1, minutes=1, duration=ten_seconds, **options)
    with pytest.raises(SettingsError, match="finish_top >= 0"):
        SimulatedEvaluator(trains, 1, VirtualClock(), ten_seconds, finish_top=-1)


def test_the_command_says_what_a_stopper_saved(tmp_path: Path) -> None:
    (tmp_path / "trains.py").write_text(
        "from deephyper_balsam import HpProblem\n"
        "problem = HpProblem('line')\n"
        "problem.add_hyperparameter((0.0, 1.0), 'x')\n"
        "def run(job):\n"
        "    for epoch in range(1, 9):\n"
        "        job.record(epoch, job['x'] * epoch)\n"
        "        if job.stopped():\n"
        "            break\n"
        "    return job.objective\n"
    )
    arguments = ["simulate", "--problem", str(tmp_path / "trains.py"), "--method", "random", "--workers", "4"]
    arguments += ["--minutes", "1000", "--duration-mean", "90", "--max-evals", "40"]
    arguments += ["--stopper", "epoch:1", "--finish-top", "4"]
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0, table.output
    assert "stopped early   36" in table.output
    assert "saved           0.7875 worker-hours (79% of 1)" in table.output
    answer = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert answer["stopped"] == 36
    assert answer["worker_hours_saved"] == pytest.approx(0.7875)
    wrong = CliRunner().invoke(main, [*arguments[:-4], "--stopper", "hyperband"])
    assert wrong.exit_code == 2
    assert "sha:max=27" in wrong.output
