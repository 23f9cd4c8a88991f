"""The driver from end to end, on the fake of Balsam's API with a site that works in a thread."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, PlayingSite, VirtualSite

from deephyper_balsam.common.timing import Timing
from deephyper_balsam.driver.balsam_session import BalsamEvaluator
from deephyper_balsam.driver.patience import Patience
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.driver.search import AMBS, GA, RandomSearch, Search
from deephyper_balsam.errors import (
    BalsamError,
    BrokenApplicationError,
    InputError,
    NotLoggedInError,
    ProblemError,
    SearchExistsError,
    SettingsError,
    UnreachableError,
)
from deephyper_balsam.optimizers import make_optimizer
from deephyper_balsam.problem.hp_problem import HpProblem
from deephyper_balsam.store import driver_requests
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.trial import TrialState

pytest_plugins = ["balsam_fixtures"]

QUICK = Timing(allocations_s=0.02, heartbeat_s=0.05)
"""The site of these tests is a fast one."""

Play = Callable[..., PlayingSite]


def run(job: Any) -> float:
    """Stand in for the user's function; on the fake site, `score` is called instead."""
    return float(job["x"])


def score(config: dict[str, Any]) -> float:
    return -((config["x"] - 3.0) ** 2) + config["n"]


@pytest.fixture
def problem() -> HpProblem:
    made = HpProblem("parabola")
    made.add_hyperparameter((-10.0, 10.0), "x")
    made.add_hyperparameter((1, 8), "n")
    return made


@pytest.fixture
def small() -> HpProblem:
    """Six configurations."""
    made = HpProblem("small")
    made.add_hyperparameter((1, 3), "x")
    made.add_hyperparameter((1, 2), "n")
    return made


