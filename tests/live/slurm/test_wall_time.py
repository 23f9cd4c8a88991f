"""Allocations of a real Slurm that reach their wall time with the driver inside; the next ones finish the searches.

It takes five minutes, so it is no part of ``make test-slurm``: ``pytest -m "slurm and slow"``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store import allocation_chain
from deephyper_balsam.store.lease import read_leases
from live.machine import Machine, machine
from live.waiting import wait_for

from .lab import SlurmLab

pytestmark = [pytest.mark.live, pytest.mark.slurm, pytest.mark.slow]

ACCOUNT = "m1234"
COMMON = ["--problem", "problem.py", "--run", "run.py", "--method", "random", "--max-evals", "6", "--seed", "1"]


@pytest.fixture
def cluster(lab: SlurmLab, stack: LocalStack, tmp_path: Path) -> Iterator[Machine]:
    with machine(stack, tmp_path, "slurm", lab.env, queue="regular", project=ACCOUNT, fill_in_queue=True) as made:
        wait_for(lambda: made.gateway.site(made.site_name)["allowed_queues"], "the agent's word on queues")
        yield made


def call(cluster: Machine, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{cluster.env['PATH']}"
    env = {**cluster.env, "PATH": path, **variables}
    return subprocess.run(command, cwd=cluster.folder, env=env, capture_output=True, text=True, timeout=120)


def gathered(cluster: Machine, search: str) -> list[int]:
    """Return the order in which results were taken in: each number once, when none was lost or repeated."""
    rows = cluster.gateway.jobs({"search": search})
    return sorted(row["data"]["gathered"]["order"] for row in rows if "gathered" in row["data"])


def links(cluster: Machine, search: str, *states: str) -> list[dict[str, Any]]:
    return allocation_chain.find(cluster.gateway, [cluster.site_id], search, states or None)


def start_script(cluster: Machine, output: str) -> str:
    script = str(folder("jobscripts") / "slurm.sh")
    asked = ["sbatch", "--parsable", "-A", ACCOUNT, "-p", "regular", "-N", "1", "-t", "4", "-o", output]
    started = call(cluster, *asked, script, "by-script", *COMMON, BALSAM_SITE_PATH=str(cluster.site))
    assert started.returncode == 0, started.stderr
    return started.stdout.strip()


def test_searches_whose_allocations_reach_their_wall_time_are_finished_by_the_next(
    cluster: Machine, lab: SlurmLab
) -> None:
    (cluster.folder / "run.hold").touch()
    scripted = start_script(cluster, "script-1.out")
    options = ["--site", cluster.site_name, "-n", "1", "-t", "4", "-q", "regular", "-A", ACCOUNT, "--chain", "2"]
    submitted = call(
        cluster, sys.executable, "-m", "deephyper_balsam", "search", "submit", "by-submit", *COMMON, *options
    )
    assert submitted.returncode == 0, submitted.stderr

    wait_for(lambda: scripted not in lab.run("squeue", "-h", "-o", "%i").stdout.split(), "the script's end", 300)
    said = (cluster.folder / "script-1.out").read_text()
    assert "The search is not done, but this allocation ends" in said, said
    assert gathered(cluster, "by-script") == [0, 1]
    wait_for(lambda: len(links(cluster, "by-submit", "running", "finished")) == 2, "the allocation that follows", 300)
    wait_for(
        lambda: [lease.why for lease in read_leases(cluster.gateway, "by-submit")["by-submit"]][2:] == [None],
        "its driver",
    )

    (cluster.folder / "run.hold").unlink()
    start_script(cluster, "script-2.out")
    wait_for(lambda: gathered(cluster, "by-script") == list(range(6)), "the end of the search by script")
    wait_for(lambda: not links(cluster, "by-submit", *allocation_chain.ALIVE), "the end of the search by submit")
    assert gathered(cluster, "by-submit") == list(range(6)), cluster.logs()
    first, second = links(cluster, "by-submit")
    assert (first["state"], second["state"]) == ("finished", "finished")
    output = cluster.site / "qsubmit" / f"qlaunch{first['id']:05d}.output"
    assert "signal 15 came" in output.read_text()  # Slurm's, a minute before the wall time
    assert "6 done" in (output.with_name(f"qlaunch{second['id']:05d}.output")).read_text()
    wait_for(lambda: lab.run("squeue", "-h").stdout.strip() == "", "the end of all jobs")
