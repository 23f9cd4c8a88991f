"""A real Slurm on this machine for a few tests: munge, a controller and three virtual nodes, in one temporary folder.

It needs root and the Debian packages slurmctld, slurmd, slurm-client and munge; no systemd, no accounting database.
Each node has two GPUs for Slurm, which are plain files. There are two kinds of networks: `OneMachine`, where all nodes
are this machine under other names, and `live.cluster.hosts.Hosts`, where each has an address and processes of its own.

``python -m tests.live.slurm.lab`` starts one to try things on, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

NUM_NODES = 3
CPUS = 4
GPUS = 2
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "munged", "unshare")
_MUNGE_FILES = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (apt-get install slurmctld slurmd slurm-client munge)"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True)
    return None if probe.returncode == 0 else "this machine gives no name spaces of its own (unshare --uts --mount)"


class Network(Protocol):
    """The hosts of a cluster: the first is for the controller, the others are nodes."""

    names: list[str]
    place: str | None  # where folders are made that all hosts see

    def up(self, folder: Path) -> None: ...
    def down(self) -> None: ...
    def address(self, name: str) -> str: ...
    def port(self, name: str) -> int: ...
    def command(self, name: str, *words: str, folder: Path | None = None) -> list[str]: ...


class OneMachine:
    """Hosts that are all this machine: the nodes have names of their own, and ports that were free."""

    place = None

    def __init__(self, nodes: Sequence[str]) -> None:
        self.names = [socket.gethostname().split(".")[0], *nodes]
        self._ports = dict(zip(self.names, _free_ports(len(self.names)), strict=True))
        self._hosts = Path()

    def up(self, folder: Path) -> None:
        """Write the table of names."""
        self._hosts = folder / "hosts"
        self._hosts.write_text(f"127.0.0.1 localhost {' '.join(self.names)}\n")

    def down(self) -> None:
        """Do nothing: nothing was started."""

    def address(self, name: str) -> str:
        """Return the loopback."""
        return "127.0.0.1"

    def port(self, name: str) -> int:
        """Return the port of a host's daemon."""
        return self._ports[name]

    def command(self, name: str, *words: str, folder: Path | None = None) -> list[str]:
        """Return the command that runs `words` under a host's name."""
        if name == self.names[0]:
            return list(words)
        script = f'hostname {name} && mount --bind {self._hosts} /etc/hosts && cd "$0" && exec "$@"'
        return ["unshare", "--uts", "--mount", "bash", "-c", script, str(folder or "/"), *words]


class SlurmLab:
    """One Slurm cluster with the partition ``regular``."""

    def __init__(self, network: Network | None = None) -> None:
        self.network = network or OneMachine([f"nid{number:06d}" for number in range(1, NUM_NODES + 1)])
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-", dir=self.network.place))
        self.nodes = self.network.names[1:]
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": self._conf}

    @property
    def _conf(self) -> str:
        return str(self.folder / "slurm.conf")

    def up(self) -> None:
        for name in ("state", "spool", "run", "log"):
            (self.folder / name).mkdir()
        self.network.up(self.folder)
        self._start_munge()
        self._write_files()
        self.start_controller()
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
            self.start_node(node)
        self.wait_until_idle()

    def start_node(self, node: str) -> None:
        """Start slurmd on a node."""
        self._start(f"slurmd.{node}", self.network.command(node, "slurmd", "-D", "-N", node, "-f", self._conf))

    def wait_until_idle(self) -> None:
        """Wait until all nodes are there, and none has a job."""
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-o", "%t %D").stdout.split() != ["idle", str(len(self.nodes))]:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self._started.values()):
                raise RuntimeError(f"Slurm did not start; its logs:\n{self.logs()}")
            time.sleep(0.3)

    def stop_controller(self) -> None:
        """Kill slurmctld, as a crash would; what runs on the nodes goes on."""
        os.killpg(self._controller.pid, signal.SIGKILL)
        self._controller.wait(10)
        del self._started["slurmctld"]

    def start_controller(self) -> None:
        """Start slurmctld; it finds its jobs where it kept them."""
        command = self.network.command(self.network.names[0], "slurmctld", "-D", "-f", self._conf)
        self._controller = self._start("slurmctld", command)

    def run(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's against this cluster."""
        env = {**os.environ, **self.env}
        words = self.network.command(self.network.names[0], *command)
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=check)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("log/*")
        )

    def down(self) -> None:
        """End all jobs, then every process that was started here, and remove the folder."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, LookupError):  # it may not have come up
            self.run("scancel", f"--user={os.environ.get('USER', 'root')}")
            deadline = time.monotonic() + 40
            while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
                time.sleep(0.3)
        for process in reversed(self._started.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        self.network.down()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            made = subprocess.Popen(
                command,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started[name] = made
        return made

    def _start_munge(self) -> None:
        """Start a munge of its own: another cluster on this machine may come and go beside it."""
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        files = [f"--{kind}={folder / name}" for kind, name in _MUNGE_FILES.items()]
        self._start("munged", self.network.command(self.network.names[0], "munged", "--foreground", "--force", *files))
        probe = ["munge", "-n", f"--socket={folder / 'socket'}"]
        deadline = time.monotonic() + 20
        while subprocess.run(probe, capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"munged did not start; its logs:\n{self.logs()}")
            time.sleep(0.2)

    def _write_files(self) -> None:
        network, host = self.network, self.network.names[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={network.address(node)} Port={network.port(node)} "
            f"CPUs={CPUS} Gres=gpu:{GPUS}"
            for node in self.nodes
        )
        gpus = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for gpu in gpus:
            gpu.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=lab
SlurmctldHost={host}({network.address(host)})
SlurmctldPort={network.port(host)}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/run/slurmctld.pid
SlurmdPidFile={self.folder}/run/slurmd.%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=15
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
FirstJobId={10_000 + int(time.time()) % 1_000_000 * 10}
{nodes}
PartitionName=regular Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=EXCLUSIVE State=UP
""")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for made in sockets:
        made.bind(("127.0.0.1", 0))
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


if __name__ == "__main__":
    reason = missing()
    if reason:
        raise SystemExit(f"No Slurm here: {reason}.")
    lab = SlurmLab()
    try:
        lab.up()
        print(f"A Slurm with {NUM_NODES} nodes runs until Ctrl-C. In another shell:")
        print(f"  export SLURM_CONF={lab.env['SLURM_CONF']}")
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        lab.down()
