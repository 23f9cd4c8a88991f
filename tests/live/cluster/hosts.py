"""Several hosts on one machine: each has a network address, a loopback, a host name, processes and a /tmp of its own.

A host is a network namespace on a common bridge, and in it a first process with namespaces of its own for mounts,
names, shared memory and process ids. All see the files of this machine, as hosts do that share a file system, but
/tmp, /dev/shm and their boot ids are theirs. Nothing reaches another host through 127.0.0.1 or a socket in /tmp.

It needs root. Names and the network 10.x.y.0/24 are unique for each run, so that several live side by side. What a
killed run left is removed by the next one: `_TABLE` says which process needs what.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from deephyper_balsam.common.process_id import ProcessId

_TABLE = Path("/run/deephyper-balsam-hosts")
_NETNS = Path("/run/netns")
_NEEDED = ("ip", "nsenter", "unshare", "mount")
# The first process of a host: what outlives its parent becomes its child, and is reaped
_INIT = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "hosts with addresses of their own need root"
    lacking = [name for name in _NEEDED if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (apt-get install iproute2 util-linux)"
    name = f"dhbp{os.getpid()}"
    tries = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", name, "type", "bridge"],
        ["ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name],
        ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"],
    ]
    try:
        for command in tries:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"this machine does not permit `{shlex.join(command)}`: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", name], capture_output=True)
    return None


class Hosts:
    """Hosts with the given names; the n-th has the address 10.x.y.n.

    Attributes
    ----------
    place
        Where folders that all of them see can be made.
    """

    place = "/var/tmp"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._net = ""
        self._folder = Path()
        self._first: dict[str, int] = {}  # host -> its first process, as this machine numbers it
        self._made: list[subprocess.Popen[bytes]] = []

    def up(self, folder: Path) -> None:
        """Make the network and start all hosts; `folder` is removed with them when this process is killed."""
        sweep()
        self._net, self._folder = _claim(folder), folder
        bridge = _bridge(self._net)
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{self._net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}.cluster.test {name}" for name in self.names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        for name in self.names:
            _ip("netns", "add", self._space(name))
            cable = self._cable(name)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", self._space(name))
            _ip("link", "set", cable, "master", bridge, "up")
            for words in (("address", "add", f"{self.address(name)}/24", "dev", "eth0"), ("link", "set", "lo", "up")):
                _ip("-n", self._space(name), *words)
            _ip("-n", self._space(name), "link", "set", "eth0", "up")
            self.boot(name)

    def down(self) -> None:
        """End every process on every host, and remove all that `up` made but the folder."""
        if self._net:
            _remove(self._net)
        self._first.clear()
        for made in self._made:
            made.communicate(timeout=10)

    def address(self, name: str) -> str:
        """Return a host's address."""
        return f"{self._net}.{self.names.index(name) + 1}"

    def port(self, name: str) -> int:
        """Return a port for a daemon of Slurm's: each host has all of its own."""
        return 6817 if name == self.names[0] else 6818

    def boot(self, name: str) -> None:
        """Start a host that does not run."""
        ready = self._folder / f"ready.{name}"
        ready.unlink(missing_ok=True)
        boot_id = self._folder / f"boot_id.{name}"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        _ip("link", "set", self._cable(name), "up")
        script = f"""set -e
hostname {name}
mount --bind {self._folder}/hosts /etc/hosts
mount --bind {boot_id} /proc/sys/kernel/random/boot_id
for own in /tmp /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs $own; done
touch {ready}
exec {sys.executable} -I -S -c {shlex.quote(_INIT)}"""
        space = ["nsenter", f"--net={_NETNS / self._space(name)}"]
        own = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        made = subprocess.Popen(
            [*space, *own, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        self._made.append(made)
        deadline = time.monotonic() + 20
        while not ready.exists():
            if made.poll() is not None or time.monotonic() > deadline:
                made.kill()
                raise RuntimeError(f"the host {name} did not start: {made.communicate()[1].decode()}")
            time.sleep(0.02)
        [first] = psutil.Process(made.pid).children()
        self._first[name] = first.pid

    def kill(self, name: str) -> None:
        """End a host as a power cut does: nobody hears of it again, and all its processes are gone at once."""
        _ip("link", "set", self._cable(name), "down")
        os.kill(self._first.pop(name), signal.SIGKILL)  # the kernel kills all others with it
        while _processes(self._space(name)):
            time.sleep(0.02)

    def command(self, name: str, *words: str, folder: Path | None = None) -> list[str]:
        """Return the command that runs `words` on a host, in `folder`."""
        enter = ["nsenter", "--target", str(self._first[name]), "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        return [*enter, "bash", "-c", 'cd "$0" && exec "$@"', str(folder or "/"), *words]

    def runs(self, name: str) -> bool:
        """Whether a host was started and not killed."""
        return name in self._first

    def processes(self, name: str) -> list[int]:
        """Return a host's processes but its first, as this machine numbers them."""
        first, found = self._first[name], []
        for pid in _processes(self._space(name)):
            with contextlib.suppress(OSError):
                if pid != first and os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{first}/ns/pid"):
                    found.append(pid)
        return found

    def _space(self, name: str) -> str:
        return f"{_bridge(self._net)}-{name}"

    def _cable(self, name: str) -> str:
        return f"{_bridge(self._net)}-{self.names.index(name)}"


def sweep() -> None:
    """Remove what runs left whose process is gone."""
    for claim in _TABLE.glob("10.*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            content = json.loads(claim.read_text())
            if not ProcessId.from_dict(content["process"]).alive:
                _remove(claim.name)
                shutil.rmtree(content["folder"], ignore_errors=True)


def _claim(folder: Path) -> str:
    """Take a network that nobody on this machine uses: its first three numbers."""
    _TABLE.mkdir(mode=0o755, exist_ok=True)
    used = {one.address.rpartition(".")[0] for found in psutil.net_if_addrs().values() for one in found}
    owner = ProcessId.of(os.getpid())
    assert owner is not None
    while True:
        net = f"10.{random.randint(120, 250)}.{random.randint(1, 250)}"
        if net in used:
            continue
        temporary = _TABLE / f".{net}.{os.getpid()}"
        temporary.write_text(json.dumps({"process": owner.to_dict(), "folder": str(folder)}))
        try:
            os.link(temporary, _TABLE / net)
            return net
        except FileExistsError:
            continue
        finally:
            temporary.unlink()


def _bridge(net: str) -> str:
    _, second, third = net.split(".")
    return f"dhb{second}-{third}"  # 15 letters at most, with a cable's number


def _remove(net: str) -> None:
    for space in _NETNS.glob(f"{_bridge(net)}-*"):
        deadline = time.monotonic() + 20
        while (left := _processes(space.name)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        subprocess.run(["ip", "netns", "del", space.name], capture_output=True)
    subprocess.run(["ip", "link", "del", _bridge(net)], capture_output=True)
    (_TABLE / net).unlink(missing_ok=True)


def _processes(space: str) -> list[int]:
    """Return the processes in a network namespace, as this machine numbers them."""
    told = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(word) for word in told.stdout.split()]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`ip {shlex.join(words)}` failed: {done.stderr.strip()}")