@pytest.fixture
def make(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Iterator[Callable[..., Search]]:
    made: list[BalsamEvaluator] = []

    def search(problem: HpProblem, name: str = "s", method: str = "random", **options: Any) -> Search:
        nodes = options.pop("nodes", 3)
        request = AllocationRequest(nodes) if nodes else None
        made.append(BalsamEvaluator(run, "lab", allocation=request, client_path=client_yml, timing=QUICK))
        options = {"seed": 5, "log_dir": tmp_path / "out", "poll_s": 0.01, **options}
        return Search(problem, made[-1], name, method, **options)

    yield search
    for evaluator in made:
        evaluator.gateway._client.session.close()


Make = Callable[..., Search]


def leases(api: BalsamApi) -> list[dict[str, Any]]:
    """The notes of the drivers of the search, the oldest first."""
    return [row["data"] for row in list(api.jobs.values()) if row["tags"].get("kind") == "driver"]


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []

    def go() -> None:
        try:
            answers.append(call())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    return thread, answers


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# --- a search --------------------------------------------------------------------------------------------------------


def test_a_search_asks_for_an_allocation_evaluates_its_budget_and_gives_everything_back(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, tmp_path: Path
) -> None:
    playing = play(score)
    frame = make(problem).search(max_evals=20)
    assert frame["job_id"].tolist() == list(range(20))
    assert set(frame["job_status"]) == {"DONE"}
    expected = [score({"x": row["p:x"], "n": row["p:n"]}) for _, row in frame.iterrows()]
    assert frame["objective"].tolist() == expected
    assert list(frame.columns[:4]) == ["p:x", "p:n", "objective", "job_id"]
    assert (frame["m:timestamp_end"] <= frame["m:timestamp_gather"]).all()
    assert sorted(api.trials("s")) == list(range(20))
    assert playing.most_at_once == 3
    [batch] = api.batch_jobs.values()
    assert batch["state"] in ("pending_deletion", "finished")
    assert [lease["why"] for lease in leases(api)] == ["complete"]
    written = pd.read_csv(tmp_path / "out" / "s" / "results.csv")
    assert written["objective"].tolist() == pytest.approx(expected)
    settings = yaml.safe_load((tmp_path / "out" / "s" / "search.yaml").read_text())
    assert (settings["method"], settings["seed"]) == ("random", 5)
    names = sorted(path.name for path in (tmp_path / "out" / "s").iterdir())
    assert names == ["results.csv", "search.log", "search.yaml"]
    assert "best so far" in (tmp_path / "out" / "s" / "search.log").read_text()


def test_progress_is_told_after_every_look_and_ends_with_the_best(make: Make, play: Play, problem: HpProblem) -> None:
    play(score)
    seen: list[Progress] = []
    frame = make(problem).search(max_evals=10, timeout=60, on_progress=seen.append)
    assert [one.evaluated for one in seen] == sorted(one.evaluated for one in seen)
    last = seen[-1]
    assert (last.evaluated, last.max_evals, last.timeout_s) == (10, 10, 60)
    assert last.best is not None
    assert last.best["objective"] == frame["objective"].max()
    assert last.evaluations_per_min > 0
    assert "no allocation is alive" in (seen[0].notice or "") or "waiting" in (seen[0].notice or "")
    assert max(one.capacity for one in seen) == 3


def test_never_more_is_under_way_than_runs_and_waits_usefully(make: Make, play: Play, problem: HpProblem) -> None:
    play(score)
    seen: list[Progress] = []
    make(problem).search(max_evals=40, on_progress=seen.append)
    under_way = [one.states[TrialState.READY] + one.states[TrialState.RUNNING] for one in seen]
    assert max(under_way) <= 3 + 40 / 5  # as many as run, and a fifth of what has ended


def test_failing_runs_count_have_their_reason_and_are_not_run_again(
    make: Make, play: Play, problem: HpProblem, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deephyper_balsam")

    def often_wrong(config: dict[str, Any]) -> float:
        if config["x"] < 0:
            raise ValueError("the loss diverged")
        return config["x"]

    play(often_wrong)
    frame = make(problem).search(max_evals=20)
    wrong = frame[frame["p:x"] < 0]
    assert len(frame) == 20
    assert 0 < len(wrong) < 20
    assert set(wrong["job_status"]) == {"FAILED"}
    assert set(wrong["m:failure"]) == {"ValueError: the loss diverged"}
    assert wrong["objective"].isna().all()
    assert "failed: ValueError: the loss diverged" in caplog.text


def test_when_every_run_crashes_the_search_ends_all_the_same(make: Make, play: Play, problem: HpProblem) -> None:
    play(lambda config: 1 / 0, crash=True)
    frame = make(problem, max_failures=0).search(max_evals=6)
    assert set(frame["m:failure"]) == {"the run ended with status 1 before it left a result"}
    assert set(frame["m:retried_after"]) == set(frame["m:failure"])


def test_when_the_first_trials_all_fail_alike_the_search_ends_with_the_reason_and_the_results_are_written(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    def broken(config: dict[str, Any]) -> float:
        raise ImportError(f"no module 'torch' for {config['x']}")

    play(broken)
    search = make(problem, max_failures=4)
    with pytest.raises(BrokenApplicationError, match=r"The first 4 trials all failed alike.*no module 'torch'"):
        search.search(max_evals=200)
    rows = api.trials("s")
    assert 4 <= sum("gathered" in row["data"] for row in rows.values()) < 20
    assert (search.folder / "results.csv").is_file()
    assert {row["state"] for row in rows.values()} <= {"JOB_FINISHED", "FAILED", "RUNNING"}  # none waits


def test_failures_of_a_mended_application_do_not_end_its_next_driver(
    make: Make, play: Play, problem: HpProblem
) -> None:
    broken = [True]

    def mended(config: dict[str, Any]) -> float:
        if broken[0]:
            raise ImportError("no module 'torch'")
        return config["x"]

    play(mended)
    with pytest.raises(BrokenApplicationError):
        make(problem, max_failures=2).search(max_evals=20)
    broken[0] = False
    frame = make(problem, max_failures=2).search(max_evals=20)
    assert (frame["job_status"] == "DONE").sum() >= 10


@pytest.mark.parametrize(("method", "options"), [("ambs", {"num_initial": 4}), ("ga", {"population": 4})])
def test_the_other_methods_drive_too(
    make: Make, play: Play, problem: HpProblem, method: str, options: dict[str, Any]
) -> None:
    play(score)
    frame = make(problem, method=method, **options).search(max_evals=10)
    assert sorted(frame["job_status"]) == ["DONE"] * 10


def test_every_trial_keeps_what_it_was_asked_from(make: Make, play: Play, problem: HpProblem, api: BalsamApi) -> None:
    play(score)
    make(problem, method="ambs", num_initial=4).search(max_evals=12)
    asked = [row["data"]["asked"] for _, row in sorted(api.trials("s").items())]
    assert asked[0]["kind"] in ("initial", "start")
    assert [one["told"] for one in asked] == sorted(one["told"] for one in asked)
    assert asked[-1]["told"] > 0
    assert sorted(row["data"]["gathered"]["order"] for row in api.trials("s").values()) == list(range(12))


def test_the_classes_are_searches_of_their_method(site: VirtualSite, client_yml: Path, problem: HpProblem) -> None:
    evaluator = BalsamEvaluator(run, "lab", client_path=client_yml, timing=QUICK)
    assert [kind(problem, evaluator, name="s").method for kind in (AMBS, RandomSearch, GA)] == ["ambs", "random", "ga"]


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_a_space_that_is_used_up_ends_the_search(
    make: Make, play: Play, small: HpProblem, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deephyper_balsam")
    play(score)
    frame = make(small).search(max_evals=100)
    assert len(frame[["p:x", "p:n"]].drop_duplicates()) == len(frame) == 6
    assert "Every configuration of the space has been evaluated" in caplog.text


def test_the_timeout_ends_it_and_withdraws_what_waits(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    playing = play(score)

    def freeze(progress: Progress) -> None:
        if progress.states[TrialState.DONE]:
            playing.close()  # what waits now waits until the end

    began_at = time.monotonic()
    frame = make(problem).search(timeout=2.0, on_progress=freeze)
    assert time.monotonic() - began_at < 10
    assert {"DONE", "CANCELLED"} <= set(frame["job_status"])
    assert "READY" not in set(frame["job_status"])
    cancelled = {number for number, row in api.trials("s").items() if row["data"].get("cancelled")}
    assert cancelled == set(frame[frame["job_status"] == "CANCELLED"]["job_id"])


def test_stop_withdraws_what_waits_writes_the_results_and_gives_up_the_lease(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, tmp_path: Path
) -> None:
    playing = play(score)
    search = make(problem)
    seen: list[Progress] = []
    thread, answers = in_thread(lambda: search.search(max_evals=1000, on_progress=seen.append))
    wait_until(lambda: bool(seen) and seen[-1].evaluated >= 3)
    playing.close()
    wait_until(lambda: any(row["state"] == "STAGED_IN" for row in list(api.jobs.values())))
    search.stop()
    assert search.stopped
    thread.join(10)
    [frame] = answers
    assert set(frame["job_status"]) >= {"DONE", "CANCELLED"}
    assert "READY" not in set(frame["job_status"])
    assert len(pd.read_csv(tmp_path / "out" / "s" / "results.csv")) == len(frame)
    assert [lease["why"] for lease in leases(api)] == ["interrupted"]


@pytest.mark.parametrize("how", ["stop", "interrupt", "order"])
def test_a_search_that_was_stopped_is_called_again_and_goes_on_as_a_new_process_would(
    how: str, make: Make, play: Play, problem: HpProblem
) -> None:
    play(score)
    search = make(problem)
    search.evaluator.timing = replace(QUICK, heartbeat_s=0.0)
    asker = make(problem).evaluator.gateway
    timeout_s = search.evaluator.gateway._read_timeout_s

    def end(progress: Progress) -> None:
        if progress.evaluated < 3:
            return
        if how == "stop":
            search.stop()
        elif how == "interrupt":
            raise KeyboardInterrupt
        elif not driver_requests.read_requests(asker, "s"):
            driver_requests.send_request(asker, 1, "s", driver_requests.STOP, time.time(), wait_s=5.0)

    first = search.search(max_evals=20, on_progress=end)
    assert (first["job_status"] == "DONE").sum() < 20
    seen: list[tuple[str, bool]] = []
    frame = search.search(
        max_evals=20, on_progress=lambda progress: seen.append((progress.notice or "", search.evaluator._driven.ending))
    )
    assert (frame["job_status"] == "DONE").sum() == 20
    assert not search.stopped
    assert not any("stopping" in notice or ending for notice, ending in seen)
    assert search.evaluator.gateway._read_timeout_s == timeout_s


def test_a_request_to_stop_through_balsam_ends_it(make: Make, play: Play, problem: HpProblem, api: BalsamApi) -> None:
    play(score, step_s=0.05)
    search = make(problem)
    thread, answers = in_thread(lambda: search.search(max_evals=1000))
    wait_until(lambda: len(api.batch_jobs) > 0)
    asker = make(problem).evaluator.gateway
    given = driver_requests.send_request(asker, 1, "s", driver_requests.STOP, time.time(), wait_s=0.0)
    thread.join(10)
    assert isinstance(answers[0], pd.DataFrame)
    [request] = driver_requests.read_requests(asker, "s")
    assert request.handled is not None
    assert "withdrew" in request.handled["did"]
    assert leases(api)[0]["why"] == f"stopped by {given.by}"


@pytest.mark.parametrize("budget", [{}, {"max_evals": 0}, {"timeout": 0}, {"timeout": -1}])
def test_a_search_without_an_end_is_refused_before_anything_is_made(
    make: Make, problem: HpProblem, api: BalsamApi, tmp_path: Path, budget: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=r"needs an end|must hold"):
        make(problem).search(**budget)
    assert not api.jobs
    assert not (tmp_path / "out").exists()


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_search_goes_on_in_an_empty_folder_with_its_numbers_and_repeats_nothing(
    make: Make, play: Play, problem: HpProblem, tmp_path: Path
) -> None:
    play(score)
    first = make(problem).search(max_evals=8)
    later = make(problem, log_dir=tmp_path / "elsewhere").search(max_evals=15)
    assert later["job_id"].tolist() == list(range(15))
    pd.testing.assert_frame_equal(later.head(8)[["p:x", "p:n", "objective"]], first[["p:x", "p:n", "objective"]])
    assert len(later[["p:x", "p:n"]].drop_duplicates()) == 15
    assert len(pd.read_csv(tmp_path / "elsewhere" / "s" / "results.csv")) == 15


def test_two_drivers_ask_what_one_asks(make: Make, play: Play, problem: HpProblem) -> None:
    play(score)
    whole = make(problem, "whole").search(max_evals=12)
    make(problem, "halves").search(max_evals=5)
    halves = make(problem, "halves").search(max_evals=12)
    pd.testing.assert_frame_equal(whole[["p:x", "p:n", "objective"]], halves[["p:x", "p:n", "objective"]])


def test_a_finished_search_is_over_at_once(make: Make, play: Play, problem: HpProblem, api: BalsamApi) -> None:
    play(score)
    make(problem).search(max_evals=5)
    assert len(make(problem).search(max_evals=5)) == 5
    assert len(api.trials("s")) == 5


def test_results_that_came_while_no_driver_looked_are_taken_in(
    make: Make, site: VirtualSite, problem: HpProblem, api: BalsamApi
) -> None:
    site.add_allocation(3)
    first = make(problem, nodes=0)
    first.evaluator.open("s", first.settings, max_evals=3)
    trials = make_optimizer("random", problem, seed=5).ask(3)
    first.evaluator.submit(trials)  # and the driver is killed
    for job_id in site.acquire(3):
        site.finish(job_id, 0.5)
    frame = make(problem, nodes=0).search(max_evals=3, takeover=True)
    assert frame["objective"].tolist() == [0.5] * 3
    assert len(api.trials("s")) == 3


def test_configurations_that_were_withdrawn_are_evaluated_after_all(
    make: Make, play: Play, site: VirtualSite, small: HpProblem, api: BalsamApi
) -> None:
    site.add_allocation(2)
    search = make(small, nodes=0)
    thread, answers = in_thread(lambda: search.search(max_evals=6))
    wait_until(lambda: sum("trial" in row["tags"] for row in list(api.jobs.values())) == 4)
    search.stop()
    thread.join(10)
    assert set(answers[0]["job_status"]) == {"CANCELLED"}
    play(score)
    frame = make(small, nodes=0).search(max_evals=6)
    done = frame[frame["job_status"] == "DONE"]
    assert len(done[["p:x", "p:n"]].drop_duplicates()) == len(done) == 6
    assert sorted(done["job_id"]) == list(range(4, 10))


def test_a_withdrawn_trial_that_ran_all_the_same_does_not_end_the_next_driver(
    make: Make, play: Play, site: VirtualSite, problem: HpProblem, api: BalsamApi
) -> None:
    site.add_allocation(2)
    search = make(problem, nodes=0)
    thread, _ = in_thread(lambda: search.search(max_evals=6))
    wait_until(lambda: sum("trial" in row["tags"] for row in list(api.jobs.values())) == 4)
    search.stop()
    thread.join(10)
    again = make(problem, nodes=0)
    thread, answers = in_thread(lambda: again.search(max_evals=6))
    wait_until(lambda: sum("trial" in row["tags"] for row in list(api.jobs.values())) == 8)
    site.deliver(api.trials("s")[0]["id"], 0.25)
    play(score)
    thread.join(20)
    [frame] = answers
    assert not isinstance(frame, Exception), frame
    assert frame.loc[0, "objective"] == 0.25
    assert (frame["job_status"] == "DONE").sum() >= 6


def test_another_search_under_the_same_name_is_refused_and_nothing_changes(
    make: Make, play: Play, problem: HpProblem, small: HpProblem, api: BalsamApi
) -> None:
    play(score)
    make(problem).search(max_evals=3)
    for other, what in (
        (make(small), "problem"),
        (make(problem, seed=6), "seed"),
        (make(problem, method="ga"), "meth"),
    ):
        with pytest.raises(SearchExistsError, match=what):
            other.search(max_evals=5)
    assert len(api.trials("s")) == 3


def test_one_evaluator_can_serve_two_searches(make: Make, play: Play, problem: HpProblem, tmp_path: Path) -> None:
    play(score)
    first = make(problem, "one")
    assert len(first.search(max_evals=5)) == 5
    second = Search(problem, first.evaluator, "two", "random", seed=1, log_dir=tmp_path, poll_s=0.01)
    frame = second.search(max_evals=5)
    assert frame["job_id"].tolist() == list(range(5))
    assert set(frame["job_status"]) == {"DONE"}


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_while_the_api_is_away_the_driver_says_so_and_then_goes_on(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, caplog: pytest.LogCaptureFixture
) -> None:
    play(score)
    search = make(problem)
    thread, answers = in_thread(lambda: search.search(max_evals=20))
    wait_until(lambda: sum("gathered" in row["data"] for row in list(api.jobs.values())) >= 5)
    api.away = True
    wait_until(lambda: "Trying again in 1 s" in caplog.text)
    api.away = False
    thread.join(20)
    assert sorted(answers[0]["job_id"]) == list(range(20))
    assert set(answers[0]["job_status"]) == {"DONE"}
    assert sorted(api.trials("s")) == list(range(20))
    assert "does not answer" in caplog.text


def test_lost_answers_of_every_kind_lose_and_repeat_nothing(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    play(score)
    api.lose_next_answer("POST", "batch-jobs/")
    api.answer_after(2, 503, method="POST", path="jobs/")  # the claim and the record, then the first trials
    frame = make(problem).search(max_evals=10)
    assert sorted(api.trials("s")) == list(range(10))
    assert set(frame["job_status"]) == {"DONE"}
    assert len(api.batch_jobs) == 1


def test_trials_whose_creation_was_not_answered_count_as_under_way(
    make: Make, problem: HpProblem, api: BalsamApi, site: VirtualSite
) -> None:
    search, optimizer = make(problem), make_optimizer("random", problem, seed=1)
    evaluator = search.evaluator
    evaluator.open("s", search.settings, max_evals=10)
    evaluator.submit(optimizer.ask(2))
    site.finish(site.acquire(1)[0], 1.0)
    for _ in range(2):
        evaluator.collect()
    trials = optimizer.ask(3)
    api.lose_next_answer("POST", "jobs/")
    with pytest.raises(UnreachableError):
        evaluator.submit(trials)
    evaluator.submit(trials)
    assert evaluator.counts[TrialState.READY] == 4
    evaluator.collect()
    assert evaluator.counts[TrialState.READY] == 4
    assert sorted(api.trials("s")) == list(range(5))


def test_a_lost_answer_on_resume_does_not_overrun_the_budget(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi
) -> None:
    play(score)
    make(problem, nodes=8).search(max_evals=3)
    api.lose_answer_after(1, method="POST", path="jobs/")  # the claim, then the first trials
    frame = make(problem, nodes=8).search(max_evals=7)
    assert frame["job_status"].tolist() == ["DONE"] * 7


def test_after_an_expired_login_the_driver_goes_on_with_the_next_one(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, client_yml: Path, caplog: pytest.LogCaptureFixture
) -> None:
    play(score)
    search = make(problem)
    thread, answers = in_thread(lambda: search.search(max_evals=20))
    wait_until(lambda: sum("gathered" in row["data"] for row in list(api.jobs.values())) >= 5)
    api.token = "the next one"
    wait_until(lambda: "balsam login" in caplog.text)
    api.write_client_yml(client_yml)
    thread.join(20)
    assert sorted(answers[0]["job_id"]) == list(range(20))


def test_stop_while_the_api_is_away_ends_soon_with_the_files(
    make: Make, play: Play, problem: HpProblem, api: BalsamApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    play(score)
    search = make(problem)
    thread, answers = in_thread(lambda: search.search(max_evals=1000))
    wait_until(lambda: sum("gathered" in row["data"] for row in list(api.jobs.values())) >= 5)
    api.away = True
    wait_until(lambda: "Trying again" in caplog.text)
    search.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(answers[0], pd.DataFrame)
    assert len(pd.read_csv(tmp_path / "out" / "s" / "results.csv")) == len(answers[0])
    assert "could not be withdrawn" in caplog.text
    api.away = False
    assert len(make(problem).search(max_evals=3)) >= 5


def test_an_api_that_is_away_at_the_beginning_is_an_error_at_once(
    make: Make, problem: HpProblem, api: BalsamApi
) -> None:
    search = make(problem)
    api.away = True
    with pytest.raises(UnreachableError):
        search.search(max_evals=3)


def test_allocations_that_die_at_once_end_the_search_with_the_reason_and_the_files(
    make: Make, site: VirtualSite, problem: HpProblem, api: BalsamApi, tmp_path: Path
) -> None:
    search = make(problem)
    thread, answers = in_thread(lambda: search.search(max_evals=3))
    wait_until(lambda: len(api.batch_jobs) == 1)
    site.end_allocation(1, "submit_failed", error="Invalid account")
    thread.join(20)
    [error] = answers
    assert isinstance(error, BalsamError)
    assert "The scheduler refused BatchJob 1: Invalid account" in str(error)
    assert (tmp_path / "out" / "s" / "results.csv").is_file()
    assert {row["state"] for row in api.trials("s").values()} <= {"FAILED"}


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("bayes", {}, SettingsError, "no method 'bayes'; choose one of: ambs, random, ga"),
        ("ambs", {"kapa": 1}, SettingsError, "no option 'kapa'; did you mean 'kappa'"),
        ("random", {"surrogate": "RF"}, SettingsError, "no option 'surrogate'"),
        ("random", {"seed": -1}, SettingsError, "seed"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_begun(
    make: Make, problem: HpProblem, api: BalsamApi, method: str, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(problem, method=method, **options)
    assert not api.jobs


def test_a_problem_without_hyperparameters_is_refused(make: Make) -> None:
    with pytest.raises(ProblemError):
        make(HpProblem("empty"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_begun(
    make: Make, problem: HpProblem, api: BalsamApi, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make(problem, log_dir=tmp_path / "file").search(max_evals=3)
    assert not api.jobs


def test_pauses_grow_to_half_a_minute(make: Make, problem: HpProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(problem).evaluator
    pauses: list[float] = []
    answers: Iterator[Any] = iter([UnreachableError("no")] * 7 + [NotLoggedInError("no"), 42])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    monkeypatch.setattr(session, "wait", lambda seconds, stop: pauses.append(seconds))
    assert Patience(session, threading.Event())(call) == 42
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
