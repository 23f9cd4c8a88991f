"""The files beside ``client.yml``, which several processes of an account write, each in its turn."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

KEY_SUFFIX = ".key"
"""Of the file with the account's name and password."""


@contextlib.contextmanager
def turn(file: Path, patience_s: float | None) -> Iterator[bool]:
    """Let one process at a time log in for the account of a credentials file and write that file.

    Parameters
    ----------
    file
        The credentials file; the lock lies beside it.
    patience_s
        How long to wait for another process, after which it is our turn, too; None: not at all.

    Yields
    ------
    bool
        Whether it is our turn. Where no file can be locked it always is.
    """
    lock = file.with_suffix(".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # a folder that we may not write: log in without regard to others
        yield True
        return
    if not _lock(descriptor, patience_s or 0.0):
        os.close(descriptor)
        yield patience_s is not None  # two logins at once do no harm; a process that was stopped within its turn would
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile holds it too
        os.close(descriptor)


def _lock(descriptor: int, patience_s: float) -> bool:
    """Try to lock a file for so long; whether it is ours. A file system without locks has none to give."""
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        except OSError:
            return False
