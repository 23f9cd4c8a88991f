"""A search without Balsam, in processes of this machine, from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deephyper_balsam import AMBS, HpProblem, InProcessEvaluator, RandomSearch
from deephyper_balsam.driver.progress import Progress
from deephyper_balsam.errors import BrokenApplicationError, InputError, SearchExistsError, SettingsError
from deephyper_balsam.node.pool_worker import read_rungs
from deephyper_balsam.node.stoppers import Decision, parse_stopper
from deephyper_balsam.problem.warm_start import read_warm_start
from deephyper_balsam.trial import TrialState

RUNS = """
import os, signal, time
from pathlib import Path

def good(job):
    print("trial", job.id)
    return {"objective": -(job["x"] - 0.5) ** 2, "metadata": {"pid": os.getpid()}}

def slow(job):
    time.sleep(60)

def mixed(job):
    if job.id == 1:
        raise ValueError("the loss diverged")
    if job.id == 2:
        os._exit(3)
    if job.id == 3:
        time.sleep(60)
    if job.id == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return job["x"]

def once(job):
    mark = Path("was-here")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job["x"]

def broken(job):
    import torch_that_is_not_there
"""


@pytest.fixture
def runs(tmp_path: Path) -> str:
    (tmp_path / "runs.py").write_text(RUNS)
    return str(tmp_path / "runs.py")


@pytest.fixture
def problem() -> HpProblem:
    made = HpProblem("line")
    made.add_hyperparameter((0.0, 1.0), "x")
    return made


def test_a_search_evaluates_its_budget_and_writes_what_a_search_with_balsam_writes(
    runs: str, problem: HpProblem, tmp_path: Path
) -> None:
    evaluator = InProcessEvaluator(f"{runs}:good", num_workers=3)
    seen: list[Progress] = []
    search = AMBS(problem, evaluator, "s", seed=1, log_dir=tmp_path, num_initial=4, poll_s=0.05)
    frame = search.search(max_evals=8, on_progress=seen.append)
    assert set(frame["job_status"]) == {"DONE"}
    assert frame["job_id"].tolist() == list(range(8))
    assert frame["objective"].tolist() == pytest.approx([-((x - 0.5) ** 2) for x in frame["p:x"]])
    assert frame["m:pid"].nunique() == 8
    assert os.getpid() not in set(frame["m:pid"])
    assert max(one.states[TrialState.RUNNING] for one in seen) == 3
    assert len(pd.read_csv(tmp_path / "s" / "results.csv")) == 8
    assert "best so far" in (tmp_path / "s" / "search.log").read_text()
    assert "seed: 1" in (tmp_path / "s" / "search.yaml").read_text()
    assert (tmp_path / "s" / "5" / "job.out").read_text() == "trial 5\n"
    assert search.ended_because is not None


def test_a_function_of_this_program_is_evaluated_too(problem: HpProblem, tmp_path: Path) -> None:
    factor = 3.0
    evaluator = InProcessEvaluator(lambda job: factor * job["x"], num_workers=2)
    frame = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05).search(max_evals=4)
    assert frame["objective"].tolist() == pytest.approx((3 * frame["p:x"]).tolist())


def test_a_problem_that_minimises_has_its_losses_in_the_table(runs: str, tmp_path: Path) -> None:
    problem = HpProblem("loss", minimize=True)
    problem.add_hyperparameter((0.0, 1.0), "x")
    evaluator = InProcessEvaluator(lambda job: job["x"], num_workers=2)
    search = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05)
    frame = search.search(max_evals=4, on_progress=lambda progress: None)
    assert frame["m:loss"].tolist() == pytest.approx(frame["p:x"].tolist())
    assert frame["objective"].tolist() == pytest.approx((-frame["p:x"]).tolist())


def test_runs_that_raise_exit_hang_or_are_killed_are_trials_that_failed(
    runs: str, problem: HpProblem, tmp_path: Path
) -> None:
    evaluator = InProcessEvaluator(f"{runs}:mixed", num_workers=3, eval_timeout=1.0)
    frame = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05).search(max_evals=7)
    assert frame["job_status"].tolist() == ["DONE", "FAILED", "FAILED", "FAILED", "FAILED", "DONE", "DONE"]
    said = frame["m:failure"].tolist()
    assert said[1] == "ValueError: the loss diverged"
    assert "status 3" in said[2]
    assert said[3] == "timed out after 1 s"
    assert "SIGKILL" in said[4]
    assert "SIGKILL" in frame.loc[4, "m:retried_after"]


def test_a_run_that_the_machine_ended_is_run_once_more(runs: str, problem: HpProblem, tmp_path: Path) -> None:
    evaluator = InProcessEvaluator(f"{runs}:once")
    frame = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05).search(max_evals=2)
    assert set(frame["job_status"]) == {"DONE"}


def test_a_worker_that_is_killed_costs_one_try_and_another_takes_its_place(problem: HpProblem, tmp_path: Path) -> None:
    def kill_the_worker(job: Any) -> float:
        mark = tmp_path / f"killed-{job.id}"
        if job.id == 0 and not mark.exists():
            mark.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        return float(job["x"])

    evaluator = InProcessEvaluator(kill_the_worker)
    frame = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05).search(max_evals=3)
    assert set(frame["job_status"]) == {"DONE"}
    assert "the process that ran it ended with status -9" in frame.loc[0, "m:retried_after"]


def test_when_all_fail_alike_the_search_ends_and_says_where_to_look(
    runs: str, problem: HpProblem, tmp_path: Path
) -> None:
    evaluator = InProcessEvaluator(f"{runs}:broken", num_workers=2)
    search = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05)
    with pytest.raises(
        BrokenApplicationError, match=r"torch_that_is_not_there[\s\S]*job.out of its folder .*/s/<number"
    ):
        search.search(max_evals=50)
    assert (tmp_path / "s" / "results.csv").exists()


def test_stop_ends_what_runs_and_the_search_goes_on_where_it_was(problem: HpProblem, tmp_path: Path) -> None:
    def waits(job: Any) -> float:
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        return float(job["x"])

    evaluator = InProcessEvaluator(waits, num_workers=2)
    search = RandomSearch(problem, evaluator, "s", seed=1, log_dir=tmp_path, poll_s=0.05)

    def end(progress: Progress) -> None:
        if progress.states[TrialState.RUNNING] == 2:
            search.stop()

    began_at = time.monotonic()
    first = search.search(max_evals=4, on_progress=end)
    assert time.monotonic() - began_at < 15
    assert set(first["job_status"]) == {"CANCELLED"}
    (tmp_path / "go").touch()
    frame = search.search()
    done = frame[frame["job_status"] == "DONE"]
    assert done["job_id"].tolist() == [2, 3, 4, 5]
    assert frame["job_status"].tolist()[:2] == ["CANCELLED"] * 2


def test_a_search_whose_folder_has_results_is_refused_and_can_be_a_warm_start(
    runs: str, problem: HpProblem, tmp_path: Path
) -> None:
    make = {"seed": 1, "log_dir": tmp_path, "poll_s": 0.05}
    RandomSearch(problem, InProcessEvaluator(f"{runs}:good"), "s", **make).search(max_evals=3)
    before = (tmp_path / "s" / "results.csv").read_text()
    for budget in ({"max_evals": 5}, {}):
        with pytest.raises(SearchExistsError, match=r"cannot go on.*read_warm_start"):
            RandomSearch(problem, InProcessEvaluator(f"{runs}:good"), "s", **make).search(**budget)  # type: ignore[arg-type]
    assert (tmp_path / "s" / "results.csv").read_text() == before
    points = read_warm_start(tmp_path / "s" / "results.csv", problem).points
    warm = AMBS(problem, InProcessEvaluator(f"{runs}:good"), "t", warm_start=points, **make)
    assert len(warm.search(max_evals=2)) == 2
    assert "Begins with 3 points from elsewhere" in (tmp_path / "t" / "search.log").read_text()


def test_what_cannot_be_is_refused_at_once(runs: str, problem: HpProblem, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="num_workers >= 1"):
        InProcessEvaluator(f"{runs}:good", num_workers=0)
    with pytest.raises(InputError, match="eval_timeout > 0"):
        InProcessEvaluator(f"{runs}:good", eval_timeout=0)
    with pytest.raises(SettingsError, match="needs an end"):
        RandomSearch(problem, InProcessEvaluator(f"{runs}:good"), "s", log_dir=tmp_path).search()
    assert not (tmp_path / "s").exists()


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with "&"
from deephyper_balsam import HpProblem, InProcessEvaluator, RandomSearch
problem = HpProblem("line")
problem.add_hyperparameter((0.0, 1.0), "x")
RandomSearch(problem, InProcessEvaluator(sys.argv[1], num_workers=2), "s", seed=1).search(max_evals=9)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_in_order_and_no_process_outlives_its_search(number: int, runs: str, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    driver = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"{runs}:slow"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    watched = psutil.Process(driver.pid)
    deadline = time.monotonic() + 30
    while len(watched.children(recursive=True)) < 4 and time.monotonic() < deadline:  # two workers, a run in each
        time.sleep(0.05)
    time.sleep(0.5)
    below = watched.children(recursive=True)
    assert len(below) == 4
    driver.send_signal(number)
    assert driver.stderr is not None
    said = driver.stderr.read()
    driver.wait(30)
    _, alive = psutil.wait_procs(below, timeout=15)
    assert alive == []
    if number == signal.SIGINT:
        assert driver.returncode == 0, said
        assert "2 cancelled" in said
        assert "call search() again" in said
        assert set(pd.read_csv(tmp_path / "s" / "results.csv")["job_status"]) == {"CANCELLED"}


def test_a_wait_ends_when_a_worker_answers(runs: str, tmp_path: Path) -> None:
    from deephyper_balsam.trial import Trial

    evaluator = InProcessEvaluator(f"{runs}:good")
    evaluator.open("s", {"problem": {}, "seed": 1}, max_evals=1, folder=tmp_path / "s")
    evaluator.submit([Trial(0, {"x": 0.5})])
    began_at = time.monotonic()
    evaluator.wait(60.0, threading.Event())
    assert time.monotonic() - began_at < 30
    assert [result.number for result in evaluator.collect()] == [0]
    evaluator.close()


# --- early discarding -------------------------------------------------------------------------------------------------


EPOCHS = """
import time
def run(job):
    for epoch in range(1, 10):
        time.sleep(0.02)
        job.record(epoch, job["x"] * epoch)
        if job.stopped():
            return None
    return job.objective
