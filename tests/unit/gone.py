"""Whether processes that a test started are gone."""

from __future__ import annotations

import time

import psutil


def is_gone(pid: int) -> bool:
    """Return whether a process ended within a few seconds; one that nobody waited for has ended too."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
