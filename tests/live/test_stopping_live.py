"""Runs that record are stopped early, from what Balsam holds alone, whatever befalls driver, API and launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.node.stoppers import Decision, parse_stopper
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.notes import read_notes

from .conftest import stack_environment
from .waiting import wait_for

pytestmark = pytest.mark.live

CLI = [sys.executable, "-m", "deephyper_balsam", "search"]
SHA = "sha:max=9,min=1,factor=3,competing=3"
PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("line")
problem.add_hyperparameter((0.0, 1.0), "x")
"""
# Keeps a checkpoint of its own, and notes each epoch that it really trains
RUN = """
import os, time, uuid
def run(job):
    checkpoint = job.folder / "checkpoint"
    epoch = int(checkpoint.read_text()) if checkpoint.exists() else 0
    while epoch < 9:
        epoch += 1
        time.sleep(SECONDS)
        with open(__file__ + ".epochs", "a") as notes:
            notes.write(f"{job.id} {epoch} {job.restarts}\\n")
        partial = checkpoint.with_suffix(f".{uuid.uuid4().hex}")
        partial.write_text(str(epoch))
        partial.rename(checkpoint)
        job.record(epoch, job["x"] * epoch)
        if job.stopped():
            return None
    return {"objective": job.objective, "metadata": {"restarts": job.restarts}}
"""


