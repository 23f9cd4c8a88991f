"""A process that is known again: by its pid and the moment of its start, because a pid is used again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine since its last boot: the pid alone is used again.

    Attributes
    ----------
    pid
        The process id.
    started
        An opaque mark of the moment of the start; the same for as long as the process lives, another after a reboot.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Return the identity of the process that has `pid` now, or None when there is none."""
        mark = _start_mark(pid)
        return None if mark is None else cls(pid, mark)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProcessId:
        """Read what `to_dict` wrote."""
        return cls(int(data["pid"]), str(data["started"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as a dict that JSON can hold."""
        return {"pid": self.pid, "started": self.started}

    def find(self) -> psutil.Process | None:
        """Return the process while it lives; None when it ended, is a zombie, or another process has its pid."""
        if _start_mark(self.pid) != self.started:
            return None
        import psutil

        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return process
        return None

    @property
    def alive(self) -> bool:
        """Whether this very process runs."""
        return self.find() is not None


def _start_mark(pid: int) -> str | None:
    """Linux: boot id and clock ticks since boot, which no change of the wall clock moves. Elsewhere: psutil's time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        import psutil

        try:
            return f"{psutil.Process(pid).create_time():.2f}"
        except psutil.Error:
            return None
