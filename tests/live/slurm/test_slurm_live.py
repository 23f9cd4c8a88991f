"""The site config `slurm` on a real Slurm without an accounting database: searches, an allocation cancelled, faults."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.common.bundled_files import folder
from deephyper_balsam.server.stack import LocalStack
from live.machine import Machine, machine
from live.waiting import wait_for

from .lab import SlurmLab

pytestmark = [pytest.mark.live, pytest.mark.slurm]

# As long as facilities' are, and longer than the columns that Balsam's own class reads
ACCOUNT = "an_account_with_a_name_longer_than_a_column"


@pytest.fixture(scope="module")
def cluster(lab: SlurmLab, stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    work = tmp_path_factory.mktemp("on slurm")
    with machine(stack, work, "slurm", lab.env, queue="regular", project=ACCOUNT, fill_in_queue=True) as made:
        try:
            yield made
        finally:
            lab.run("scancel", f"--user={getpass.getuser()}")


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


def test_a_search_runs_on_two_nodes_through_sbatch(cluster: Machine) -> None:
    with cluster.sign("meet"):
        said = cluster.finish(cluster.search("slurm-mpi", "--nodes", "2", "--max-evals", "8"))
    assert "8 done" in said
    assert len({row["m:node"] for row in cluster.rows("slurm-mpi")}) == 2
    (ended,) = cluster.ended_batch_jobs("slurm-mpi")
    assert ended["start_time"] is not None
    assert ended["end_time"] is not None


def test_serial_mode_runs_several_evaluations_on_each_of_two_nodes(cluster: Machine, lab: SlurmLab) -> None:
    options = ["--nodes", "2", "--evals-per-node", "2", "--job-mode", "serial", "--max-evals", "8"]
    assert "8 done" in cluster.finish(cluster.search("slurm-serial", *options))
    assert {row["m:node"] for row in cluster.rows("slurm-serial")} <= set(lab.nodes)


@pytest.mark.parametrize("mode", ["mpi", "serial"])
def test_a_search_whose_allocation_is_cancelled_is_finished_by_the_next_one(
    cluster: Machine, lab: SlurmLab, mode: str
) -> None:
    name = f"slurm-cut-{mode}"
    with cluster.sign("hold"):
        options = ["--nodes", "1", "--evals-per-node", "2", "--job-mode", mode, "--max-evals", "5"]
        search = cluster.search(name, *options)
        wait_for(lambda: cluster.held(name), "two evaluations that are held")
        (running,) = cluster.batch_jobs(name)
        lab.run("scancel", str(running["scheduler_id"]), check=True)
        wait_for(lambda: cluster.batch_jobs(name)[0]["state"] == "finished", "the first allocation's end")
    said = cluster.finish(search)
    assert "5 done" in said, [(row["job_id"], row["m:failure"]) for row in cluster.rows(name)]
    first, second = cluster.ended_batch_jobs(name)
    # Two ended in the first, whichever: serial mode takes trials in any order
    by_allocation = Counter(row["m:allocation"] for row in cluster.rows(name))
    assert by_allocation == {str(first["scheduler_id"]): 2, str(second["scheduler_id"]): 3}


def test_a_controller_that_is_away_costs_no_trial(cluster: Machine, lab: SlurmLab) -> None:
    name = "slurm-away"
    with cluster.sign("hold"):
        search = cluster.search(name, "--nodes", "1", "--evals-per-node", "2", "--job-mode", "mpi", "--max-evals", "6")
        wait_for(lambda: cluster.held(name), "two evaluations that are held")
        lab.stop_controller()
    try:
        # The two that are held end, and the next two cannot begin
        wait_for(
            lambda: any(b"srun: error" in path.read_bytes() for path in cluster.site.rglob("job.out")),
            "a step that cannot begin",
        )
    finally:
        lab.start_controller()
    said = cluster.finish(search)
    assert "6 done" in said, [(row["job_id"], row["m:failure"]) for row in cluster.rows(name)]
    assert not [row for row in cluster.gateway.jobs({"search": name}) if row["data"].get("tries")]


def test_two_allocations_at_once_share_a_search(cluster: Machine) -> None:
    with cluster.sign("meet"):
        options = ["--nodes", "1", "--max-allocations", "2", "--max-evals", "6"]
        assert "6 done" in cluster.finish(cluster.search("slurm-two", *options))
    ids = {str(row["scheduler_id"]) for row in cluster.ended_batch_jobs("slurm-two")}
    rows = {row["job_id"]: row for row in cluster.rows("slurm-two")}
    assert {rows[0]["m:allocation"], rows[1]["m:allocation"]} == ids
    assert rows[0]["m:node"] != rows[1]["m:node"]


@pytest.mark.parametrize("mode", ["mpi", "serial"])
def test_two_evaluations_on_a_node_see_one_gpu_each(cluster: Machine, mode: str) -> None:
    name = f"slurm-gpu-{mode}"
    with cluster.sign("meet"):
        options = ["--nodes", "1", "--evals-per-node", "2", "--gpus-per-rank", "1", "--job-mode", mode]
        assert "4 done" in cluster.finish(cluster.search(name, *options, "--max-evals", "4"))
    rows = {row["job_id"]: row for row in cluster.rows(name)}
    assert rows[0]["m:node"] == rows[1]["m:node"]
    assert {rows[0]["m:gpus"], rows[1]["m:gpus"]} == {"0", "1"}
    assert {row["m:gpus"] for row in rows.values()} == {"0", "1"}


def test_of_an_evaluation_on_two_nodes_with_two_ranks_each_the_first_rank_reports(
    cluster: Machine, lab: SlurmLab
) -> None:
    nodes = cluster.check_first_of_four_ranks_reports("slurm-ranks")
    assert len(nodes) == 2
    assert nodes < set(lab.nodes)


def test_a_job_script_runs_driver_and_launcher_inside_one_allocation(cluster: Machine, lab: SlurmLab) -> None:
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
    assert submitted.returncode == 0, submitted.stderr + said + cluster.logs() + lab.logs()
    assert "4 done" in said
    assert {row["m:node"] for row in cluster.rows("slurm-inside")} <= set(lab.nodes)
    (batch_job,) = cluster.ended_batch_jobs("slurm-inside")
    assert batch_job["scheduler_id"] == int(submitted.stdout)
