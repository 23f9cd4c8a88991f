"""Local batch jobs as real processes, without any Balsam server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deephyper_balsam.common.processes import ProcessId
from deephyper_balsam.sites.local_batch import BatchJob, BatchJobs


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchJobs]:
    site = tmp_path / "a site's folder"
    (site / "qsubmit").mkdir(parents=True)
    monkeypatch.setenv("BALSAM_SITE_PATH", str(site))
    made = BatchJobs(site)
    yield made
    for job in made.running():
        made.stop(job, grace_s=0)


def submit(jobs: BatchJobs, text: str, wall_time_min: int = 5) -> BatchJob:
    script = jobs.site_path / "qsubmit" / f"script {time.monotonic_ns()}.sh"
    script.write_text(text)
    return jobs.submit(
        script, cwd=script.parent, project="local", queue="local", num_nodes=1, wall_time_min=wall_time_min
    )


def wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_job_runs_with_its_output_beside_its_script_and_its_end_is_recorded(jobs: BatchJobs) -> None:
    job = submit(jobs, 'echo "id $DEEPHYPER_BALSAM_SCHEDULER_ID"; exit 7')
    wait_for(lambda: not jobs.running())
    jobs.sweep()
    ended = jobs.get(job.id)
    assert ended is not None
    assert ended.exit_code == 7
    assert ended.end_time is not None
    assert 0 <= ended.end_time - ended.start_time < 5
    assert Path(job.script).with_suffix(".output").read_text() == f"id {job.id}\n"


def test_ids_are_never_used_again(jobs: BatchJobs) -> None:
    first = submit(jobs, "true")
    wait_for(lambda: not jobs.running())
    jobs.sweep()
    assert submit(jobs, "true").id == first.id + 1


def test_another_agent_knows_the_jobs_of_the_one_before(jobs: BatchJobs) -> None:
    job = submit(jobs, "sleep 60")
    assert [found.id for found in BatchJobs(jobs.site_path).running()] == [job.id]


def test_a_process_with_the_pid_of_an_old_job_is_not_that_job(jobs: BatchJobs) -> None:
    job = submit(jobs, "sleep 60")
    stranger = replace(job, process=ProcessId(os.getpid(), "another boot:123"))
    jobs.stop(job, grace_s=0)
    stranger.write(jobs.folder / f"{job.id}.json")
    assert jobs.running() == []
    jobs.stop(stranger, grace_s=0)  # and it is not killed: that would be this test


def test_stopping_lets_the_script_end_in_order_first(jobs: BatchJobs) -> None:
    ready, said = jobs.site_path / "qsubmit" / "ready", jobs.site_path / "qsubmit" / "said"
    job = submit(jobs, "trap 'echo bye > said; exit 3' TERM; touch ready; while true; do sleep 0.05; done")
    wait_for(ready.exists)
    jobs.stop(job)
    assert said.read_text() == "bye\n"
    ended = jobs.get(job.id)
    assert ended is not None
    assert (ended.deleted, ended.exit_code) == (True, 3)


def test_stopping_ends_the_whole_tree_even_what_left_the_session_and_ignores_signals(jobs: BatchJobs) -> None:
    pid_file = jobs.site_path / "pid"
    stubborn = "import os, signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    job = submit(jobs, f"setsid python3 -c '{stubborn}' & echo $! > \"{pid_file}\"; sleep 61")
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
    time.sleep(0.3)
    jobs.stop(job, grace_s=0.5)
    pid = int(pid_file.read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_what_a_killed_job_left_running_is_ended_by_the_next_look(jobs: BatchJobs) -> None:
    job = submit(jobs, "exec sleep 62")
    wrapper = psutil.Process(job.process.pid)
    wait_for(lambda: any(child.name() == "sleep" for child in wrapper.children()))
    sleeper = wrapper.children()[0]
    wrapper.send_signal(signal.SIGKILL)
    wait_for(lambda: not jobs.running())
    jobs.sweep()
    wait_for(lambda: not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE)
    ended = jobs.get(job.id)
    assert ended is not None
    assert ended.exit_code is None


def test_a_wrapper_that_was_killed_while_it_wrote_its_end_is_no_trouble(jobs: BatchJobs) -> None:
    for half in ("", "143", "143 ", "143 16x"):
        job = submit(jobs, "exec sleep 62")
        psutil.Process(job.process.pid).send_signal(signal.SIGKILL)
        wait_for(lambda: not jobs.running())
        (jobs.folder / f"{job.id}.end").write_text(half)
        jobs.sweep()
        ended = jobs.get(job.id)
        assert ended is not None
        assert ended.end_time is not None


def test_broken_records_are_passed_over(jobs: BatchJobs) -> None:
    jobs.folder.mkdir(parents=True)
    (jobs.folder / "1.json").write_text("{")
    (jobs.folder / "2.json").write_text(json.dumps({"id": 2}))
    assert jobs.running() == []
    assert submit(jobs, "true").id == 3


def test_balsams_view_of_the_jobs(jobs: BatchJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from balsam.platform.scheduler import DelayedSubmitFail

    from deephyper_balsam.sites import local

    scheduler = local.LocalScheduler
    script = jobs.site_path / "qsubmit" / "qlaunch00001.sh"
    script.write_text("exec sleep 63")
    job_id = scheduler.submit(script, "local", "local", 1, 5, cwd=script.parent)
    statuses = scheduler.get_statuses(user="whoever")
    assert list(statuses) == [job_id]
    assert statuses[job_id].state == "running"
    # As the agent asks for a BatchJob withdrawn before it was submitted: nothing to delete or to look up, but done
    assert [None in statuses, None in statuses, statuses[None].state] == [False, True, "finished"]
    assert 99 not in statuses
    scheduler.delete_job(None)
    assert scheduler.delete_job(job_id) == str(job_id)
    assert list(scheduler.get_statuses()) == []
    log = scheduler.parse_logs(job_id, script)
    assert log.start_time is not None
    assert log.end_time >= log.start_time
    assert scheduler.parse_logs(99, None).start_time is None

    script.write_text("exit 1")
    failed = scheduler.submit(script, "local", "local", 1, 5)
    wait_for(lambda: not jobs.running())
    scheduler.get_statuses()
    with pytest.raises(DelayedSubmitFail, match="exit code 1"):
        scheduler.parse_logs(failed, script)

    script.write_text("exec sleep 64")
    scheduler.submit(script, "local", "local", 1, 0)
    monkeypatch.setattr(local, "_WALL_TIME_GRACE_S", -1.0)
    assert list(scheduler.get_statuses()) == []
    assert jobs.running() == []


def test_a_process_is_known_by_pid_and_start() -> None:
    child = subprocess.Popen(["sleep", "65"])
    known = ProcessId.of(child.pid)
    assert known is not None
    assert known.alive
    assert ProcessId.from_dict(known.to_dict()) == known
    assert not ProcessId(child.pid, "x").alive
    child.kill()
    wait_for(lambda: not known.alive)  # a zombie is no process that runs
    child.wait()
    assert ProcessId.of(child.pid) is None or ProcessId.of(child.pid) != known
