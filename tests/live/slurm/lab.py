"""A real Slurm on this machine for a few tests: munge, a controller and three virtual nodes, in one temporary folder.

It needs root and the Debian packages slurmctld, slurmd, slurm-client and munge; no systemd, no accounting database. All
nodes are this machine: each ``slurmd`` runs under a host name of its own, with ports that were free. Each has two GPUs
for Slurm, which are plain files.

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


class SlurmLab:
    """One Slurm cluster with the partition ``regular``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        self.nodes = [f"nid{number:06d}" for number in range(1, NUM_NODES + 1)]
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self) -> None:
        for name in ("state", "spool", "run", "log"):
            (self.folder / name).mkdir()
        self._start_munge()
        self._write_files()
        self._start("slurmctld", ["slurmctld", "-D", "-f", self.env["SLURM_CONF"]])
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
            slurmd = f"slurmd -D -N {node} -f {self.env['SLURM_CONF']}"
            script = f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && exec {slurmd}"
            self._start(f"slurmd.{node}", ["unshare", "--uts", "--mount", "bash", "-c", script])
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-o", "%t %D").stdout.split() != ["idle", str(NUM_NODES)]:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self._started):
                raise RuntimeError(f"Slurm did not start; its logs:\n{self.logs()}")
            time.sleep(0.3)

    def run(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's against this cluster."""
        env = {**os.environ, **self.env}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=check)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("log/*")
        )

    def down(self) -> None:
        """End all jobs, then every process that was started here, and remove the folder."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", f"--user={os.environ.get('USER', 'root')}")
            deadline = time.monotonic() + 40
            while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
                time.sleep(0.3)
        for process in reversed(self._started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as output:
            self._started.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **self.env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _start_munge(self) -> None:
        """Start a munge of its own: another cluster on this machine may come and go beside it."""
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        files = [f"--{kind}={folder / name}" for kind, name in _MUNGE_FILES.items()]
        self._start("munged", ["munged", "--foreground", "--force", *files])
        probe = ["munge", "-n", f"--socket={folder / 'socket'}"]
        deadline = time.monotonic() + 20
        while subprocess.run(probe, capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"munged did not start; its logs:\n{self.logs()}")
            time.sleep(0.2)

    def _write_files(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller, *ports = _free_ports(NUM_NODES + 1)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=gpu:{GPUS}"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        gpus = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for gpu in gpus:
            gpu.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(self.nodes)}\n")
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
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
