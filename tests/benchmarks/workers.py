"""How busy a real local Balsam keeps its workers when runs are short: Balsam as it comes, then ours.

    python -m tests.benchmarks.workers --workers 32 --run-s 5 --minutes 3

Server, database, agent, launcher and runs are real; a run sleeps. "As it comes" is Balsam's own launcher and a new
Python for each run, fed with one job for each that finished; once with nothing else waiting, once with a wave of jobs.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from deephyper_balsam.common.processes import tail
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.applications import _serialize
from deephyper_balsam.store.encoding import pack, unpack
from deephyper_balsam.store.gateway import Gateway

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("sleeper")
for number in range(5):
    problem.add_hyperparameter((-32.768, 32.768), f"x{number}")
"""
RUN = """
import time
def run(job):
    time.sleep(%r)
    return -sum(value * value for value in job.parameters.values())
"""
STOCK_TEMPLATE = """#!/bin/bash
export BALSAM_SITE_PATH={{ balsam_site_path }}
cd "$BALSAM_SITE_PATH"
export DEEPHYPER_BALSAM_FORK=0
exec %s launcher -j mpi -t {{ wall_time_min }} \\
    {%% for key, value in filter_tags.items() %%} --tag {{ key }}={{ value }}{%% endfor %%}
"""
STATES = ("JOB_FINISHED", "FAILED")


class Runs:
    """Begin and end of each run, seconds since the epoch."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self.spans = sorted(spans)

    def utilization(self, workers: int, window_s: float) -> float:
        """Return the share of the workers' time from the first start on that lay within runs."""
        if not self.spans:
            return 0.0
        first = self.spans[0][0]
        busy_s = sum(max(0.0, min(end, first + window_s) - begin) for begin, end in self.spans)
        return busy_s / (workers * window_s)


def stock(stack: LocalStack, given: argparse.Namespace, waiting: int) -> Runs:
    """Keep `workers + waiting` jobs under way in Balsam as it comes."""
    from balsam._api.app import ApplicationDefinition

    gateway = Gateway(stack.client_path)
    site_id = int(gateway.site("local")["id"])
    name = f"stock_{waiting}"

    class Sleeper(ApplicationDefinition):  # type: ignore[misc]
        site = site_id
        run_s = given.run_s

        def run(self) -> list[float]:
            import time

            begin = time.time()
            time.sleep(self.run_s)
            return [begin, time.time()]

    Sleeper.__name__ = name
    app = {"site_id": site_id, "name": name, "serialized_class": _serialize(Sleeper), "source_code": ""}
    app_id = gateway.create_app({**app, "description": name, "parameters": {}, "transfers": {}})["id"]
    (stack.site_path / "job-template.sh").write_text(STOCK_TEMPLATE % (Path(sys.executable).parent / "balsam"))
    made = 0

    def create(count: int) -> None:
        nonlocal made
        numbers = range(made, made + count)
        made += count
        common: dict[str, Any] = {"app_id": app_id, "node_packing_count": given.workers, "tags": {"stock": name}}
        common["serialized_parameters"] = pack({})
        gateway.create_jobs([{**common, "workdir": f"{name}/{number}"} for number in numbers])

    create(given.workers + waiting)
    _allocation(gateway, site_id, given, {"stock": name})
    ended = 0
    until = time.monotonic() + given.patience_s
    while time.monotonic() < until:
        time.sleep(0.5)
        now = sum(1 for _ in gateway.jobs(tags={"stock": name}, states=STATES))
        if now and not ended:
            until = time.monotonic() + 60 * given.minutes
        if now > ended:
            create(now - ended)
            ended = now
    _end_allocations(gateway, site_id)
    rows = list(gateway.jobs(tags={"stock": name}, states=STATES))
    return Runs([tuple(unpack(row["serialized_return_value"])) for row in rows if row["state"] == "JOB_FINISHED"])


def ours(stack: LocalStack, given: argparse.Namespace, folder: Path, fork: bool) -> Runs:
    """Run a search with our driver, launcher and runs."""
    name = f"search-{'forked' if fork else 'started'}"
    template = Path("site-configs/local/job-template.sh").read_text(encoding="utf-8")
    switch = f"export DEEPHYPER_BALSAM_FORK={int(fork)}\nexport BALSAM_SITE_PATH="
    (stack.site_path / "job-template.sh").write_text(template.replace("export BALSAM_SITE_PATH=", switch, 1))
    (folder / "problem.py").write_text(PROBLEM)
    (folder / "run.py").write_text(RUN % given.run_s)
    command = [sys.executable, "-m", "deephyper_balsam", "search", "run", name, "--problem", "problem.py"]
    command += ["--run", "run.py", "--site", "local", "--nodes", "1", "--wall-time-min", str(int(given.minutes) + 10)]
    command += ["--evals-per-node", str(given.workers), "--timeout", str(60 * given.minutes + 30), "--seed", "1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BALSAM_")}
    with (folder / f"{name}.log").open("w") as log:
        code = subprocess.run(command, cwd=folder, env={**environment, **stack.env}, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"The search ended with {code}. {tail(folder / f'{name}.log', 40)}")
    command = [sys.executable, "-m", "deephyper_balsam", "search", "utilization", name]
    subprocess.run(command, env={**environment, **stack.env}, check=True)
    with (folder / name / "results.csv").open() as file:
        rows = [(row["m:timestamp_start"], row["m:timestamp_end"]) for row in csv.DictReader(file)]
    return Runs([(float(begin), float(end)) for begin, end in rows if begin and end])


def _allocation(gateway: Gateway, site_id: int, given: argparse.Namespace, tags: dict[str, str]) -> None:
    asked = {"site_id": site_id, "num_nodes": 1, "wall_time_min": int(given.minutes) + 10, "job_mode": "mpi"}
    asked |= {"queue": "local", "project": "local", "optional_params": {}, "filter_tags": tags}
    gateway.create_batch_job(asked)


def _end_allocations(gateway: Gateway, site_id: int) -> None:
    states = ("pending_submission", "queued", "running", "pending_deletion")
    for row in gateway.batch_jobs([site_id], states):
        gateway.end_batch_job(row["id"])
    until = time.monotonic() + 90
    while gateway.batch_jobs([site_id], states) and time.monotonic() < until:
        time.sleep(0.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--run-s", type=float, default=5.0)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", choices=["alone", "wave", "started", "forked"])
    given = parser.parse_args()
    given.patience_s = 120.0
    chosen = given.only or ["alone", "wave", "started", "forked"]
    with tempfile.TemporaryDirectory(prefix="workers-") as temporary:
        folder = Path(temporary)
        stack = LocalStack(folder / "balsam")
        stack.up()
        ways: dict[str, Any] = {
            "alone": ("Balsam as it comes, nothing waiting", lambda: stock(stack, given, 0)),
            "wave": ("Balsam as it comes, one wave waiting", lambda: stock(stack, given, given.workers)),
            "started": ("ours, a new Python for each run", lambda: ours(stack, given, folder, fork=False)),
            "forked": ("ours", lambda: ours(stack, given, folder, fork=True)),
        }
        first = None
        try:
            for name in chosen:
                words, way = ways[name]
                psutil.cpu_percent()
                runs = way()
                share = runs.utilization(given.workers, 60 * given.minutes)
                first = first or share
                print(
                    f"{words:40s} utilization {share:.3f} ({share / first:.2f} times the first), "
                    f"{len(runs.spans)} runs, {psutil.cpu_count()} cores {psutil.cpu_percent():.0f} % busy",
                    flush=True,
                )
        finally:
            stack.down()


if __name__ == "__main__":
    main()
