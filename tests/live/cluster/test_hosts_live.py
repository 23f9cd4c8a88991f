"""The hosts of the tests' cluster are apart from each other, die like machines, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.waiting import wait_for

from . import hosts as module
from .hosts import Hosts, missing

pytestmark = [pytest.mark.live, pytest.mark.slurm]

SAY = "import socket; s = socket.create_connection(({address!r}, {port}), 2); print(s.recv(9).decode())"
SERVE = "import socket; s = socket.create_server(({address!r}, 0)); print(s.getsockname()[1], flush=True)"
ANSWER = "\nwhile True: s.accept()[0].sendall(b'here')"
LISTEN = "import socket; s = socket.socket(socket.AF_UNIX); s.bind('/tmp/s'); s.listen(); input()"
BOOT_ID = "print(open('/proc/sys/kernel/random/boot_id').read())"
REACH = "import os; print(os.path.exists('/tmp/s'))"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = missing()
    if reason:
        pytest.skip(f"no hosts here: {reason}")
    made = Hosts(["one", "two"])
    with tempfile.TemporaryDirectory(dir=Hosts.place) as folder:
        try:
            made.up(Path(folder))
            yield made
        finally:
            made.down()


def python(hosts: Hosts, host: str, text: str) -> subprocess.Popen[str]:
    command = hosts.command(host, sys.executable, "-c", text)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def said(hosts: Hosts, host: str, text: str) -> str:
    return " ".join(python(hosts, host, text).communicate(timeout=20)).strip()


def test_a_host_is_reached_by_its_address_and_never_by_the_loopback(hosts: Hosts) -> None:
    address = hosts.address("one")
    server = python(hosts, "one", SERVE.format(address=address) + ANSWER)
    local = python(hosts, "one", SERVE.format(address="127.0.0.1") + ANSWER)
    assert server.stdout is not None
    assert local.stdout is not None
    port, local_port = int(server.stdout.readline()), int(local.stdout.readline())
    assert said(hosts, "two", SAY.format(address="one", port=port)) == "here"
    assert said(hosts, "one", SAY.format(address="127.0.0.1", port=local_port)) == "here"
    assert "ConnectionRefusedError" in said(hosts, "two", SAY.format(address="127.0.0.1", port=local_port))
    for process in (server, local):
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_hosts_see_neither_the_sockets_nor_the_processes_of_each_other(hosts: Hosts) -> None:
    listener = python(hosts, "one", LISTEN)
    wait_for(lambda: said(hosts, "one", REACH) == "True", "the socket")
    assert said(hosts, "two", REACH) == "False"
    assert not Path("/tmp/s").exists()
    pids = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"
    assert int(said(hosts, "two", pids)) <= 3  # the first one, and this
    listener.communicate("\n", timeout=20)
    assert said(hosts, "one", BOOT_ID) != said(hosts, "two", BOOT_ID)


def test_a_host_dies_with_all_its_processes_and_comes_back_without_them(hosts: Hosts) -> None:
    orphan = "import subprocess as s; s.Popen(['setsid', 'sleep', '1000'], stdout=s.DEVNULL, stderr=s.DEVNULL)"
    assert said(hosts, "two", orphan) == ""
    before = said(hosts, "two", BOOT_ID)
    sleeping = "import subprocess; print(subprocess.run(['pgrep', '-c', 'sleep'], capture_output=True).stdout.decode())"
    assert said(hosts, "two", sleeping) == "1"
    hosts.kill("two")
    silence = said(hosts, "one", SAY.format(address="two", port=1))
    assert "timed out" in silence or "No route" in silence
    hosts.boot("two")
    assert said(hosts, "two", sleeping) == "0"
    assert said(hosts, "two", BOOT_ID) != before


def test_what_a_killed_run_left_is_removed_by_the_next(hosts: Hosts, tmp_path: Path) -> None:
    script = (
        "import os, signal, tempfile, pathlib\nfrom live.cluster.hosts import Hosts\n"
        "folder = pathlib.Path(tempfile.mkdtemp(dir=Hosts.place))\nmade = Hosts(['left'])\nmade.up(folder)\n"
        "print(folder, made.address('left').rpartition('.')[0], flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    tests = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": tests}, capture_output=True, text=True
    )
    folder, net = run.stdout.split()
    bridge = "dhb" + "-".join(net.split(".")[1:])
    assert Path("/run/netns", f"{bridge}-left").exists()
    module.sweep()
    assert not Path(folder).exists()
    assert not Path("/run/netns", f"{bridge}-left").exists()
    assert not Path("/sys/class/net", bridge).exists()
    assert said(hosts, "one", "print('alive')") == "alive"
