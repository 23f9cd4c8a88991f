"""An agent that looks alive: a service of it was killed or stopped, or it lives and gives no sign. Real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.monitor.liveness import AgentLiveness
from deephyper_balsam.sites.agent import PID_FILE, Agent, fault_of, is_ending
from deephyper_balsam.sites.checks import _agent
from deephyper_balsam.store.gateway import Gateway

pytest_plugins = ["balsam_fixtures"]

# As Balsam's: processes that it starts by fork, and for which it never waits
_AGENT = """
import os, time
children = [os.fork() or time.sleep(300) or os._exit(0) for _ in range(3)]
print(*children, flush=True)
time.sleep(300)
"""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[psutil.Process]:
    """An agent with three services, which `tmp_path` names."""
    words = [sys.executable, "-c", _AGENT, "balsam.site.service.main"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        services = [int(word) for word in started.stdout.readline().split()]
        (tmp_path / PID_FILE).write_text(f"{socket.gethostname()}\n{started.pid}")
        try:
            yield psutil.Process(started.pid)
        finally:
            started.kill()
            for service in services:
                try:
                    os.kill(service, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_service_that_was_killed_is_told_by_the_agent_the_check_and_nobody_says_it_is_well(
    which: int, agent: psutil.Process, tmp_path: Path
) -> None:
    assert Agent.read(tmp_path).lives
    assert Agent.read(tmp_path).fault is None
    assert _agent(now(), tmp_path).ok
    agent.children()[which].kill()
    until(lambda: Agent.read(tmp_path).fault is not None)
    assert Agent.read(tmp_path).fault == "1 of its 3 processes died"
    found = _agent(now(), tmp_path)
    assert not found.ok
    assert f"(pid {agent.pid}) runs, but 1 of its 3 processes died" in found.detail
    assert "server up" in found.detail


def test_a_service_that_was_waited_for_is_missed_where_it_is_known_how_many_there_were(agent: psutil.Process) -> None:
    assert fault_of(agent, 3) is None
    assert fault_of(agent, 5) == "2 of its 5 processes died"


def test_what_is_stopped_does_no_work_either(agent: psutil.Process, tmp_path: Path) -> None:
    service = agent.children()[1]
    service.suspend()
    until(lambda: fault_of(agent) == "1 of its 3 processes is stopped")
    agent.suspend()
    until(lambda: "SIGSTOP" in (fault_of(agent) or ""))
    assert not _agent(now(), tmp_path).ok
    for one in (agent, service):
        one.resume()
    until(lambda: fault_of(agent) is None)


def test_a_pid_that_was_used_again_is_no_agent(tmp_path: Path) -> None:
    (tmp_path / PID_FILE).write_text(f"{socket.gethostname()}\n{os.getpid()}")
    assert not Agent.read(tmp_path).lives
    (tmp_path / PID_FILE).write_text("another-host\n1")
    assert not Agent.read(tmp_path).lives
    assert Agent.read(tmp_path).fault is None


def test_an_agent_that_lives_and_reports_nothing_is_not_told_to_be_started(
    agent: psutil.Process, tmp_path: Path
) -> None:
    found = _agent("2026-01-01T00:00:00", tmp_path)
    assert not found.ok
    assert f"(pid {agent.pid}) runs, but was last heard of" in found.detail
    assert "the scheduler or Balsam may not answer it" in found.detail


def silent(gateway: Gateway, site: VirtualSite, api: BalsamApi, path: Path) -> str:
    api.sites[site.id]["path"] = str(path)
    watch = AgentLiveness(gateway, {site.id: gateway.site("lab")})
    api.silent_sites.add(site.id)
    api.let_pass(400)
    watch.look(api.now().timestamp())
    return watch.notice or ""


def test_who_watches_says_what_is_wrong_with_an_agent_that_lives_and_not_to_start_one(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, agent: psutil.Process, tmp_path: Path
) -> None:
    said = silent(gateway, site, api, tmp_path)
    assert f"though it runs (pid {agent.pid})" in said
    assert f"site check {tmp_path}" in said
    assert "site start" not in said
    agent.children()[0].kill()
    until(lambda: Agent.read(tmp_path).fault is not None)
    said = silent(gateway, site, api, tmp_path)
    assert "1 of its 3 processes died" in said
    assert "server up" in said


def test_of_an_agent_that_is_gone_it_says_to_start_one(
    gateway: Gateway, site: VirtualSite, api: BalsamApi, agent: psutil.Process, tmp_path: Path
) -> None:
    agent.kill()
    until(lambda: not Agent.read(tmp_path).lives)
    assert "balsam site start" in silent(gateway, site, api, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")
@pytest.mark.parametrize(
    ("code", "ending"), [("pass", True), ("import os; os.kill(os.getpid(), 9)", False), ("1 / 0", False)]
)
def test_an_agent_whose_service_has_ended_in_order_is_being_stopped(code: str, ending: bool) -> None:
    main = [sys.executable, "-c", "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(300)"]
    started = subprocess.Popen([*main, sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        agent = psutil.Process(started.pid)
        until(lambda: [child.status() for child in agent.children()] == [psutil.STATUS_ZOMBIE])
        assert is_ending(agent) is ending
    finally:
        started.kill()
        started.wait()
