"""Run a program as another account: ``python -I -S unprivileged.py UID GID KEEP_SEARCH PROGRAM [ARGUMENT...]``.

PostgreSQL refuses to run as root. With KEEP_SEARCH 1 the program keeps one capability of root: to walk through folders
that only root may enter, such as /root, where the stack or the Python environment may be. Opening those folders to
everybody would be the alternative. This file runs by its path, alone, and imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2


def _permitted() -> int:
    with open("/proc/self/status") as status:
        return next((int(line.split()[1], 16) for line in status if line.startswith("CapPrm")), 0)


def _keep(libc: ctypes.CDLL, capability: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0)
    bit = 1 << capability
    sets = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
    if libc.capset(header, sets) == 0:
        libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def main() -> None:
    """Change the account, then become the program."""
    uid, gid, keep_search = (int(word) for word in sys.argv[1:4])
    command = sys.argv[4:]
    capability = None
    libc = None
    if keep_search and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        permitted = _permitted()
        for candidate in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE):
            if permitted >> candidate & 1:
                capability = candidate
                break
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if libc is not None and capability is not None:
        _keep(libc, capability)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
