"""Searches whose allocations end under them, and one whose application is broken, on the real local Balsam."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.common import processes
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.sites.local_batch import ID_VARIABLE
from deephyper_balsam.store.gateway import Gateway

from .conftest import stack_environment
from .waiting import wait_for

pytestmark = pytest.mark.live

CLI = [sys.executable, "-m", "deephyper_balsam", "search"]
COMMON = ["--problem", "problem.py", "--site", "local", "--method", "random", "--seed", "1", "--run"]
PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("line")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
RUN_HELD = """
import pathlib, time
HERE = pathlib.Path(__file__).parent
def run(job):
    with open(HERE / "calls.txt", "a") as calls:
        print(job.id, file=calls)
    while (HERE / "hold").exists():
        time.sleep(0.1)
    return job["x"]
"""
RUN_BROKEN = """
import no_such_library
def run(job):
    return job["x"]
"""


@dataclass
class World:
    folder: Path
    stack: LocalStack
    gateway: Gateway

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CLI, *arguments],
            env=stack_environment(self.stack),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def batch_jobs(self, search: str) -> list[dict[str, Any]]:
        site = self.gateway.site("local")
        return [row for row in self.gateway.batch_jobs([site["id"]]) if row["filter_tags"] == {"search": search}]

    def running(self, search: str) -> list[dict[str, Any]]:
        rows = self.gateway.jobs({"search": search}, states=["RUNNING"])
        return [row for row in rows if "result" not in row["data"]]


@pytest.fixture
def world(stack: LocalStack) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="live allocations "))
    (folder / "problem.py").write_text(PROBLEM)
    yield World(folder, stack, Gateway(stack.client_path))
    shutil.rmtree(folder, ignore_errors=True)


def test_a_search_goes_on_when_its_launcher_dies_and_when_its_allocation_ends(world: World) -> None:
    (world.folder / "hold").touch()
    (world.folder / "held.py").write_text(RUN_HELD)
    options = [*COMMON, "held.py", "--max-evals", "2"]
    driver = world.start("run", "outlive", *options, "--nodes", "1", "--evals-per-node", "2", "--wall-time-min", "20")
    try:
        wait_for(lambda: len(world.running("outlive")) == calls(world).total() == 2, "two runs")
        [first] = world.batch_jobs("outlive")
        kill_allocation(world.stack, first["scheduler_id"])
        second = wait_for(
            lambda: [row for row in world.batch_jobs("outlive") if row["id"] != first["id"]], "the next allocation"
        )[0]
        wait_for(lambda: len(world.running("outlive")) == 2 and calls(world).total() == 4, "the same runs again")
        world.gateway.end_batch_job(second["id"])
        wait_for(lambda: len(world.batch_jobs("outlive")) == 3, "a third allocation")
        wait_for(lambda: calls(world).total() == 6, "the same runs a third time")
        (world.folder / "hold").unlink()
        out, err = driver.communicate(timeout=120)
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()
    assert driver.returncode == 0, err
    assert "2 done" in out
    rows = {int(row["tags"]["trial"]): row for row in world.gateway.jobs({"search": "outlive"})}
    assert sorted(row["data"]["gathered"]["order"] for row in rows.values()) == [0, 1]
    assert [row["data"].get("tries") for row in rows.values()] == [None] * 2  # nobody was charged
    assert [rows[number]["data"]["gathered"].get("cuts") for number in (0, 1)] == [2, 2]
    assert calls(world) == Counter({0: 3, 1: 3})
    log = (world.folder / "outlive" / "search.log").read_text()
    assert f"The launcher of BatchJob {first['id']} died: what it ran starts again" in log


def kill_allocation(stack: LocalStack, scheduler_id: int) -> None:
    """Kill every process of an allocation at once, as when its first node is lost."""
    of_site = processes.carries("BALSAM_SITE_PATH", stack.env["BALSAM_SITE_PATH"])
    of_allocation = processes.carries(ID_VARIABLE, str(scheduler_id))
    found = processes.matching(lambda process: of_site(process) and of_allocation(process))
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none sees another die, and says its last word
        for process in found:
            processes.send(process, number)


def calls(world: World) -> Counter[int]:
    file = world.folder / "calls.txt"
    return Counter(map(int, file.read_text().split())) if file.exists() else Counter()


def test_a_broken_application_ends_the_search_with_its_traceback_once(world: World) -> None:
    (world.folder / "fixed.py").write_text("def run(job):\n    return job['x']\n")
    options = [*COMMON, "fixed.py", "--max-evals", "50"]
    # It is broken on the node only: the driver looks at it before
    driver = world.start("run", "broken", *options, "--nodes", "1", "--evals-per-node", "3", "--max-failures", "3")
    try:
        wait_for(lambda: world.batch_jobs("broken"), "the search to begin")
        (world.folder / "fixed.py").write_text(RUN_BROKEN)
        _, err = driver.communicate(timeout=120)
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()
    assert driver.returncode == 1, err
    assert "The first 3 trials all failed alike" in err
    assert err.count("No module named 'no_such_library'") >= 1
    assert err.count("Traceback (most recent call last)") == 1
    assert "--max-failures 0" in err
    status = subprocess.run(
        [*CLI, "status", "broken", "--json"], env=stack_environment(world.stack), capture_output=True, text=True
    )
    states = json.loads(status.stdout)["states"]
    assert states["FAILED"] >= 3
    assert set(states) <= {"FAILED", "CANCELLED", "RUNNING"}
