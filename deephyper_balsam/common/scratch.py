"""Private folders in the machine's temporary folder, which know their owner: whoever comes next removes an orphan.

A process that is killed with SIGKILL removes nothing. So each folder names the process that needs it, and `make` first
removes those of ours whose process is gone. Folders of other users, and those that name no process, are left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deephyper_balsam.common.private import open_at_once, write_private
from deephyper_balsam.common.process_id import ProcessId

PREFIX = "dhb-"
_OWNER = "owner.json"
_LONGEST = 60  # a Unix socket in it may have a path of 107 bytes


def make(place: Path | str | None = None) -> Path:
    """Make a folder that only this user may enter and that this process needs; orphans are removed first.

    Parameters
    ----------
    place
        Where; by default in the temporary folder, or in ``/tmp`` where that has too long a name for Unix sockets.
    """
    sweep()
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place or _place()))
    belongs_to(path, ProcessId.of(os.getpid()))
    return path


def belongs_to(path: Path, process: ProcessId | None, also: Sequence[Path] = ()) -> None:
    """Write down which process needs a folder: it may be another one later.

    Parameters
    ----------
    path
        A folder that `make` made.
    process
        Who needs it from now on; None changes nothing.
    also
        What else is to be removed with the folder when that process is gone.
    """
    if process is None:
        return
    content = {"where": _where(), "process": process.to_dict(), "also": [str(one) for one in also]}
    # The folder may belong to the account of a server: a file of a new name that follows no link, then renamed
    write_private(path / _OWNER, json.dumps(content))


def sweep() -> list[Path]:
    """Remove the folders of this user whose process is gone; return them."""
    places = {Path(tempfile.gettempdir()), Path("/tmp")}
    return [path for place in places for path, also in _orphans(place) if _remove(path, also)]


def _place() -> str:
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST else "/tmp"


def _where() -> list[str]:
    """A pid means something on one machine and in one name space of pids alone."""
    with contextlib.suppress(OSError):
        return [socket.gethostname(), os.readlink("/proc/self/ns/pid")]
    return [socket.gethostname()]


def _orphans(place: Path) -> list[tuple[Path, list[str]]]:
    found = ((path, _left_by_the_dead(path)) for path in place.glob(f"{PREFIX}*"))
    return [(path, also) for path, also in found if also is not None]


def _left_by_the_dead(path: Path) -> list[str] | None:
    """What goes with a folder of ours whose process is gone; None for every other folder."""
    try:
        status = path.lstat()
        # Root gives a folder to the account of a server, but what it wrote in it stays its own
        if not stat.S_ISDIR(status.st_mode) or os.geteuid() not in (status.st_uid, 0):
            return None
        with open(path / _OWNER, encoding="utf-8", opener=open_at_once) as file:
            owned = os.fstat(file.fileno())
            if owned.st_uid != os.geteuid() or not stat.S_ISREG(owned.st_mode):
                return None
            content = json.load(file)
        if content["where"] != _where() or ProcessId.from_dict(content["process"]).alive:
            return None
        return [str(one) for one in content.get("also", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remove(path: Path, also: Sequence[str]) -> bool:
    for one in (*map(Path, also), path):
        shutil.rmtree(one, ignore_errors=True)
    return not path.exists()
