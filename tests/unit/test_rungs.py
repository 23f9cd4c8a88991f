"""Whether a run goes on: what it asks at its rungs, what is decided there, and that nothing makes it wait for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.node import rungs
from deephyper_balsam.node.recording import RecordFile
from deephyper_balsam.node.rungs import RungKeeper, RungRecorder
from deephyper_balsam.node.running_job import RunningJob
from deephyper_balsam.node.stoppers import Decision, Stopper, parse_stopper
from deephyper_balsam.node.worker import job_here

SHA = parse_stopper("sha:max=27,min=1,factor=3,competing=2")
GOOD = SHA.standing({1.0: [0.1, 0.2, 0.3], 3.0: [0.5, 0.6]})


class Balsam:
    """A job and a note, and how often they were asked for."""

    def __init__(self, standing: Mapping[str, Any], **data: Any) -> None:
        self.standing, self.data = standing, dict(data)
        self.reads = self.writes = 0
        self.away: Exception | None = None
        self.slow_s = 0.0

    def read(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        self.reads += 1
        time.sleep(self.slow_s)
        if self.away is not None:
            raise self.away
        return self.data, self.standing

    def write(self, data: Mapping[str, Any]) -> None:
        self.writes += 1
        self.data = json.loads(json.dumps(data))


@pytest.fixture
def balsam() -> Balsam:
    return Balsam(GOOD, asked={"told": 3})


class Run:
    """A run in this process with a keeper that answers in a thread, as in the parent of a real one."""

    def __init__(self, balsam: Balsam, folder: Path, stopper: Stopper = SHA) -> None:
        self.keeper = RungKeeper(stopper, balsam.read, balsam.write)
        self.keeper.line.drop = lambda: None  # type: ignore[method-assign]  # there is no other copy of it here
        self.job = job_here(0, {}, folder, stopper=stopper, line=self.keeper.line)
        self._answering = self.keeper.answering()

    def __enter__(self) -> RunningJob:
        self._answering.__enter__()
        return self.job

    def __exit__(self, *_: object) -> None:
        self._answering.__exit__(None, None, None)


def test_a_run_that_is_behind_stops_at_its_rung_and_all_of_the_decision_is_in_its_job(
    balsam: Balsam, tmp_path: Path
) -> None:
    with Run(balsam, tmp_path) as job:
        job.record(1, 0.05)
        assert job.stopped()
    assert (balsam.reads, balsam.writes) == (1, 1)
    [said] = balsam.data["rungs"]
    decision = Decision.from_dict(said)
    assert decision == Decision(True, 1.0, 0.05, 3, 0.3)
    assert SHA.agrees(decision)
    assert decision == SHA.decide(1.0, 0.05, GOOD)
    assert abs(said["at"] - time.time()) < 60
    assert balsam.data["curve"] == [[1.0, 0.05]]
    assert balsam.data["asked"] == {"told": 3}  # what others wrote stays


def test_a_run_that_is_ahead_goes_on_and_asks_at_rungs_alone(balsam: Balsam, tmp_path: Path) -> None:
    with Run(balsam, tmp_path) as job:
        for epoch in range(1, 10):
            job.record(epoch, 0.9 + epoch / 100)
            assert not job.stopped()
    assert (balsam.reads, balsam.writes) == (3, 3)  # at 1, 3 and 9
    assert [said["rung"] for said in balsam.data["rungs"]] == [1.0, 3.0, 9.0]
    assert not any(said["stop"] for said in balsam.data["rungs"])
    assert [budget for budget, _ in balsam.data["curve"]] == list(range(1, 10))


def test_without_a_note_or_with_few_others_a_run_goes_on(tmp_path: Path) -> None:
    for number, standing in enumerate(({"rungs": {}}, SHA.standing({1.0: [0.9]}))):
        balsam = Balsam(standing)
        folder = tmp_path / str(number)
        folder.mkdir()
        with Run(balsam, folder) as job:
            job.record(1, 0.0)
            assert not job.stopped()
        assert balsam.writes == 1


@pytest.mark.parametrize("error", [ConnectionError("refused"), TimeoutError("slow"), KeyError("no such job")], ids=repr)
def test_an_api_that_is_away_stops_nobody(
    balsam: Balsam, tmp_path: Path, error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    balsam.away = error
    with Run(balsam, tmp_path) as job:
        job.record(1, 0.0)
        assert not job.stopped()
        balsam.away = None
        job.record(3, 0.0)  # it is back: the next rung decides
        assert job.stopped()
    assert "was asked in vain whether to go on" in capfd.readouterr().out
    assert len(balsam.data["rungs"]) == 1


def test_a_slow_answer_is_waited_for_once_and_counts_when_it_comes(
    balsam: Balsam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rungs, "PATIENCE_S", 0.2)
    balsam.slow_s = 1.0
    with Run(balsam, tmp_path) as job:
        began = time.monotonic()
        job.record(1, 0.9)  # waits in vain
        job.record(3, 0.0)  # does not wait
        assert time.monotonic() - began < 0.9
        assert not job.stopped()
        deadline = time.monotonic() + 20
        while not job.stopped():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert [said["stop"] for said in balsam.data["rungs"]] == [False, True]


def test_a_job_that_has_its_result_is_not_written_to(tmp_path: Path) -> None:
    balsam = Balsam(GOOD, result={"objective": 1.0})
    with Run(balsam, tmp_path) as job:
        job.record(1, 0.0)
        assert job.stopped()
    assert balsam.writes == 0


def test_a_run_that_was_cut_after_it_was_told_to_stop_is_told_again(balsam: Balsam, tmp_path: Path) -> None:
    with Run(balsam, tmp_path) as job:
        job.record(1, 0.05)
        assert job.stopped()
    again = job_here(0, {}, tmp_path, stopper=SHA, told_to_stop=True)
    assert again.stopped()
    assert again.objective == 0.05
    elsewhere = tmp_path / "another site"
    elsewhere.mkdir()
    assert not job_here(0, {}, elsewhere, stopper=SHA, told_to_stop=True).stopped()  # it has nothing to return


def test_epoch_decides_without_a_request(tmp_path: Path) -> None:
    job = job_here(0, {}, tmp_path, stopper=parse_stopper("epoch:2"))
    job.record(1, 0.5)
    assert not job.stopped()
    job.record(2, 0.5)
    assert job.stopped()


def test_losses_are_compared_as_what_is_maximised(tmp_path: Path) -> None:
    balsam = Balsam(SHA.standing({1.0: [-0.1, -0.2, -0.3]}))
    keeper = RungKeeper(SHA, balsam.read, balsam.write)
    keeper.line.drop = lambda: None  # type: ignore[method-assign]
    job = job_here(0, {}, tmp_path, stopper=SHA, line=keeper.line, minimize=True)
    with keeper.answering():
        job.record(1, 5.0)
        assert job.stopped()
        assert job.objective == 5.0
    assert balsam.data["curve"] == [[1.0, -5.0]]


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_all_ranks_leave_at_the_same_rung(balsam: Balsam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = RungKeeper(SHA, balsam.read, balsam.write)
    keeper.line.drop = lambda: None  # type: ignore[method-assign]
    first = job_here(0, {}, tmp_path, stopper=SHA, line=keeper.line, ranks=2)
    monkeypatch.setenv("PMI_RANK", "1")
    second = job_here(0, {}, tmp_path, stopper=SHA, ranks=2)
    seen: dict[str, list[float]] = {"first": [], "second": []}

    def train(name: str, job: RunningJob, values: list[float]) -> None:
        for epoch, value in enumerate(values, 1):
            job.record(epoch, value)
            seen[name].append(epoch)
            if job.stopped():
                return

    with keeper.answering():
        values = [0.9, 0.9, 0.1, 0.1, 0.1]
        other = threading.Thread(target=train, args=("second", second, values))
        other.start()
        time.sleep(0.1)
        train("first", first, values)
        other.join(30)
    assert seen == {"first": [1, 2, 3], "second": [1, 2, 3]}
    assert RecordFile(tmp_path).decision(0, 3.0) is True
    assert RecordFile(tmp_path).decision(1, 3.0) is None
    assert RecordFile(tmp_path).read().points == [(1, 0.9), (2, 0.9), (3, 0.1)]


def test_a_rank_whose_first_says_nothing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setattr(rungs, "_OTHER_RANKS_WAIT_S", 0.2)
    job = job_here(0, {}, tmp_path, stopper=SHA, ranks=2)
    assert isinstance(job.recorder, RungRecorder)
    job.record(1, 0.0)
    assert not job.stopped()


# --- with its real parent ---------------------------------------------------------------------------------------------

_PARENT = """
import json, pathlib, sys, time
from deephyper_balsam.node.rungs import RungKeeper
from deephyper_balsam.node.stoppers import parse_stopper
from deephyper_balsam.node.worker import evaluate_apart, job_here
stopper = parse_stopper("sha:max=27,competing=2")
standing = stopper.standing({1.0: [0.1, 0.2, 0.3], 3.0: [0.5, 0.6]})
written = []
def read():
    time.sleep(float(sys.argv[2]))
    return {}, standing
