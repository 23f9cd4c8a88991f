"""A site's agent as the machine sees it: whether it runs here, and whether a part of it has died.

Balsam's agent is one process that starts others for its services and then only waits. It does not notice that one of
them is killed: it looks alive and does half of its work. What has died stays behind as a zombie, by which it is known.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deephyper_balsam.common.wording import counted

if TYPE_CHECKING:
    import psutil

PID_FILE = "balsam-service.pid"
"""In a site's folder: the host and the pid of its agent."""

_MODULE = "balsam.site.service"


@dataclass(frozen=True)
class Agent:
    """What a site's pid file says.

    Attributes
    ----------
    host
        The machine on which the agent was started.
    pid
        Its main process.
    """

    host: str
    pid: int

    @classmethod
    def read(cls, site_path: Path) -> Agent:
        """Read the pid file of a site.

        Raises
        ------
        OSError
            When there is none, or it cannot be read.
        ValueError
            When it is broken.
        """
        host, pid = (site_path / PID_FILE).read_text(encoding="utf-8").split()
        return cls(host, int(pid))

    @property
    def here(self) -> bool:
        """Whether it was started on this machine."""
        return self.host == socket.gethostname()

    @property
    def lives(self) -> bool:
        """Whether its main process runs on this machine, and is Balsam's: a pid may be used again."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            words = process.cmdline()
            return self.here and process.status() != psutil.STATUS_ZOMBIE and any(_MODULE in word for word in words)
        except (psutil.Error, ValueError):
            return False

    @property
    def fault(self) -> str | None:
        """What keeps it from its work though it runs on this machine; None where nothing is seen."""
        import psutil

        try:
            return fault_of(psutil.Process(self.pid)) if self.here else None
        except (psutil.Error, ValueError):
            return None


def dead_parts(main: psutil.Process, services: int = 0) -> int:
    """Return how many of an agent's processes died.

    Parameters
    ----------
    main
        Its main process.
    services
        How many processes it had when it was whole, where that is known.
    """
    import psutil

    try:
        states = [_state(child) for child in main.children()]
    except psutil.Error:
        return 0
    return max(len(states), services) - sum(state != psutil.STATUS_ZOMBIE for state in states)


def is_ending(main: psutil.Process) -> bool:
    """Return whether an agent ends in order: none of its services was killed, and some have ended by themselves.

    Parameters
    ----------
    main
        Its main process, which collects its services when it ends, and otherwise only waits.
    """
    import psutil

    try:
        ended = [child for child in main.children() if _state(child) == psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return True
    return all(_exit_status(child.pid) == 0 for child in ended)


def fault_of(main: psutil.Process, services: int = 0) -> str | None:
    """Return what keeps an agent from its work though its main process runs; None where nothing is seen.

    Parameters
    ----------
    main
        Its main process.
    services
        How many processes it had when it was whole, where that is known.
    """
    import psutil

    try:
        states = [_state(child) for child in main.children()]
        if main.status() == psutil.STATUS_STOPPED:
            return f"its process {main.pid} is stopped (a signal SIGSTOP, or Ctrl-Z)"
    except psutil.Error:
        return None
    living = sum(state != psutil.STATUS_ZOMBIE for state in states)
    dead = dead_parts(main, services)
    if dead:
        return f"{dead} of its {counted(living + dead, 'process', 'processes')} died"
    stopped = states.count(psutil.STATUS_STOPPED)
    if stopped:
        return f"{stopped} of its {counted(living, 'process', 'processes')} {'is' if stopped == 1 else 'are'} stopped"
    return None


def _state(process: psutil.Process) -> str:
    import psutil

    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def _exit_status(pid: int) -> int | None:
    """Return what a zombie ended with, 0 where it was collected meanwhile, and None where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rsplit(None, 1)[-1])
    except FileNotFoundError:
        return 0 if Path("/proc/self/stat").exists() else None
    except (OSError, ValueError, IndexError):
        return None
