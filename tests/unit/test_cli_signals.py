"""SIGTERM, and SIGHUP of a terminal that closes, end a command in order; under nohup it goes on."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import psutil
import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "fakes"))

from balsam_api import BalsamApi, VirtualSite

from deephyper_balsam.cli import main
from deephyper_balsam.server import stack as local
from deephyper_balsam.store.gateway import Gateway
from deephyper_balsam.store.lease import current_lease, read_leases

pytest_plugins = ["balsam_fixtures"]

PROBLEM = """
import os, subprocess
from deephyper_balsam import HpProblem
problem = HpProblem("p")
problem.add_hyperparameter((0.0, 1.0), "x")
def run(job):
    subprocess.run(f"sleep 300 & echo $! > pid.part; mv pid.part {os.environ['HOME']}/pid; wait", shell=True)
"""
COMMAND = [sys.executable, "-m", "deephyper_balsam"]
SEARCH = [
    *COMMAND,
    "search",
    "run",
    "s",
    "--problem",
    "p.py",
    "--site",
    "lab",
    "--max-evals",
    "9",
    "--method",
    "random",
]

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(site: VirtualSite, client_yml: Path, tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "p.py").write_text(PROBLEM)
    running: list[subprocess.Popen[bytes]] = []

    def begin(words: list[str], **more: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "BALSAM_CLIENT_PATH": str(client_yml), "HOME": str(tmp_path)}
        environment.pop("PYTHONUNBUFFERED", None)  # a user's output is held back, and fails at the end
        then = more.pop("preexec_fn", None)

        def as_in_a_terminal() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started by
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if then is not None:
                then()

        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "preexec_fn": as_in_a_terminal, **more}
        running.append(subprocess.Popen(words, cwd=tmp_path, env=environment, **options))
        return running[-1]

    yield begin
    for one in running:
        if one.poll() is None:
            one.kill()
        with one:
            pass


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _many_more(api: BalsamApi, seen: int) -> bool:
    return len(api.requests) > seen + 8


def driven(gateway: Gateway) -> bool:
    leases = read_leases(gateway, "s").get("s", [])
    return any(lease.driving_since is not None for lease in leases)


def ended_in_order(gateway: Gateway) -> bool:
    leases = read_leases(gateway, "s")["s"]
    return leases[-1].why == "interrupted" and current_lease(leases, gateway.now()) is None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_driver_in_order_and_it_can_be_resumed(start: Start, gateway: Gateway, number: int) -> None:
    driver = start(SEARCH)
    wait_for(lambda: driven(gateway))
    driver.send_signal(number)
    assert driver.wait(60) == 130
    assert ended_in_order(gateway)


def test_a_terminal_that_closes_ends_the_driver_in_order(start: Start, gateway: Gateway) -> None:
    master, slave = os.openpty()

    def take_it() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    driver = start(SEARCH, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_it)
    os.close(slave)
    wait_for(lambda: driven(gateway))
    os.close(master)
    assert driver.wait(60) == 130
    assert ended_in_order(gateway)


def test_under_nohup_the_driver_goes_on(start: Start, gateway: Gateway, api: BalsamApi) -> None:
    driver = start(SEARCH, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: driven(gateway))
    driver.send_signal(signal.SIGHUP)
    seen = len(api.requests)
    wait_for(lambda: len(api.requests) > seen + 5)
    assert driver.poll() is None
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 130
    assert ended_in_order(gateway)


def test_a_reader_that_leaves_and_a_full_disk_do_not_end_the_driver(
    start: Start, gateway: Gateway, api: BalsamApi
) -> None:
    with open("/dev/full", "wb") as full:
        driver = start(SEARCH, stdout=full, stderr=full)
    wait_for(lambda: driven(gateway))
    seen = len(api.requests)
    wait_for(lambda: len(api.requests) > seen + 5)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 130
    assert ended_in_order(gateway)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize(
    "words", ["search watch s", "simulate --problem p.py --workers 1 --minutes 1", "problem check p.py"]
)
def test_a_signal_ends_what_a_command_started_too(
    start: Start, gateway: Gateway, api: BalsamApi, tmp_path: Path, number: int, words: str
) -> None:
    if "watch" in words:
        driver = start(SEARCH)
        wait_for(lambda: driven(gateway))
        driver.terminate()
        driver.wait(60)
        looks = functools.partial(_many_more, api, len(api.requests))
    else:
        looks = (tmp_path / "pid").exists
    told = start([*COMMAND, *words.split()])
    wait_for(looks)
    told.send_signal(number)
    assert told.wait(60) == 130
    assert told.stderr is not None
    assert told.stderr.read().endswith(b"Interrupted.\n")
    if (tmp_path / "pid").exists():
        pid = int((tmp_path / "pid").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- a stack of one's own --------------------------------------------------------------------------------------------

STACK = """
import pathlib, sys, time
from deephyper_balsam.common import processes
from deephyper_balsam.driver import balsam_session
from deephyper_balsam.server import stack

