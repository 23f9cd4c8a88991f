"""What a run records on its way: `job.record`, the curve, and what a second start of the run finds of the first."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.common.objective import turned
from deephyper_balsam.driver.in_memory import result_of
from deephyper_balsam.node.recording import MAX_POINTS, Curve, Recorder, RecordFile
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.worker import evaluate, job_here
from deephyper_balsam.results.table import columns, csv_text, table


def run_of(text: str, folder: Path) -> dict[str, Any]:
    (folder / "function.py").write_text(text)
    return {"kind": "function", "name": "run", "target": f"{folder / 'function.py'}:run", "search_path": []}


def three_epochs(job: RunningJob) -> float | None:
    for epoch in (1, 2, 3):
        job.record(epoch, job["x"] * epoch)
    return job.objective


class StopsAfter(Recorder):
    """Stops a run whose budget has reached a number."""

    def __init__(self, budget: float, **options: Any) -> None:
        super().__init__(**options)
        self.budget = budget

    def stopped(self) -> bool:
        return self.last is not None and self.last[0] >= self.budget


# --- the curve -------------------------------------------------------------------------------------------------------


def test_a_point_that_is_not_beyond_the_last_replaces_all_from_its_budget_on() -> None:
    curve = Curve([(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)])
    curve.add(2, 0.25)
    assert curve.points == [(1, 0.1), (2, 0.25)]
    assert curve.last == (2, 0.25)


@pytest.mark.parametrize("count", [1, MAX_POINTS, MAX_POINTS + 1, 1000, 10_000])
def test_a_long_curve_stays_small_and_keeps_its_first_and_its_last_point(count: int) -> None:
    curve = Curve((step, -step) for step in range(1, count + 1))
    assert min(count, MAX_POINTS // 2) <= len(curve.points) <= MAX_POINTS
    assert curve.points[0] == (1, -1)
    assert curve.last == (count, -count)
    budgets = [budget for budget, _ in curve.points]
    assert budgets == sorted(set(budgets))
    gaps = [later - earlier for earlier, later in pairwise(budgets)]
    assert max(gaps, default=1) <= 4 * count / len(budgets)


def test_an_empty_curve_has_no_last_point() -> None:
    assert Curve().last is None
    assert RunningJob(0, {}).objective is None
    assert RunningJob(0, {}).last_record is None


# --- what a run function does with it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, None, "3", True, [1]])
def test_a_budget_that_is_none_is_refused_and_nothing_is_kept(budget: Any) -> None:
    job = RunningJob(0, {})
    with pytest.raises(ValueError, match="the budget must be a number above 0"):
        job.record(budget, 0.5)
    assert job.last_record is None


@pytest.mark.parametrize("objective", [math.nan, math.inf, None, "0.5", True, [1, 2]])
def test_an_objective_that_is_none_is_refused_and_nothing_is_kept(objective: Any) -> None:
    job = RunningJob(0, {})
    with pytest.raises(ValueError, match="the objective must be a finite number"):
        job.record(1, objective)
    assert job.last_record is None


@pytest.mark.parametrize("minimize", [False, True])
def test_what_is_recorded_is_in_the_outcome_maximised_and_the_run_sees_its_own_terms(minimize: bool) -> None:
    job = RunningJob(0, {"x": 2.0}, Recorder(minimize=minimize))
    outcome = evaluate(three_epochs, job, minimize=minimize)
    assert outcome["failure"] is None
    assert job.objective == 6.0
    assert job.last_record == (3.0, 6.0)
    assert outcome["curve"] == [[budget, turned(2.0 * budget, minimize)] for budget in (1.0, 2.0, 3.0)]
    assert outcome["objective"] == outcome["curve"][-1][1]
    assert "stopped" not in outcome


def test_a_run_that_records_nothing_has_no_curve() -> None:
    assert "curve" not in evaluate(lambda job: 1.0, RunningJob(0, {}))


def test_a_run_that_returns_nothing_after_it_was_stopped_gives_what_it_recorded_last() -> None:
    def run(job: RunningJob) -> None:
        for epoch in range(1, 10):
            job.record(epoch, 10.0 * epoch)
            if job.stopped():
                return

    outcome = evaluate(run, RunningJob(0, {}, StopsAfter(4)))
    assert (outcome["objective"], outcome["failure"], outcome["stopped"]) == (40.0, None, True)
    assert len(outcome["curve"]) == 4
    minimised = evaluate(run, RunningJob(0, {}, StopsAfter(4, minimize=True)), minimize=True)
    assert minimised["objective"] == -40.0
    forgot = evaluate(run, RunningJob(0, {}, StopsAfter(100)))
    assert forgot["objective"] is None  # nobody stopped it: a `return` is missing
    assert "return" in forgot["failure"]


def test_stopped_says_no_where_nobody_stops_and_a_failure_keeps_the_curve() -> None:
    def run(job: RunningJob) -> float:
        job.record(1, 0.5)
        assert not job.stopped()
        raise RuntimeError("diverged")

    outcome = evaluate(run, RunningJob(0, {}))
    assert outcome["failure"] == "RuntimeError: diverged"
    assert outcome["curve"] == [[1.0, 0.5]]
    result = result_of(3, outcome)
    assert result.curve == [(1.0, 0.5)]
    assert not result.stopped


# --- the folder, and another start ------------------------------------------------------------------------------------


def test_another_start_in_the_folder_goes_on_from_what_was_recorded(tmp_path: Path) -> None:
    first = job_here(7, {"x": 1.0}, tmp_path, minimize=True)
    assert (first.restarts, first.last_record, first.folder) == (0, None, tmp_path)
    first.record(1, 5.0)
    first.record(2, 4.0)
    again = job_here(7, {"x": 1.0}, tmp_path, minimize=True)
    assert (again.restarts, again.last_record, again.objective) == (1, (2.0, 4.0), 4.0)
    again.record(2, 4.5)  # its checkpoint was from before that epoch
    again.record(3, 3.0)
    third = job_here(7, {"x": 1.0}, tmp_path, minimize=True)
    assert third.restarts == 2
    assert third.recorder.curve.points == [(1, -5.0), (2, -4.5), (3, -3.0)]


def test_what_an_earlier_search_of_the_name_recorded_in_the_folder_counts_for_nothing(tmp_path: Path) -> None:
    old = job_here(0, {}, tmp_path, trial="0 of 10")
    assert old.restarts == 0
    old.record(5, 0.9)
    (tmp_path / "checkpoint").write_text("five epochs of another configuration")
    new = job_here(0, {}, tmp_path, trial="0 of 20")
    assert (new.restarts, new.last_record) == (0, None)
    new.record(1, 0.1)
    again = job_here(0, {}, tmp_path, trial="0 of 20")
    assert (again.restarts, again.last_record) == (1, (1, 0.1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "records.jsonl"]  # nothing is moved


def test_a_run_that_records_nothing_leaves_no_file(tmp_path: Path) -> None:
    job = job_here(0, {"x": 1}, tmp_path)
    assert job["x"] == 1
    assert not job.stopped()
    assert job.objective is None
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_costs_its_point_and_nothing_else(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    assert file.begin() == 0
    file.append(1, 0.1)
    with file.path.open("ab") as cut:
        cut.write(b"[2, 0.")
    file.append(3, 0.3)
    with file.path.open("ab") as nonsense:
        nonsense.write(b'\n[1]\n"x"\n[4, null]\n[true, 1]\n\xff\xfe\n{"began": "x"}\n')
    assert file.read().points == [(1, 0.1), (3, 0.3)]
    assert file.begin() == 1


def test_ranks_count_their_own_starts_and_only_the_first_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {}
    for number in (0, 1):
        monkeypatch.setenv("PMI_RANK", str(number))
        jobs[number] = job_here(0, {}, tmp_path, ranks=2)
    for job in jobs.values():
        job.record(1, 0.5)
        assert job.restarts == 0
    assert RecordFile(tmp_path).read().points == [(1, 0.5)]
    assert (tmp_path / "records.jsonl").read_text().count("[1.0, 0.5]") == 1
    monkeypatch.setenv("PMI_RANK", "1")
    assert (job_here(0, {}, tmp_path, ranks=2).restarts, job_here(0, {}, tmp_path, ranks=2).last_record) == (
        1,
        (1.0, 0.5),
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    job = job_here(0, {}, tmp_path)
    job.record(1, 0.5)
    assert job.objective == 0.5


def test_a_run_that_is_killed_leaves_its_curve_and_its_next_start_finds_it(tmp_path: Path) -> None:
    spec = run_of(
        "import os, signal\n"
        "def run(job):\n"
        "    begin = 0 if job.last_record is None else int(job.last_record[0])\n"
        "    for epoch in range(begin + 1, 6):\n"
        "        job.record(epoch, epoch / 10)\n"
        "        if epoch == 3 and job.restarts == 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return {'objective': job.objective, 'metadata': {'began_at': begin, 'restarts': job.restarts}}\n",
        tmp_path,
    )
    script = (
        "import json, sys, pathlib\n"
        "from deephyper_balsam.node.worker import evaluate_apart, job_here\n"
        "spec = json.loads(sys.argv[1])\n"
        "outcome, said = evaluate_apart(spec, job_here(0, {}, pathlib.Path.cwd(), trial='0 of 7'), None)\n"
        "print(json.dumps([outcome, said]))\n"
    )
    folder = tmp_path / "trial"
    folder.mkdir()

    def start() -> tuple[dict[str, Any], bool]:
        words = [sys.executable, "-c", script, json.dumps(spec)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
        outcome, said = json.loads(done.stdout.splitlines()[-1])
        return outcome, said

    outcome, said = start()
    assert not said
    assert signal.SIGKILL.name in outcome["failure"]
    assert outcome["curve"] == [[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]
    outcome, said = start()
    assert said
    assert outcome["objective"] == 0.5
    assert outcome["metadata"] == {"began_at": 3, "restarts": 1}
    assert outcome["curve"] == [[float(epoch), epoch / 10] for epoch in range(1, 6)]


DEEPHYPERS = """
from deephyper_balsam import RunningJob

