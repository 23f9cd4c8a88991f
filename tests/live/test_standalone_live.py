"""Searches with all that they need in their allocations, on Cobalt and PBS played by processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deephyper_balsam.server.stack import LocalStack

from .machine import PROBLEM
from .waiting import wait_for

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
import batch_system

pytestmark = pytest.mark.live

# As many trials end as `run.limit` says, whichever Balsam starts first; the others wait until it is raised
RUN = """
import contextlib, pathlib, time
def run(job):
    here = pathlib.Path(__file__)
    while True:
        for number in range(int(here.with_suffix(".limit").read_text() or 0)):
            with contextlib.suppress(FileExistsError):
                here.with_name(f"ended.{number}").touch(exist_ok=False)
                return -job["x"] ** 2
        time.sleep(0.2)
"""
NUMBER = {"pbs": "PBS_JOBID", "cobalt": "COBALT_JOBID"}


class Played:
    """A folder to search in on a machine that is played, whose jobs all end with the test."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
        self.env = {**kept, **batch_system.install(folder / "batch", kind)}
        (folder / "problem.py").write_text(PROBLEM)
        (folder / "run.py").write_text(RUN)

    def limit(self, trials: int) -> None:
        (self.folder / "run.limit").write_text(str(trials))

    def cli(self, *words: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "deephyper_balsam", *words],
            cwd=self.folder, env={**self.env, **variables}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def jobs(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "batch" / "jobs").glob("*.json"))]

    def kill(self, number: int) -> None:
        """Kill every process of a job at once, as when its node dies."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(NUMBER[self.kind], "").partition(".")[0] == str(number):
                    process.send_signal(signal.SIGKILL)

    def results(self) -> Counter[str]:
        """Return how many trials ended how; CANCELLED: withdrawn before it began."""
        stack = LocalStack(self.folder / "s.balsam")
        stack.up()
        try:
            rows = json.loads(self.cli("search", "results", "s", "--json", **stack.env))
            assert len({row["job_id"] for row in rows}) == len(rows)
            return Counter(row["job_status"] for row in rows if row["job_status"] != "CANCELLED")
        finally:
            stack.down()

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("s.balsam/scripts/*.output")))


@pytest.fixture(
    params=[
        pytest.param(("theta-knl-cobalt", "cobalt", "debug-cache-quad", "2"), marks=pytest.mark.long),
        ("polaris-pbs", "pbs", "debug", "2"),
    ]
)
def played(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Played, list[str]]]:
    config, kind, queue, nodes = request.param
    made = Played(tmp_path, kind)
    search = ["--problem", "problem.py", "--run", "run.py", "--method", "random", "--max-evals", "10"]
    shape = ["--config", config, "-q", queue, "-A", "datascience", "-n", nodes]
    try:
        yield made, ["search", "submit", "s", *search, "--standalone", *shape]
    finally:
        for job in made.jobs():
            (tmp_path / "batch" / f"{job['id']}.delete").touch()
        LocalStack(tmp_path / "s.balsam").down()
        for job in made.jobs():
            made.kill(job["id"])


@pytest.mark.long
def test_a_chain_on_a_played_machine_outlives_wall_times_and_ends_with_exactly_its_number(
    played: tuple[Played, list[str]],
) -> None:
    machine, submit = played
    machine.limit(3)
    machine.cli(*submit, "-t", "3", "--chain", "3")
    wait_for(lambda: machine.jobs()[0]["ended"], "the end of the first batch job", 600)
    machine.limit(1000)
    wait_for(lambda: all(job["ended"] for job in machine.jobs()), "the end of all", 600)
    assert machine.results() == {"DONE": 10}, machine.said()
    assert "the wall time is near" in machine.said()
    assert [bool(job["started"]) for job in machine.jobs()] == [True, True, False]  # the third was withdrawn


def test_on_a_played_machine_the_next_batch_job_goes_on_after_the_first_node_died(
    played: tuple[Played, list[str]],
) -> None:
    machine, submit = played
    machine.limit(4)
    machine.cli(*submit, "-t", "20")
    wait_for(lambda: len(list(machine.folder.glob("ended.*"))) == 4, "four evaluations", 600)
    time.sleep(2)
    machine.kill(machine.jobs()[0]["id"])
    wait_for(lambda: machine.jobs()[0]["ended"], "the end of the first batch job", 600)
    machine.limit(1000)
    machine.cli(*submit, "-t", "20")
    wait_for(lambda: all(job["ended"] for job in machine.jobs()), "the end of all", 600)
    assert machine.results() == {"DONE": 10}, machine.said()