class Search:
    """A search in a folder, with runs of nine epochs."""

    def __init__(self, stack: LocalStack, folder: Path, name: str, seconds: float, **env: str) -> None:
        self.stack, self.folder, self.name = stack, folder, name
        self.env = {**stack_environment(stack), **env}
        self.gateway = Gateway(stack.client_path)
        (folder / "problem.py").write_text(PROBLEM)
        (folder / "run.py").write_text(RUN.replace("SECONDS", str(seconds)))

    def start(self, evaluations: int, *more: str) -> subprocess.Popen[str]:
        words = ["run", self.name, "--problem", "problem.py", "--run", "run.py", "--site", "local", "--seed", "1"]
        words += ["--method", "random", "--max-evals", str(evaluations), "--evals-per-node", "2", "--nodes", "1", *more]
        return subprocess.Popen(
            [*CLI, *words], env=self.env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, driver: subprocess.Popen[str], timeout_s: float = 180) -> str:
        try:
            said, _ = driver.communicate(timeout=timeout_s)
        finally:
            driver.kill()
        assert driver.returncode == 0, said
        return said

    def rows(self) -> dict[int, dict[str, Any]]:
        return {int(row["tags"]["trial"]): row for row in self.gateway.jobs({"search": self.name})}

    def json(self, what: str) -> Any:
        words = [*CLI, what, self.name, "--json"]
        done = subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def table(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json("results")
        return found

    def epochs(self) -> dict[int, list[tuple[int, int]]]:
        """Return the epochs that each trial really trained, and in which start of it."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        notes = self.folder / "run.py.epochs"
        for line in notes.read_text().splitlines() if notes.exists() else ():
            number, epoch, start = map(int, line.split())
            found[number].append((epoch, start))
        return found

    def trained(self) -> int:
        """Return how many epochs were trained so far."""
        return sum(map(len, self.epochs().values()))

    def check_decisions(self) -> list[Decision]:
        """Every decision follows from its own numbers and its trial's curve, and each run ended as was decided."""
        stopper, every = parse_stopper(SHA), []
        for number, row in self.rows().items():
            data = row["data"]
            outcome = data["result"]
            decisions = [Decision.from_dict(said) for said in data.get("rungs", ())]
            curve = dict(outcome["curve"])
            for decision in decisions:
                assert stopper.agrees(decision), (number, decision)
                assert curve[decision.rung] == decision.value, (number, decision)
            assert outcome.get("stopped", False) == any(decision.stop for decision in decisions), (number, data)
            assert list(curve) == list(range(1, len(curve) + 1)), (number, curve)
            every += decisions
        return every


def test_runs_stop_at_their_rungs_and_all_decisions_follow_from_what_balsam_holds(
    stack: LocalStack, tmp_path: Path
) -> None:
    search = Search(stack, tmp_path, "stopping", 0.15)
    search.finish(search.start(12, "--stopper", SHA))
    decisions = search.check_decisions()
    table = search.table()
    assert [row["job_status"] for row in table] == ["DONE"] * 12
    stopped = [row for row in table if row["m:stopped"]]
    whole = [row for row in table if not row["m:stopped"]]
    assert len(stopped) >= 4, table
    assert whole
    assert {row["m:budget"] for row in whole} == {9.0}
    for row in table:
        assert row["objective"] == pytest.approx(row["p:x"] * row["m:budget"])
        assert [budget for budget, _ in row["m:curve"]] == [float(n) for n in range(1, int(row["m:budget"]) + 1)]
    found = search.json("status")["early"]
    assert (found["recorded"], found["stopped"]) == (12, len(stopped))
    assert 0.2 < found["share"] < 0.9
    assert found == search.json("utilization")["early"]
    spent = {number: len(epochs) for number, epochs in search.epochs().items()}
    assert spent == {row["job_id"]: row["m:budget"] for row in table}  # what was stopped trained no more
    # The note is what all that was recorded leads to
    [note] = list(read_notes(search.gateway, "stopping", "standing"))
    values: dict[float, list[float]] = defaultdict(list)
    for decision in decisions:
        values[decision.rung].append(decision.value)
    said = note["data"]["standing"]["rungs"]
    assert set(said) <= {"1", "3"}
    assert all(count <= len(values[float(rung)]) for rung, (count, _) in said.items())
    assert max(count for count, _ in said.values()) >= 10


def test_no_run_waits_for_a_dead_driver_and_a_cut_run_goes_on_from_its_checkpoint_with_its_curve_whole(
    stack: LocalStack, tmp_path: Path
) -> None:
    search = Search(stack, tmp_path, "stopping-hard", 0.5)
    driver = search.start(8, "--stopper", SHA)
    try:
        wait_for(lambda: search.trained() > 6, "epochs")
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    # Nobody drives: runs that are not stopped by what they know go on to their end
    before = search.trained()
    wait_for(lambda: search.trained() > before + 4, "epochs without a driver")
    running = [row["id"] for row in search.rows().values() if row["state"] == "RUNNING"]
    assert running
    launchers = stack.agent.jobs.running()
    assert launchers
    for job in launchers:  # as when the node dies
        stack.agent.jobs.stop(job, grace_s=0)
    driver = search.start(8, "--stopper", SHA)
    search.finish(driver)
    search.check_decisions()
    table = search.table()
    assert [row["job_status"] for row in table] == ["DONE"] * 8
    again = {number for number, epochs in search.epochs().items() if any(start for _, start in epochs)}
    assert again
    for number, epochs in search.epochs().items():
        trained = [epoch for epoch, _ in epochs]
        # The epoch in which it was cut may have been trained and not kept
        assert len(trained) - len(set(trained)) <= max(start for _, start in epochs), (number, epochs)


def test_a_minute_without_the_api_stops_no_run(stack: LocalStack, tmp_path: Path) -> None:
    search = Search(stack, tmp_path, "stopping-away", 0.5)
    driver = search.start(4, "--stopper", SHA)
    try:
        wait_for(search.trained, "the first epoch")
        api = stack.files.state().processes["api"]
        os.kill(api.pid, signal.SIGSTOP)
        began, before = time.monotonic(), search.trained()
        try:
            wait_for(lambda: search.trained() >= before + 8, "epochs while the API stands", 60)
        finally:
            os.kill(api.pid, signal.SIGCONT)
        assert time.monotonic() - began < 20  # two at a time, half a second each
    except BaseException:
        driver.kill()
        raise
    search.finish(driver)
    search.check_decisions()
    assert [row["job_status"] for row in search.table()] == ["DONE"] * 4