def run(job: RunningJob):
    for budget in range(1, 4):
        job.record(budget, job["x"] + budget / 10)
        if job.stopped():
            break
    return {"objective": job.objective, "metadata": {"num_parameters": 7, "budget": budget}}
"""


def test_a_function_written_for_deephyper_runs_with_another_import_line(tmp_path: Path) -> None:
    from deephyper_balsam.node.worker import make_run_function

    run = make_run_function(run_of(DEEPHYPERS, tmp_path), tmp_path)
    whole = evaluate(run, RunningJob(0, {"x": 1.0}))
    assert (whole["objective"], whole["metadata"]["budget"]) == (pytest.approx(1.3), 3)
    stopped = evaluate(run, RunningJob(0, {"x": 1.0}, StopsAfter(2)))
    assert (stopped["objective"], stopped["stopped"]) == (pytest.approx(1.2), True)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_the_budget_whether_it_was_stopped_and_the_curve_where_it_has_room() -> None:
    from deephyper_balsam.store.trial_rows import add_curve

    lines: list[dict[str, Any]] = [{"p:x": 1, "objective": 0.5, "job_id": n, "job_status": "DONE"} for n in range(2)]
    add_curve(lines[0], [(1, 0.25), (3, 0.5)], stopped=True)
    add_curve(lines[1], (), stopped=False)
    assert (lines[0]["m:budget"], lines[0]["m:stopped"], lines[0]["m:curve"]) == (3, True, [[1, 0.25], [3, 0.5]])
    assert "m:budget" not in lines[1]
    assert "m:curve" in columns(lines)
    assert table(lines)["m:curve"][0] == [[1, 0.25], [3, 0.5]]
    head = csv_text(lines).splitlines()[0]
    assert "m:budget" in head
    assert "m:stopped" in head
    assert "m:curve" not in head
