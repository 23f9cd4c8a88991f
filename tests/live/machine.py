"""A Balsam site on a batch system: its agent, a folder to search in, and what a search left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.sites.configs import init_site
from deephyper_balsam.store.gateway import Gateway

from .conftest import stack_environment
from .waiting import wait_for

PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
# `run.hold` holds all evaluations but the first two that begin, whatever their numbers;
# with `run.meet` the first two wait for each other.
RUN = """
import os, pathlib, time
def first(*names):
    return next((os.environ[name] for name in names if name in os.environ), None)
def is_early(here):
    for place in range(2):
        try:
            here.with_name(f"here.early.{place}").touch(exist_ok=False)
            return True
        except FileExistsError:
            pass
    return False
def run(job):
    here = pathlib.Path(__file__)
    early = here.with_suffix(".hold").exists() and is_early(here)
    while not early and here.with_suffix(".hold").exists():
        time.sleep(0.2)
    if here.with_suffix(".meet").exists() and job.id < 2:
        here.with_name(f"here.{job.id}").touch()
        deadline = time.monotonic() + 120
        while not here.with_name(f"here.{1 - job.id}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    found = {
        "node": os.uname().nodename,
        "rank": first("SLURM_PROCID", "PMI_RANK", "ALPS_APP_PE"),
        "gpus": first("CUDA_VISIBLE_DEVICES"),
        "allocation": first("SLURM_JOB_ID", "PBS_JOBID", "COBALT_JOBID"),
    }
    with open(here.with_suffix(".ranks"), "a") as ranks:
        print(job.id, found["rank"], found["node"], found["gpus"], file=ranks)
    return {"objective": -job["x"] ** 2, "metadata": found}
"""


@dataclass
class Machine:
    """A Balsam site whose agent runs, the names that its scheduler is given, and a folder to search in."""

    gateway: Gateway
    site_id: int
    site_name: str
    site: Path
    folder: Path
    env: Mapping[str, str]
    queue: str
    project: str

    def search(self, name: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deephyper_balsam", "search", "run", name, "--problem", "problem.py"]
        command += ["--run", "run.py", "--site", self.site_name, "--method", "random", "--seed", "1"]
        command += ["--wall-time-min", "10", "--queue", self.queue, "--project", self.project, *options]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, search: subprocess.Popen[str]) -> str:
        """Wait for the search's own end, and return what it said."""
        try:
            said, _ = search.communicate(timeout=240)
        finally:
            if search.poll() is None:
                search.kill()
                search.communicate()
        assert search.returncode == 0, f"{said}\n{self.logs()}"
        return said

    @contextlib.contextmanager
    def sign(self, name: str) -> Iterator[None]:
        """Give run functions the sign ``"meet"`` or ``"hold"`` for a while."""
        file = self.folder / f"run.{name}"
        for old in self.folder.glob("here.*"):
            old.unlink()
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    def rows(self, name: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "deephyper_balsam", "search", "results", name, "--json"]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def held(self, name: str) -> bool:
        """Whether two evaluations are done and two under way, by the sign ``"hold"``."""
        rows = list(self.gateway.jobs({"search": name}))
        done = ["result" in row["data"] for row in rows]
        running = [row["state"] == "RUNNING" and "result" not in row["data"] for row in rows]
        return sum(done) == sum(running) == 2

    def check_first_of_four_ranks_reports(self, name: str) -> set[str]:
        """Run one evaluation on two nodes with two ranks each; return the names of the nodes."""
        ranks = self.folder / "run.ranks"
        ranks.unlink(missing_ok=True)
        options = ["--nodes", "2", "--num-nodes-per-eval", "2", "--ranks-per-node", "2", "--max-evals", "1"]
        assert "1 done" in self.finish(self.search(name, *options))
        lines = sorted(line.split()[1:3] for line in ranks.read_text().splitlines())
        assert [rank for rank, _ in lines] == ["0", "1", "2", "3"]
        nodes = [node for _, node in lines]
        assert nodes[0] == nodes[1]
        assert nodes[2] == nodes[3]
        (row,) = self.rows(name)
        assert row["m:rank"] == "0"
        return set(nodes)

    def batch_jobs(self, name: str) -> list[dict[str, Any]]:
        rows = self.gateway.batch_jobs([self.site_id])
        return sorted((row for row in rows if row["filter_tags"].get("search") == name), key=lambda row: row["id"])

    def ended_batch_jobs(self, name: str) -> list[dict[str, Any]]:
        """Wait until Balsam knows that all of the search's allocations ended."""
        wait_for(
            lambda: all(row["state"] == "finished" for row in self.batch_jobs(name)), f"the end of {name}'s allocations"
        )
        return self.batch_jobs(name)

    def logs(self) -> str:
        files = [*self.site.glob("log/*"), *self.site.glob("qsubmit/*.output")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2500:]}" for file in files)


@contextlib.contextmanager
def machine(
    stack: LocalStack,
    folder: Path,
    config: str,
    batch_env: Mapping[str, str],
    *,
    queue: str,
    project: str,
    fill_in_queue: bool = False,
) -> Iterator[Machine]:
    """Make a site from `config`, start its agent with `batch_env`, and end the agent at last."""
    site = init_site(
        folder / "a site", config, folder.name, client_path=stack.client_path, project=project,
        queue=queue if fill_in_queue else None,
    )  # fmt: skip
    file = site.path / "settings.yml"
    file.write_text(re.sub(r"sync_period: \d+", "sync_period: 1", file.read_text()))
    template = site.path / "job-template.sh"
    template.write_text(re.sub(r"export https?_proxy.*", "", template.read_text()))  # this API is near
    (folder / "problem.py").write_text(PROBLEM)
    (folder / "run.py").write_text(RUN)
    env = {**stack_environment(stack), **batch_env}
    with (site.path / "log" / "agent.out").open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "balsam.site.service.main"],
            cwd=site.path,
            env={**env, "BALSAM_SITE_PATH": str(site.path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for((site.path / "balsam-service.pid").exists, "the site's agent")
        yield Machine(Gateway(stack.client_path), site.id, site.name, site.path, folder, env, queue, project)
    finally:
        agent.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
