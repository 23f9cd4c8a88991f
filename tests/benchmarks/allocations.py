"""A search that outlives its allocations, on a local Balsam of its own: what each allocation started, cut and finished.

    python -m tests.benchmarks.allocations --minutes 3 --shortest 20 --longest 90 --allocations 3

Allocations of three minutes, runs of 20 to 90 s: the search asks for the next allocation by itself, and no run is begun
that the end of its allocation was bound to cut. Ends with 1 when a run was cut, lost or repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
RUN = """
import pathlib, random, time
def run(job):
    with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as calls:
        print(job.id, file=calls)
    time.sleep(random.Random(job.id).uniform({shortest}, {longest}))
    return -job["x"] ** 2
"""


@dataclass
class Allocation:
    """One BatchJob, by Balsam's event log."""

    number: int
    began: float
    ended: float
    started: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)


def per_allocation(gateway: Gateway, search: str) -> list[Allocation]:
    """Return what became of the runs in each allocation of a search.

    A run belongs to the allocation during which Balsam saw it begin.
    """
    site_ids = [site["id"] for site in gateway.sites()]
    rows = [row for row in gateway.batch_jobs(site_ids) if row["filter_tags"] == {"search": search}]
    allocations = [
        Allocation(row["id"], parse_time(row["start_time"]), parse_time(row["end_time"]))
        for row in rows
        if row["start_time"] and row["end_time"]
    ]
    trials = {row["id"]: row for row in gateway.jobs({"search": search})}
    of_trial: dict[int, Allocation] = {}
    for event in gateway.events(tags=[f"search:{search}"]):
        at, trial = parse_time(event["timestamp"]), int(trials[event["job_id"]]["tags"]["trial"])
        if event["to_state"] == "RUNNING":
            of_trial[trial] = max((one for one in allocations if one.began <= at + 1), key=lambda one: one.began)
            of_trial[trial].started.append(trial)
        elif event["from_state"] == "RUNNING" and event["to_state"] == "RUN_TIMEOUT":
            of_trial[trial].cut.append(trial)
        elif event["to_state"] == "RUN_DONE":
            of_trial[trial].finished.append(trial)
    return allocations


def table(allocations: Sequence[Allocation]) -> str:
    """Return the allocations as lines."""
    lines = ["BatchJob  began at  lasted  started  finished  cut"]
    zero = min((one.began for one in allocations), default=0.0)
    lines += [
        f"{one.number:8d}  {one.began - zero:6.0f} s  {one.ended - one.began:4.0f} s  {len(one.started):7d}  "
        f"{len(one.finished):8d}  {len(one.cut):3d}"
        for one in allocations
    ]
    return "\n".join(lines)


def run_search(folder: Path, stack: LocalStack, options: Sequence[str], runs_s: tuple[float, float]) -> dict[str, Any]:
    """Run a search by the command line in `folder` and return what came of it."""
    (folder / "problem.py").write_text(PROBLEM)
    (folder / "bowl.py").write_text(RUN.format(shortest=runs_s[0], longest=runs_s[1]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BALSAM_")}
    command = [sys.executable, "-m", "deephyper_balsam", "search", "run", "outlive", "--problem", "problem.py"]
    command += ["--run", "bowl.py", "--site", "local", "--method", "random", "--seed", "1", *options]
    done = subprocess.run(command, cwd=folder, env={**kept, **stack.env}, check=False)
    gateway = Gateway(stack.client_path)
    deadline = time.monotonic() + 60  # the last allocation is being ended
    while any(
        row["state"] == "pending_deletion" for row in gateway.batch_jobs([site["id"] for site in gateway.sites()])
    ):
        if time.monotonic() > deadline:
            raise TimeoutError("the last allocation does not end")
        time.sleep(0.5)
    return {
        "code": done.returncode,
        "allocations": per_allocation(gateway, "outlive"),
        "jobs": list(gateway.jobs({"search": "outlive"})),
        "calls": Counter(map(int, (folder / "calls.txt").read_text().split())),
        "log": (folder / "outlive" / "search.log").read_text(),
    }


def main() -> int:
    """Run the campaign and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=3, help="of an allocation")
    parser.add_argument("--shortest", type=float, default=20.0, help="seconds of a run")
    parser.add_argument("--longest", type=float, default=90.0, help="seconds of a run")
    parser.add_argument("--evals", type=int, default=18, help="in all")
    parser.add_argument("--at-once", type=int, default=4, help="runs on the node")
    parser.add_argument("--job-mode", choices=["mpi", "serial"], default="mpi")
    parser.add_argument("--learn", action="store_true", help="no time limit: let the driver learn how long runs take")
    given = parser.parse_args()
    options = ["--nodes", "1", "--wall-time-min", str(given.minutes), "--evals-per-node", str(given.at_once)]
    options += ["--max-evals", str(given.evals), "--job-mode", given.job_mode]
    if not given.learn:
        options += ["--eval-timeout", str(given.longest + 5)]
    with tempfile.TemporaryDirectory(prefix="allocations ") as folder:
        stack = LocalStack(Path(folder) / "balsam")
        stack.up()
        try:
            found = run_search(Path(folder), stack, options, (given.shortest, given.longest))
        finally:
            stack.down()
    print(found["log"])
    print(table(found["allocations"]))
    cut = sum(len(one.cut) for one in found["allocations"])
    repeated = {trial: count for trial, count in found["calls"].items() if count > 1}
    ended = sum("gathered" in row["data"] for row in found["jobs"])
    print(f"{ended} results of {given.evals}; {cut} runs cut; run more than once: {repeated or 'none'}")
    return int(found["code"] != 0 or bool(cut) or bool(repeated) or ended != given.evals)


if __name__ == "__main__":
    sys.exit(main())
