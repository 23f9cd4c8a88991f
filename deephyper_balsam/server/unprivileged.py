"""Run a program as another account than root: ``python -I -S unprivileged.py UID GID PROGRAM [ARGUMENT...]``.

PostgreSQL refuses to run as root. The current folder stays what it is, also where the account could not enter it.
In a container whose root may not change its account, UID is ``-``: then the program runs in a user namespace in which
root has no number, so that the system gives it that of "nobody". This file runs by its path, alone, and imports nothing
of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


def _leave_root() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER):
        why = os.strerror(ctypes.get_errno())
        sys.exit(
            "PostgreSQL does not run as root, and this container lets root neither become another account (that takes "
            "the capabilities CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID and SETUID) nor make a user namespace "
            f"({why}). Start the container as an ordinary user (docker run --user 1000) or with these capabilities."
        )


def main() -> None:
    """Change the account, then become the program."""
    uid, gid, *command = sys.argv[1:]
    if uid == "-":
        _leave_root()
    else:
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # the change of account took it back
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
    if os.getppid() != parent:  # it ended just before
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
