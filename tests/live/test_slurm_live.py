"""The site config `slurm` on a real Slurm without an accounting database: searches, an allocation cancelled, faults."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.gateway import Gateway
from deephyper_balsam.resources import folder
from deephyper_balsam.sites.configs import init_site
from deephyper_balsam.sites.local import LocalStack

from .conftest import stack_environment
from .slurm_lab import SlurmLab, missing
from .waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.slurm]

# As long as facilities' are, and longer than the columns that Balsam's own class reads
ACCOUNT = "an_account_with_a_name_longer_than_a_column"
PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("bowl")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
RUN = """
import os, pathlib, time
def run(job):
    time.sleep(0.5)
    here = pathlib.Path(__file__)
    while job.id >= 2 and here.with_suffix(".hold").exists():
        time.sleep(0.2)
    if here.with_suffix(".meet").exists() and job.id < 2:
        here.with_name(f"here.{job.id}").touch()
        deadline = time.monotonic() + 60
        while not here.with_name(f"here.{1 - job.id}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    with open(here.with_suffix(".ranks"), "a") as ranks:
        print(job.id, os.environ.get("SLURM_PROCID"), os.uname().nodename, file=ranks)
    return {"objective": -job["x"] ** 2, "metadata": {"node": os.uname().nodename}}
"""


@dataclass
class Cluster:
    """A Slurm, a Balsam site on it, and a folder to search in."""

    lab: SlurmLab
    gateway: Gateway
    site_id: int
    site: Path
    folder: Path
    env: dict[str, str]

    def search(self, name: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deephyper_balsam", "search", "run", name, "--problem", "problem.py"]
        command += ["--run", "run.py", "--site", "cluster", "--method", "random", "--seed", "1"]
        command += ["--wall-time-min", "10", "--queue", "regular", "--project", ACCOUNT, *options]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, search: subprocess.Popen[str]) -> str:
        try:
            said, _ = search.communicate(timeout=240)
        finally:
            if search.poll() is None:
                search.kill()
                search.communicate()
        assert search.returncode == 0, f"{said}\n{self.logs()}"
        return said

    def rows(self, name: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "deephyper_balsam", "search", "results", name, "--json"]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def batch_jobs(self, name: str) -> list[dict[str, Any]]:
        rows = self.gateway.batch_jobs([self.site_id])
        return sorted((row for row in rows if row["filter_tags"].get("search") == name), key=lambda row: row["id"])

    def logs(self) -> str:
        files = [*self.site.glob("log/*"), *self.site.glob("qsubmit/*.output")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2500:]}" for file in files) + self.lab.logs()


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    made = SlurmLab()
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def cluster(lab: SlurmLab, stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    work = tmp_path_factory.mktemp("on slurm")
    site = init_site(work / "site", "slurm", "cluster", client_path=stack.client_path, project=ACCOUNT, queue="regular")
    settings = site.path / "settings.yml"
    settings.write_text(re.sub(r"sync_period: \d+", "sync_period: 1", settings.read_text()))
    (work / "problem.py").write_text(PROBLEM)
    (work / "run.py").write_text(RUN)
    env = {**stack_environment(stack), **lab.env}
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
    made = Cluster(lab, Gateway(stack.client_path), site.id, site.path, work, env)
    try:
        wait_for((site.path / "balsam-service.pid").exists, "the site's agent")
        yield made
    finally:
        lab.run("scancel", f"--user={getpass.getuser()}")
        agent.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


@pytest.fixture
def scheduler(lab: SlurmLab, monkeypatch: pytest.MonkeyPatch) -> Any:
    from deephyper_balsam.sites.slurm import SlurmScheduler

    monkeypatch.setenv("SLURM_CONF", lab.env["SLURM_CONF"])
    return SlurmScheduler


def submit(scheduler: Any, folder: Path, text: str, queue: str = "regular") -> int:
    script = folder / "a script 100%.sh"
    script.write_text(f"#!/bin/bash\n{text}\n")
    job_id: int = scheduler.submit(script, ACCOUNT, queue, 1, 5, cwd=folder)
    return job_id


def test_a_job_with_a_long_account_is_seen_until_its_end_and_its_times_are_known_without_sacct(
    scheduler: Any, lab: SlurmLab, tmp_path: Path
) -> None:
    assert lab.run("sacct").returncode != 0
    job_id = submit(scheduler, tmp_path, "while [ ! -e end ]; do sleep 0.1; done")
    seen = wait_for(lambda: scheduler.get_statuses(user=getpass.getuser()).get(job_id), "the job in the queue")
    assert (seen.project, seen.queue, seen.num_nodes, seen.wall_time_min) == (ACCOUNT, "regular", 1, 5)
    wait_for(lambda: scheduler.get_statuses(user=getpass.getuser())[job_id].state == "running", "its start")
    (tmp_path / "end").touch()
    wait_for(lambda: job_id not in scheduler.get_statuses(user=getpass.getuser()), "its end")
    times = scheduler.parse_logs(job_id, tmp_path / "a script 100%.sh")
    assert times.end_time >= times.start_time
    assert (tmp_path / "a script 100%.output").read_text() == ""


def test_a_suspended_job_and_a_held_one_are_not_taken_for_finished(
    scheduler: Any, lab: SlurmLab, tmp_path: Path
) -> None:
    job_id = submit(scheduler, tmp_path, "sleep 120")
    wait_for(lambda: scheduler.get_statuses(user=getpass.getuser())[job_id].state == "running", "its start")
    lab.run("scontrol", "suspend", str(job_id), check=True)
    wait_for(lambda: "SUSPENDED" in lab.run("squeue", "-h", "-o", "%T").stdout, "the suspension")
    assert scheduler.get_statuses(user=getpass.getuser())[job_id].state == "running"
    lab.run("scontrol", "resume", str(job_id), check=True)
    scheduler.delete_job(job_id)
    wait_for(lambda: job_id not in scheduler.get_statuses(user=getpass.getuser()), "its end")
    assert scheduler.parse_logs(job_id, None).end_time is not None


def test_a_script_that_fails_at_once_is_told_from_one_that_ran(scheduler: Any, tmp_path: Path) -> None:
    from balsam.platform.scheduler import DelayedSubmitFail

    job_id = submit(scheduler, tmp_path, "echo no such module; exit 7")
    wait_for(lambda: job_id not in scheduler.get_statuses(user=getpass.getuser()), "its end")
    with pytest.raises(DelayedSubmitFail, match="exit code 7"):
        scheduler.parse_logs(job_id, None)
    assert (tmp_path / "a script 100%.output").read_text() == "no such module\n"


def test_a_refused_job_and_a_controller_that_is_away_are_errors_that_the_agent_survives(
    scheduler: Any, lab: SlurmLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from balsam.platform.scheduler.scheduler import SchedulerNonZeroReturnCode, SchedulerSubmitError

    with pytest.raises(SchedulerSubmitError, match="invalid partition"):
        submit(scheduler, tmp_path, "true", queue="nowhere")
    statuses = scheduler.get_statuses(user=getpass.getuser())
    assert 7 in statuses  # not known to the controller: looked up once more before it counts
    assert 7 not in scheduler.get_statuses(user=getpass.getuser())
    dead = tmp_path / "slurm.conf"
    dead.write_text(
        re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9\nMessageTimeout=2", (lab.folder / "slurm.conf").read_text())
    )
    monkeypatch.setenv("SLURM_CONF", str(dead))
    with pytest.raises(SchedulerNonZeroReturnCode, match="squeue"):
        scheduler.get_statuses(user=getpass.getuser())
    assert 8 in statuses


def test_a_search_runs_on_two_nodes_through_sbatch(cluster: Cluster) -> None:
    (cluster.folder / "run.meet").touch()  # the first two evaluations wait for each other
    said = cluster.finish(cluster.search("slurm-mpi", "--nodes", "2", "--max-evals", "8"))
    (cluster.folder / "run.meet").unlink()
    assert "8 done" in said
    rows = cluster.rows("slurm-mpi")
    assert {row["m:node"] for row in rows} == set(cluster.lab.nodes)
    (batch_job,) = cluster.batch_jobs("slurm-mpi")
    ended = wait_for(
        lambda: (row := cluster.batch_jobs("slurm-mpi")[0])["state"] == "finished" and row, "the BatchJob's end"
    )
    assert ended["start_time"] is not None
    assert ended["end_time"] is not None
    assert batch_job["scheduler_id"] == ended["scheduler_id"]


def test_a_search_whose_allocation_is_cancelled_is_finished_by_the_next_one(cluster: Cluster) -> None:
    (cluster.folder / "run.hold").touch()
    search = cluster.search("slurm-cut", "--nodes", "1", "--evals-per-node", "2", "--max-evals", "5")
    try:
        running = wait_for(
            lambda: (
                len([row for row in cluster.gateway.jobs({"search": "slurm-cut"}) if row["state"] == "RUNNING"]) == 2
                and cluster.batch_jobs("slurm-cut")[0]
            ),
            "two evaluations under way",
        )
        cluster.lab.run("scancel", str(running["scheduler_id"]), check=True)
        wait_for(lambda: cluster.batch_jobs("slurm-cut")[0]["state"] == "finished", "the first allocation's end")
    finally:
        (cluster.folder / "run.hold").unlink()
    said = cluster.finish(search)
    assert "5 done" in said, [(row["job_id"], row["m:failure"]) for row in cluster.rows("slurm-cut")]
    assert len(cluster.batch_jobs("slurm-cut")) == 2


def test_serial_mode_runs_several_evaluations_on_each_of_two_nodes(cluster: Cluster) -> None:
    options = ["--nodes", "2", "--evals-per-node", "2", "--job-mode", "serial", "--max-evals", "8"]
    assert "8 done" in cluster.finish(cluster.search("slurm-serial", *options))
    assert {row["m:node"] for row in cluster.rows("slurm-serial")} <= set(cluster.lab.nodes)


def test_an_evaluation_on_two_nodes_with_two_ranks_each_starts_four_processes(cluster: Cluster) -> None:
    ranks = cluster.folder / "run.ranks"
    ranks.unlink(missing_ok=True)
    options = ["--nodes", "2", "--num-nodes-per-eval", "2", "--ranks-per-node", "2", "--max-evals", "1"]
    assert "1 done" in cluster.finish(cluster.search("slurm-ranks", *options))
    lines = sorted(line.split()[1:] for line in ranks.read_text().splitlines())
    first, second = cluster.lab.nodes
    assert lines == [["0", first], ["1", first], ["2", second], ["3", second]]


def test_a_job_script_runs_driver_and_launcher_inside_one_allocation(cluster: Cluster) -> None:
    script = folder("jobscripts") / "slurm.sh"
    options = ["slurm-inside", "--problem", "problem.py", "--run", "run.py", "--method", "random", "--max-evals", "4"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    asked = ["-A", ACCOUNT, "-p", "regular", "-N", "2", "-t", "10", "-o", "inside.out"]
    submitted = subprocess.run(
        ["sbatch", "--parsable", "--wait", *asked, str(script), *options],
        cwd=cluster.folder,
        env={**cluster.env, "BALSAM_SITE_PATH": str(cluster.site), "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = (cluster.folder / "inside.out").read_text()
    assert submitted.returncode == 0, submitted.stderr + said + cluster.logs()
    assert "4 done" in said
    assert {row["m:node"] for row in cluster.rows("slurm-inside")} <= set(cluster.lab.nodes)
    (batch_job,) = wait_for(
        lambda: [row for row in cluster.batch_jobs("slurm-inside") if row["state"] == "finished"], "the BatchJob's end"
    )
    assert batch_job["scheduler_id"] == int(submitted.stdout)
