"""`search submit` on the real local Balsam: the driver lives in its allocations, and they follow each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store import allocation_chain
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import read_leases

from .conftest import stack_environment
from .waiting import wait_for

pytestmark = pytest.mark.live

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("line")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
RUN = """
import pathlib, time
HERE = pathlib.Path(__file__).parent
def run(job):
    with open(HERE / "calls.txt", "a") as calls:
        print(job.id, file=calls)
    while job.id >= 3 and (HERE / "hold").exists():
        time.sleep(0.1)
    return job["x"]
"""
OPTIONS = ["--problem", "problem.py", "--run", "run.py", "--site", "local", "--method", "random", "--seed", "1"]


@dataclass
class World:
    folder: Path
    stack: LocalStack
    gateway: Gateway

    @property
    def site(self) -> dict[str, Any]:
        return self.gateway.site("local")

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deephyper_balsam", "search", *arguments],
            env=stack_environment(self.stack), cwd=self.folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def links(self, search: str, *states: str) -> list[dict[str, Any]]:
        return allocation_chain.find(self.gateway, [self.site["id"]], search, states or None)

    def outputs(self, search: str) -> str:
        paths = [Path(self.site["path"], "qsubmit", f"qlaunch{row['id']:05d}.output") for row in self.links(search)]
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in paths if path.exists())

    def calls(self) -> Counter[int]:
        file = self.folder / "calls.txt"
        return Counter(map(int, file.read_text().split())) if file.exists() else Counter()


@pytest.fixture
def world(stack: LocalStack) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="live submit "))
    (folder / "problem.py").write_text(PROBLEM)
    (folder / "run.py").write_text(RUN)
    yield World(folder, stack, Gateway(stack.client_path))
    shutil.rmtree(folder, ignore_errors=True)


def test_a_search_outlives_its_allocation_without_a_person(world: World) -> None:
    (world.folder / "hold").touch()
    options = [*OPTIONS, "--max-evals", "8", "--evals-per-node", "2", "-n", "1", "-t", "1", "--chain", "3"]
    shown = world.call("submit", "chained", *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "--chain 2 'chained'" in shown.stdout
    assert world.links("chained") == []
    submitted = world.call("submit", "chained", *options)
    assert submitted.returncode == 0, submitted.stderr
    [first] = world.links("chained")

    def second_drives() -> bool:
        rows = world.links("chained", "running")
        driving = [
            lease for lease in read_leases(world.gateway, "chained")["chained"] if lease.driving_since is not None
        ]
        return [row["id"] for row in rows] == [first["id"] + 1] and len(driving) == 3  # the submission is one

    wait_for(second_drives, "the second allocation, with a driver of its own")
    (world.folder / "hold").unlink()
    wait_for(lambda: not world.links("chained", *allocation_chain.ALIVE), "the end of the second allocation")
    assert (first["optional_params"]["chain"], len(world.links("chained"))) == ("2", 2), world.outputs("chained")
    script = Path(world.site["path"], "qsubmit", f"qlaunch{first['id']:05d}.sh").read_text(encoding="utf-8")
    assert script == shown.stdout.removesuffix("\n")

    rows = list(world.gateway.jobs({"search": "chained"}))
    gathered = [row for row in rows if "gathered" in row["data"]]
    assert len(gathered) == 8
    assert sorted(row["data"]["gathered"]["order"] for row in gathered) == list(range(8))
    assert {number: count for number, count in world.calls().items() if count > 1}.keys() == {3, 4}  # cut, run again
    whys = [lease.why for lease in read_leases(world.gateway, "chained")["chained"]]
    assert whys == [f"submitted as BatchJob {first['id']}", "interrupted", "complete"]
    assert "this allocation ends: the wall time is near" in world.outputs("chained")
    assert "8 done" in world.outputs("chained")
    assert (world.folder / "chained" / "results.csv").read_text().count("DONE") == 8


def test_an_allocation_that_comes_early_serves_the_driver_there_is_and_does_not_go_on_with_a_stopped_search(
    world: World,
) -> None:
    (world.folder / "hold").touch()
    options = [*OPTIONS, "--max-evals", "9", "--evals-per-node", "2", "-n", "1", "-t", "20", "--chain", "3"]
    assert world.call("submit", "halted", *options).returncode == 0
    wait_for(lambda: world.calls().total() == 5, "three results and two runs")
    [first] = world.links("halted")
    world.gateway.create_batch_job(_shape(first))
    wait_for(lambda: world.calls().total() == 7, "two more runs, in the second allocation")
    stopped = world.call("stop", "halted", "--now")
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: not world.links("halted", *allocation_chain.ALIVE), "the end of both allocations")
    (world.folder / "hold").unlink()
    whys = [lease.why for lease in read_leases(world.gateway, "halted")["halted"]]
    assert len(whys) == 2, world.outputs("halted")  # the submission, and the one driver
    assert whys[1].startswith("stopped by ")
    assert len(world.links("halted")) == 2


def _shape(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("site_id", "num_nodes", "wall_time_min", "queue", "project", "job_mode", "optional_params", "filter_tags")
    return {key: row[key] for key in keys}