class Stack(stack.LocalStack):
    client_path = pathlib.Path({client!r})

    def _start(self, state, site_name):
        words = [sys.executable, "-c", "import time; time.sleep(300)"]
        child, state.processes["postgres"] = processes.start(
            words, cwd=self.folder, env=self.files.environment(), log=self.logs / "postgres.log"
        )
        open({pid!r}, "w").write(str(child.pid))
        while {hangs!r}:
            time.sleep(0.1)

made = balsam_session.BalsamEvaluator
balsam_session.BalsamEvaluator = lambda run, site, **more: made(run, "lab", **more)
stack.LocalStack, stack._require_extra = Stack, lambda: None
from deephyper_balsam.cli import main
main()
"""


def alive(pid_file: Path) -> bool:
    pid = int(pid_file.read_text(encoding="utf-8"))
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def stack(start: Start, client_yml: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    def begin(words: str, *, hangs: bool, **more: Any) -> subprocess.Popen[bytes]:
        text = STACK.format(client=str(client_yml), pid=str(tmp_path / "database"), hangs=hangs)
        return start([sys.executable, "-c", text, *words.split()], **more)

    return begin


def is_written(path: Path) -> bool:
    return path.exists() and bool(path.read_text(encoding="utf-8"))


def in_a_terminal(begin: Callable[..., subprocess.Popen[bytes]], words: str, **more: Any) -> tuple[Any, int]:
    """Start a command in a terminal of its own; the command, and what to close for the terminal to close."""
    master, slave = os.openpty()

    def take_it() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    told = begin(words, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_it, **more)
    os.close(slave)
    return told, master


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, None], ids=["SIGHUP", "SIGTERM", "terminal"])
@pytest.mark.parametrize("words", ["server up --dir stack", "quickstart --problem p.py"])
def test_what_a_stack_had_started_is_stopped_when_its_start_is_cut(
    stack: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, words: str, number: int | None
) -> None:
    master = None
    if number is None:
        told, master = in_a_terminal(stack, words, hangs=True)
    else:
        told = stack(words, hangs=True)
    wait_for(lambda: is_written(tmp_path / "database") or told.poll() is not None)
    assert alive(tmp_path / "database")
    if master is None:
        told.send_signal(number)
    else:
        os.close(master)
    assert told.wait(60) == 130
    assert not alive(tmp_path / "database")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, None], ids=["SIGHUP", "SIGTERM", "terminal"])
def test_a_quickstart_that_is_cut_stops_its_stack_and_its_search_can_be_resumed(
    stack: Callable[..., subprocess.Popen[bytes]], gateway: Gateway, tmp_path: Path, number: int | None
) -> None:
    words, master = "quickstart --problem p.py --method random", None
    if number is None:
        told, master = in_a_terminal(stack, words, hangs=False)
    else:
        told = stack(words, hangs=False)
    wait_for(lambda: "quickstart-1" in read_leases(gateway) or told.poll() is not None)
    if master is None:
        told.send_signal(number)
    else:
        os.close(master)
    assert told.wait(60) == 130
    assert not alive(tmp_path / "database")
    leases = read_leases(gateway)["quickstart-1"]
    assert (leases[-1].why, current_lease(leases, gateway.now())) == ("interrupted", None)


def test_a_signal_that_comes_as_the_stack_has_come_up_stops_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    status = SimpleNamespace(running=False, url="u", site=None)
    stack = SimpleNamespace(
        folder=tmp_path,
        status=lambda: status,
        up=lambda **_: done.append("up") or status,
        down=lambda: done.append("down"),
    )
    monkeypatch.setattr(local, "LocalStack", lambda folder, **_: stack)
    echo = click.echo

    def rung(text: str = "", **more: Any) -> None:
        if text.startswith("  server"):
            raise KeyboardInterrupt
        echo(text, **more)

    monkeypatch.setattr(click, "echo", rung)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert CliRunner().invoke(main, ["quickstart", "--problem", "ackley"]).exit_code == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done == ["up", "down"]


# --- inside an allocation --------------------------------------------------------------------------------------------

LAUNCHER = """
import sys, types
import balsam.config
from deephyper_balsam.launcher import main as launcher
node = types.SimpleNamespace(node_id=1, hostname="n", gpu_ids=[])
compute_node = types.SimpleNamespace(get_job_nodelist=lambda: [node], get_scheduler_id=lambda: 7)
settings = types.SimpleNamespace(launcher=types.SimpleNamespace(compute_node=compute_node))
class Site:
    site_id, site_path, log_path, settings = {site_id}, {folder!r}, {folder!r}, settings
