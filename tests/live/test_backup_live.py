"""Backups: made while jobs end and a search runs, and gone on from in another folder."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from balsam.schemas import serialize

from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.store.gateway import Gateway

from .conftest import leftovers, stack_environment
from .test_local_stack import Client, register_shell
from .waiting import wait_for

pytestmark = pytest.mark.live

CLI = [sys.executable, "-m", "deephyper_balsam"]
EVALS = 8
_PROBLEM = """
from deephyper_balsam import HpProblem
problem = HpProblem("line")
problem.add_hyperparameter((-3.0, 3.0), "x")
"""
_RUN = """
import time
def run(job):
    time.sleep(2)
    return job["x"]
"""


def cli(stack: LocalStack, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments], env=stack_environment(stack), cwd=cwd, capture_output=True, text=True, timeout=180
    )


class Load:
    """Makes and finishes twenty jobs a second at a site without an agent; knows what Balsam acknowledged, and when."""

    def __init__(self, stack: LocalStack) -> None:
        self.gateway = Gateway(stack.client_path)
        site = self.gateway.create_site("without agent", "/nowhere")
        app = {"site_id": site, "name": "nothing", "serialized_class": "", "source_code": "", "parameters": {}}
        self.app: int = self.gateway.create_app(app)["id"]
        self.acknowledged: dict[int, float] = {}
        self.failures: list[BaseException] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        call, number = self.gateway._call, 0
        try:
            while not self._over.is_set():
                began = time.monotonic()
                jobs = [
                    {"app_id": self.app, "workdir": f"w{number + i}", "serialized_parameters": serialize({})}
                    for i in range(5)
                ]
                number += 5
                ids = [row["id"] for row in call("POST", "jobs/", body=jobs)]
                call("PATCH", "jobs/", body=[{"id": id_, "state": "JOB_FINISHED", "data": {"y": id_}} for id_ in ids])
                self.acknowledged.update((id_, time.monotonic()) for id_ in ids)
                self._over.wait(0.25 - (time.monotonic() - began))
        except BaseException as error:
            self.failures.append(error)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(60)
        assert not self.failures, self.failures


@pytest.fixture
def top() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dhb backup "))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def start_search(stack: LocalStack, top: Path) -> subprocess.Popen[bytes]:
    (top / "problem.py").write_text(_PROBLEM)
    (top / "run.py").write_text(_RUN)
    words = [*CLI, "search", "run", "line", "--problem", "problem.py", "--run", "run.py", "--site", "local"]
    words += ["--max-evals", str(EVALS), "--seed", "1", "--evals-per-node", "2", "--method", "random"]
    words += ["--nodes", "1", "--wall-time-min", "20", "--queue", "local", "--project", "local"]
    return subprocess.Popen(
        words, cwd=top, env=stack_environment(stack), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def trials(stack: LocalStack) -> list[dict[str, Any]]:
    return list(Gateway(stack.client_path).jobs({"search": "line"}))


def batch_jobs(stack: LocalStack) -> list[dict[str, Any]]:
    gateway = Gateway(stack.client_path)
    return gateway.batch_jobs([gateway.site("local")["id"]])


def test_a_backup_made_while_jobs_end_holds_all_that_was_acknowledged_and_a_search_goes_on_from_it(top: Path) -> None:
    stack, other = LocalStack(top / "first"), LocalStack(top / 'the "other" one')
    try:
        stack.up()
        app, client = register_shell(stack), Client(stack)
        long = client.submit(app, "sleep 600", "long")
        driver = start_search(stack, top)
        try:
            ended = {"JOB_FINISHED", "POSTPROCESSED"}
            wait_for(lambda: sum(row["state"] in ended for row in trials(stack)) >= 2, "two trials to end")
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        client.allocate()
        wait_for(lambda: client.job(long)["state"] == "RUNNING", "the long job to run")
        # One that still waits when the backup is made would begin in the other stack, and run the long job there
        wait_for(lambda: {row["state"] for row in batch_jobs(stack)} == {"running"}, "both allocations to run")
        load = Load(stack)
        wait_for(lambda: len(load.acknowledged) >= 40, "jobs to end")
        began = time.monotonic()
        (top / "backups").mkdir()
        done = cli(stack, "server", "backup", str(top / "backups"), "--dir", str(stack.folder))
        took_s = time.monotonic() - began
        load.stop()
        assert done.returncode == 0, done.stderr
        [backup] = (top / "backups").iterdir()
        assert backup.stat().st_mode & 0o777 == 0o600
        before = [job for job, at in load.acknowledged.items() if at < began]
        assert len(before) >= 40
        assert len(load.acknowledged) > len(before) or took_s < 0.3, "jobs ended meanwhile"
        done = cli(stack, "server", "restore", str(backup), "--dir", str(other.folder))
        assert done.returncode == 0, done.stderr
        assert other.status().stopped
        known = trials(stack)

        other.up()
        again = Client(other)
        assert again.site is not None
        assert again.site.path == other.site_path
        assert Gateway(other.client_path).site("local")["path"] == str(other.site_path)
        found = {job: again.job(job) for job in before}
        assert {row["state"] for row in found.values()} == {"JOB_FINISHED"}
        assert all(row["data"] == {"y": job} for job, row in found.items())
        wait_for(lambda: again.job(long)["state"] == "RESTART_READY", "the run that was cut to wait for the next")
        assert client.job(long)["state"] == "RUNNING", "the one who was backed up goes on"
        wait_for(
            lambda: not Gateway(other.client_path).batch_jobs([again.site.id], ["running", "queued"]),
            "the BatchJobs to end",
        )
        again.call("DELETE", f"jobs/{long}")  # else it would take the place of the trials
        done = cli(other, "search", "resume", "line", cwd=top)
        assert done.returncode == 0, done.stderr
        after = trials(other)
        assert {row["tags"]["trial"] for row in known} <= {row["tags"]["trial"] for row in after}
        told = json.loads(cli(other, "search", "results", "line", "--json", cwd=top).stdout)
        assert [row["job_status"] for row in told] == ["DONE"] * EVALS
        assert sorted(int(row["job_id"]) for row in told) == list(range(EVALS))
        with (top / "line" / "results.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == EVALS
    finally:
        for one in (other, stack):
            one.down()
    assert leftovers(stack) == leftovers(other) == []


def test_a_stack_that_is_stopped_is_backed_up_with_the_files_of_its_runs_and_stays_stopped(top: Path) -> None:
    stack, other = LocalStack(top / "first"), LocalStack(top / "other")
    try:
        stack.up()
        site = stack.site()
        stack.down()
        (stack.site_path / "data" / "run").mkdir(parents=True)
        (stack.site_path / "data" / "run" / "job.out").write_text("a line")
        os.symlink("/nowhere", stack.site_path / "data" / "link")
        whole, without = top / "whole.tar", top / "without.tar"
        assert cli(stack, "server", "backup", str(whole), "--with-data", "--dir", str(stack.folder)).returncode == 0
        assert cli(stack, "server", "backup", str(without), "--dir", str(stack.folder)).returncode == 0
        assert stack.status().stopped
        assert leftovers(stack) == []
        shutil.rmtree(stack.folder)
        assert cli(stack, "server", "restore", str(whole), "--dir", str(other.folder)).returncode == 0
        assert (other.site_path / "data" / "run" / "job.out").read_text() == "a line"
        assert os.readlink(other.site_path / "data" / "link") == "/nowhere"
        assert cli(stack, "server", "restore", str(without), "--dir", str(stack.folder)).returncode == 0
        assert list((stack.site_path / "data").iterdir()) == []
        modes = {path.stat().st_mode & 0o077 for path in other.folder.rglob("*") if not path.is_symlink()}
        assert modes == {0}
        assert other.up().running
        assert other.site() is not None
        assert site is not None
        assert other.site().id == site.id  # type: ignore[union-attr]
    finally:
        for one in (other, stack):
            one.down()