keeper = RungKeeper(stopper, read, written.append)
spec = {"kind": "function", "name": "run", "target": sys.argv[1] + ":run", "search_path": []}
job = job_here(0, {}, pathlib.Path.cwd(), stopper=stopper, line=keeper.line)
began = time.monotonic()
outcome, said = evaluate_apart(spec, job, None, beside=keeper.answering)
print(json.dumps([outcome, said, written, time.monotonic() - began]))
"""
_RUN = """
import multiprocessing
def run(job):
    for epoch in range(1, 28):
        job.record(epoch, 0.4)
        if job.stopped():
            return None
    return job.objective
"""


def test_a_run_in_its_own_process_is_stopped_by_its_parent(tmp_path: Path) -> None:
    (tmp_path / "function.py").write_text(_RUN)
    words = [sys.executable, "-W", "error", "-c", _PARENT, str(tmp_path / "function.py")]
    done = subprocess.run([*words, "0"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    outcome, said, written, _ = json.loads(done.stdout.splitlines()[-1])
    assert said
    assert (outcome["objective"], outcome["stopped"], outcome["failure"]) == (0.4, True, None)
    assert outcome["curve"] == [[1.0, 0.4], [2.0, 0.4], [3.0, 0.4]]
    assert [[one["rung"], one["stop"]] for one in written[-1]["rungs"]] == [[3.0, True]]
    slow = subprocess.run([*words, "3"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    outcome, said, written, took_s = json.loads(slow.stdout.splitlines()[-1])
    assert said
    assert outcome["objective"] == 0.4
    assert "stopped" not in outcome or written  # a decision that came too late is written all the same
    assert took_s < 30


def test_no_open_file_is_left_in_the_parent(tmp_path: Path, balsam: Balsam) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(balsam, folder)
        with run as job:
            job.record(1, 0.9)
        run.keeper.line.close()
    assert len(os.listdir("/proc/self/fd")) <= before