balsam.config.SiteConfig = Site
"""
MODE = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
open({folder!r} + "/mode", "w").write(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(open({folder!r} + "/told", "w").close()))
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_its_mode_in_order(start: Start, tmp_path: Path, number: int) -> None:
    (tmp_path / "mode.py").write_text(MODE.format(folder=str(tmp_path)))
    text = LAUNCHER.format(site_id=1, folder=str(tmp_path))
    text += f"launcher.mode_script = lambda mode: [sys.executable, {str(tmp_path / 'mode.py')!r}]\nlauncher.main()\n"
    told = start([sys.executable, "-c", text, "-j", "mpi", "-t", "5"], start_new_session=True)
    wait_for(lambda: is_written(tmp_path / "mode") or told.poll() is not None)
    os.killpg(told.pid, number) if number == signal.SIGHUP else told.send_signal(
        number
    )  # as a terminal says it: to all
    assert told.wait(60) == 0
    assert (tmp_path / "told").exists()
    assert not alive(tmp_path / "mode")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_allocation_ends_driver_and_launcher_and_the_search_can_be_resumed(
    start: Start, gateway: Gateway, site: VirtualSite, tmp_path: Path, number: int
) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "launcher.sh").write_text(f"echo $$ > {tmp_path}/mode\nexec sleep 300\n")
    text = LAUNCHER.format(site_id=site.id, folder=str(tmp_path)) + (
        "from deephyper_balsam.launcher import inside\n"
        "begin = inside.subprocess.Popen\n"
        "def popen(words, **more):\n"
        f"    mode = ['bash', {str(tmp_path / 'launcher.sh')!r}]\n"
        "    return begin(mode if 'deephyper_balsam.launcher.main' in words else words, **more)\n"
        "inside.subprocess.Popen = popen\n"
        "inside.main()\n"
    )
    words = [
        "-j",
        "mpi",
        "-t",
        "60",
        "s",
        "--problem",
        str(tmp_path / "p.py"),
        "--max-evals",
        "9",
        "--method",
        "random",
    ]
    told = start([sys.executable, "-c", text, *words], start_new_session=True)
    wait_for(lambda: (driven(gateway) and is_written(tmp_path / "mode")) or told.poll() is not None)
    os.killpg(told.pid, number)
    assert told.wait(60) == 130
    assert not alive(tmp_path / "mode")
    assert ended_in_order(gateway)
