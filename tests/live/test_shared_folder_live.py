"""One stack's folder and two hosts: who may run it, what happens when a host dies, hangs, or comes back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deephyper_balsam.server.sign_of_life import Claims

from .cluster.hosts import Hosts, missing
from .waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

_ACT = """
import json, sys
from deephyper_balsam.errors import DeepHyperBalsamError
from deephyper_balsam.server.stack import LocalStack, Waits
stack = LocalStack(sys.argv[1], say=print, waits=Waits(sign_s=0.3, fence_s=3.0, gone_s=5.0, let_go_s=10.0))
try:
    found = getattr(stack, sys.argv[2])(**json.loads(sys.argv[3]))
except DeepHyperBalsamError as error:
    sys.exit(f"Error: {error}")
if found is not None:
    print(json.dumps(found.to_dict()))
"""
_CALL = """
import json, sys
from deephyper_balsam.server.stack import LocalStack
from tests.live.test_local_stack import Client, register_shell
stack = LocalStack(sys.argv[1])
app = lambda: register_shell(stack)
client = Client(stack)
print(json.dumps(eval(sys.argv[2])))
"""


class Host:
    """One of the hosts."""

    def __init__(self, hosts: Hosts, name: str) -> None:
        self.hosts, self.name = hosts, name

    def command(self, code: str, *arguments: str) -> list[str]:
        return self.hosts.command(self.name, sys.executable, "-c", code, *arguments, folder=Path(__file__).parents[2])

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = self.command(code, *arguments)
        return subprocess.run(words, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL)

    def signal_all(self, number: int) -> None:
        for pid in self.hosts.processes(self.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def crash(self) -> None:
        self.hosts.kill(self.name)


@pytest.fixture(scope="module")
def both() -> Iterator[Hosts]:
    place = Path(tempfile.mkdtemp(prefix="dhb-hosts-", dir=Hosts.place))
    made = Hosts(["login1", "login2"])
    try:
        made.up(place)
        yield made
    finally:
        made.down()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="dhb shared ", dir=Hosts.place))
    yield top / "stack"
    shutil.rmtree(top, ignore_errors=True)


@pytest.fixture
def hosts(both: Hosts, folder: Path) -> Iterator[tuple[Host, Host]]:
    made = Host(both, "login1"), Host(both, "login2")
    yield made
    for host in made:
        if not both.runs(host.name):
            both.boot(host.name)
        for _ in range(3):
            host.signal_all(signal.SIGKILL)


def act(host: Host, folder: Path, name: str, **arguments: Any) -> str:
    done = host.run(_ACT, str(folder), name, json.dumps(arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(host: Host, folder: Path, name: str, **arguments: Any) -> str:
    done = host.run(_ACT, str(folder), name, json.dumps(arguments))
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def call(host: Host, folder: Path, expression: str) -> Any:
    done = host.run(_CALL, str(folder), expression)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def status(host: Host, folder: Path) -> Any:
    return json.loads(act(host, folder, "status"))


def owner(folder: Path) -> tuple[int, str]:
    found = Claims(folder).latest()
    assert found is not None
    return found[0].number, found[0].host


def runs_nothing_of_it(host: Host) -> bool:
    return not host.hosts.processes(host.name)


def start_a_long_job(host: Host, folder: Path) -> int:
    job: int = call(host, folder, "client.submit(app(), 'sleep 600', 'long')")
    call(host, folder, "client.allocate()")
    state = f"client.job({job})['state']"
    wait_for(lambda: call(host, folder, state) == "RUNNING", "the job to run")
    return job


def test_a_second_host_is_refused_while_the_first_is_alive(folder: Path, hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    assert status_after_up(one, folder)["running"]
    before = status(one, folder)["processes"]
    for name in ("up", "down"):
        told = refused(two, folder, name)
        assert "runs on login1 (process " in told
        assert "this is login2" in told
    seen = status(two, folder)
    assert (seen["running"], seen["elsewhere"].split()[0]) == (False, "login1")
    assert status(one, folder)["processes"] == before
    assert owner(folder) == (1, "login1")
    act(one, folder, "down")
    assert runs_nothing_of_it(one)
    assert status_after_up(two, folder)["running"], "the folder was given back"
    told = refused(one, folder, "up")
    assert "runs on login2" in told
    act(one, folder, "down", on_other_host=True)
    wait_for(lambda: runs_nothing_of_it(two), "the other host to stop all of it")
    assert status_after_up(one, folder)["running"]
    assert owner(folder)[1] == "login1"


def status_after_up(host: Host, folder: Path) -> Any:
    return json.loads(act(host, folder, "up").splitlines()[-1])


@pytest.mark.parametrize("data", [pytest.param("shared", marks=pytest.mark.long), "node-local"])
def test_after_a_crash_another_host_goes_on_and_what_ran_is_a_cut_run(
    folder: Path, hosts: tuple[Host, Host], data: str
) -> None:
    one, two = hosts
    act(one, folder, "up", data=data)
    job = start_a_long_job(one, folder)
    one.crash()
    began = time.monotonic()
    said = act(two, folder, "up")
    assert time.monotonic() - began >= 5.0
    assert "over from login1" in said
    assert status(two, folder)["running"]
    assert owner(folder) == (2, "login2")
    state = f"client.job({job})['state']"
    wait_for(lambda: call(two, folder, state) == "RESTART_READY", "the job to wait for its next run")
    act(two, folder, "down")


def test_a_host_that_hung_and_comes_back_finds_itself_taken_over_and_stops(
    folder: Path, hosts: tuple[Host, Host]
) -> None:
    one, two = hosts
    act(one, folder, "up")
    job = start_a_long_job(one, folder)
    one.signal_all(signal.SIGSTOP)
    act(two, folder, "up")
    done = call(two, folder, "client.submit(app(), 'true', 'done by the second')")
    one.signal_all(signal.SIGCONT)
    wait_for(lambda: runs_nothing_of_it(one), "the first host to stop all of it", 30)
    assert json.loads((folder / "alive" / "1.json").read_text())["why"] == "taken over"
    assert status(two, folder)["running"]
    assert (folder / "postgres" / "postmaster.pid").exists(), "without it PostgreSQL stops within a minute"
    act(two, folder, "down")
    act(two, folder, "up")  # PostgreSQL reads its data anew
    assert call(two, folder, f"[client.job({job})['id'], client.job({done})['id']]") == [job, done]
    act(two, folder, "down")


def test_the_impatient_take_over_from_a_host_that_is_alive_and_it_stops_first(
    folder: Path, hosts: tuple[Host, Host]
) -> None:
    one, two = hosts
    act(one, folder, "up")
    began = time.monotonic()
    assert "over from login1" in act(two, folder, "up", takeover=True)
    assert time.monotonic() - began < 60
    assert runs_nothing_of_it(one)
    assert status(two, folder)["running"]
    assert call(two, folder, "client.site.name") == "local"
    act(two, folder, "down")


def test_of_two_hosts_that_start_at_once_one_runs_it(folder: Path, hosts: tuple[Host, Host]) -> None:
    more: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    started = [subprocess.Popen(host.command(_ACT, str(folder), "up", "{}"), text=True, **more) for host in hosts]
    said = [process.communicate(timeout=120)[0] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 1], said
    winner = hosts[codes.index(0)]
    assert owner(folder)[1] == winner.name
    assert status(winner, folder)["running"]
    assert runs_nothing_of_it(hosts[codes.index(1)])
    act(winner, folder, "down")
