"""A cluster for a few tests: a login host and three compute nodes with addresses of their own, with a real Slurm.

It is the Slurm of `live.slurm.lab` on the hosts of `live.cluster.hosts`. What is to be seen by all hosts lies in
``lab.shared``; the project's own folder and its Python are seen everywhere, too.

``PYTHONPATH=tests python -m live.cluster.lab`` starts one to try things on, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from live.slurm import lab as slurm

from . import hosts

LOGIN = "login"
NODES = tuple(f"nid{number:06d}" for number in range(1, slurm.NUM_NODES + 1))
ACCOUNT = "m1234"
QUEUE = "regular"


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    return slurm.missing() or hosts.missing()


class ClusterLab(slurm.SlurmLab):
    """A login host, on which Slurm's controller runs, and compute nodes.

    Attributes
    ----------
    shared
        A folder on the file system that all hosts share.
    """

    network: hosts.Hosts

    def __init__(self) -> None:
        super().__init__(hosts.Hosts([LOGIN, *NODES]))
        self.shared = self.folder / "shared"
        self.shared.mkdir()
        (self.folder / "home").mkdir()

    def environment(self, **more: str) -> dict[str, str]:
        """Return a user's environment: nothing of Balsam's, an empty home, and this Python first."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BALSAM_", "SLURM_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**kept, "PATH": path, "HOME": str(self.folder / "home"), **self.env, **more}

    def on(
        self, host: str, *command: str, folder: Path | None = None, timeout_s: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, by default in the shared folder; its output and errors come back together."""
        started = self.start_on(host, *command, folder=folder, **variables)
        try:
            said, _ = started.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as late:
            self.end(started)
            raise AssertionError(f"{shlex.join(command)} on {host} took over {timeout_s} s: {late.output}") from late
        return subprocess.CompletedProcess(command, started.returncode, said, "")

    def start_on(self, host: str, *command: str, folder: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """Start a command on a host; `end` ends it."""
        return subprocess.Popen(
            self.network.command(host, *command, folder=folder or self.shared),
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def end(started: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
        """Send a signal to a command that `start_on` started, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, number)
        started.communicate(timeout=60)

    def kill_node(self, node: str) -> None:
        """Let a node die as by a power cut; Slurm hears of it at once, as from a facility's watch."""
        self.network.kill(node)
        self._started.pop(f"slurmd.{node}").wait(10)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power", check=True)

    def boot_node(self, node: str) -> None:
        """Start a node that died; Slurm uses it again."""
        self.network.boot(node)
        self.start_node(node)

    @contextlib.contextmanager
    def running(self) -> Iterator[ClusterLab]:
        """Start it, and end it and all that runs on it at last."""
        try:
            self.up()
            yield self
        finally:
            self.down()


if __name__ == "__main__":
    reason = missing()
    if reason:
        raise SystemExit(f"No cluster here: {reason}.")
    with contextlib.suppress(KeyboardInterrupt), ClusterLab().running() as lab:
        print(f"A cluster runs until Ctrl-C; its hosts share {lab.shared}. In another shell:")
        for host in lab.network.names:
            variables = [f"{name}={value}" for name, value in lab.env.items()]
            print(f"  {shlex.join(lab.network.command(host, 'env', *variables, 'bash', folder=lab.shared))}")
        signal.pause()