"""


@pytest.mark.parametrize("stopper", ["sha:max=9,competing=3", "median:max=9,interval=2,competing=3", "epoch:3"])
def test_runs_stop_early_in_processes_too(tmp_path: Path, stopper: str) -> None:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    (tmp_path / "epochs.py").write_text(EPOCHS)
    evaluator = InProcessEvaluator(f"{tmp_path / 'epochs.py'}:run", 2)
    search = RandomSearch(problem, evaluator, "stopping", seed=1, log_dir=tmp_path, poll_s=0.02, stopper=stopper)
    frame = search.search(max_evals=12, show=False)
    assert list(frame["job_status"]) == ["DONE"] * 12
    assert frame["m:stopped"].sum() >= (12 if stopper.startswith("epoch") else 3)
    assert set(frame["m:budget"][frame["m:stopped"]]) <= {1.0, 3.0, 5.0, 7.0}
    assert set(frame["m:budget"][~frame["m:stopped"]]) <= {9.0}
    assert np.allclose(frame["objective"], frame["p:x"] * frame["m:budget"])
    for curve, budget in zip(frame["m:curve"], frame["m:budget"], strict=True):
        assert [point[0] for point in curve] == list(range(1, int(budget) + 1))
    rungs = [read_rungs(search.folder / str(number)) for number in frame["job_id"]]
    made = parse_stopper(stopper)
    if made.compares:
        for stopped, decisions in zip(frame["m:stopped"], rungs, strict=True):
            assert all(made.agrees(Decision.from_dict(one)) for one in decisions)
            assert stopped == any(one["stop"] for one in decisions)


def test_what_was_decided_in_another_search_of_the_folder_or_the_evaluator_counts_for_nothing(tmp_path: Path) -> None:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    (tmp_path / "epochs.py").write_text(EPOCHS)
    evaluator, frames = InProcessEvaluator(f"{tmp_path / 'epochs.py'}:run", 2), []
    for name in ("a", "b", "a"):
        (tmp_path / name / "results.csv").unlink(missing_ok=True)
        search = RandomSearch(
            problem, evaluator, name, seed=1, log_dir=tmp_path, poll_s=0.02, stopper="sha:max=9,competing=8"
        )
        frames.append(search.search(max_evals=4, show=False))
        assert json.loads((tmp_path / name / "standing.json").read_text())["rungs"]["1"][0] == 4
    assert all(set(frame["m:budget"]) == {9.0} for frame in frames)  # four are too few to stop one


def test_a_stopper_that_is_none_is_refused_before_anything_begins(tmp_path: Path) -> None:
    problem = HpProblem("line")
    problem.add_hyperparameter((0.0, 1.0), "x")
    with pytest.raises(SettingsError, match="A stopper is one of"):
        RandomSearch(problem, InProcessEvaluator(len), "bad", log_dir=tmp_path, stopper="hyperband")
    assert not (tmp_path / "bad").exists()
