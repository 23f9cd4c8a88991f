"""A local stack's folder: whose it is, the lock that lets one command work at a time, and the record of what runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from deephyper_balsam.common.loopback import pass_proxies_by
from deephyper_balsam.common.private import account
from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.server.certificates import Certificates
from deephyper_balsam.server.sign_of_life import Claims, Owner, require, take
from deephyper_balsam.server.stack_state import State, Waits

MARK_VARIABLE = "DEEPHYPER_BALSAM_STACK"
"""Names the stack's folder in the environment of each of its processes."""
CLAIM_VARIABLE = "DEEPHYPER_BALSAM_CLAIM"
"""Has the number of the claim to the folder (`sign_of_life.py`) under which a process was started."""
_LOCK_SAYS_S = 3.0
_POLL_S = 0.05


class StackFolder:
    """The folder that holds all of a stack.

    Parameters
    ----------
    path
        Where it is.
    say
        Takes a line for whoever waits.
    waits
        How long something may take.
    """

    def __init__(self, path: Path, say: Callable[[str], None], waits: Waits) -> None:
        self.path, self.say, self.waits = path, say, waits
        self.owner: Owner | None = None

    @property
    def client_path(self) -> Path:
        """The credentials file for Balsam's clients (mode 0600)."""
        return self.path / "client.yml"

    @property
    def site_path(self) -> Path:
        """The folder of the Balsam site."""
        return self.path / "site"

    @property
    def logs(self) -> Path:
        """The folder with a log of each process."""
        return self.path / "logs"

    @property
    def certificates(self) -> Certificates:
        """The authority and the server's certificate."""
        return Certificates(self.path / "tls")

    @property
    def exists(self) -> bool:
        """Whether a stack was ever started in the folder."""
        return (self.path / "stack.json").exists()

    def state(self) -> State:
        """Return the record of what runs."""
        return State.read(self.path / "stack.json")

    def save(self, state: State) -> None:
        """Write the record of what runs."""
        state.write(self.path / "stack.json")

    def make(self) -> None:
        """Make the folder for us alone, or check that it is ours.

        Raises
        ------
        InputError
            When it cannot be made, belongs to somebody else, or others may write in it.
        """
        try:
            for parent in reversed([above for above in self.path.parents if not above.exists()]):
                parent.mkdir(mode=0o755, exist_ok=True)  # under no umask one that others may write
            made = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
                made = True
            self._require_ours()
            if made or self.exists or not any(self.path.iterdir()):
                self.path.chmod(0o700)
            self.logs.mkdir(mode=0o700, exist_ok=True)
            self.logs.chmod(0o700)
            os.close(self._open_lock())
        except OSError as error:
            raise InputError(
                f"Cannot write in the folder {self.path}: {error.strerror}. Name a folder that you may write."
            ) from error

    def _require_ours(self) -> None:
        found = self.path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if found.st_uid != os.geteuid():
            raise InputError(
                f"The folder {self.path} belongs to {account(found.st_uid)}, and this is {account(os.geteuid())}: "
                "its owner could read and replace everything in it. Name a folder of your own."
            )
        if found.st_mode & 0o022:
            raise InputError(
                f"Other accounts may write in the folder {self.path} (mode {stat.S_IMODE(found.st_mode):04o}): they "
                f"could replace everything in it. Name another, or, if all in it is yours: "
                f"chmod go-w {shlex.quote(str(self.path))}"
            )
        for path in (self.client_path, self.path / "secrets.json", self.path / "stack.json", self.logs):
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_uid != os.geteuid():
                    raise InputError(
                        f"{path} belongs to {account(path.lstat().st_uid)}, and this is {account(os.geteuid())}. "
                        "Remove it if you do not know it, or name another folder."
                    )

    def _open_lock(self) -> int:
        """Open the lock file, which only we may open: who can open a file can lock it."""
        descriptor = os.open(self.path / "stack.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        return descriptor

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time change the stack; say who does when that takes long.

        Raises
        ------
        ServerError
            When another holds it for three minutes.
        """
        try:
            descriptor = self._open_lock()
        except OSError as error:
            raise InputError(f"Cannot write in the folder {self.path}: {error.strerror}.") from error
        with os.fdopen(descriptor, "r+") as handle:
            self._take(handle)
            handle.seek(0)
            handle.truncate()
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            handle.write(json.dumps(holder))
            handle.flush()
            try:
                yield
                handle.truncate(0)
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile holds it too

    def _take(self, handle: TextIO) -> None:
        began = time.monotonic()
        said = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - began
            except OSError as error:
                raise InputError(
                    f"The file system of {self.path} has no locks ({error.strerror}), so that two commands could "
                    "open one database at once. Name a folder on another one, such as a local disk."
                ) from error
            handle.seek(0)
            who = _holder(handle.read())
            if waited > self.waits.lock_s:
                raise ServerError(
                    f"{who} has held the lock of the stack in {self.path} for {waited:.0f} s. Wait for it, or end "
                    "it, and try again."
                )
            if waited > _LOCK_SAYS_S and not said:
                self.say(f"Waiting: {who} is at work on the stack in {self.path}.")
                said = True
            time.sleep(_POLL_S)

    def own(self, state: State, *, takeover: bool = False) -> Owner:
        """Become the stack's owner, or find that this host is.

        Parameters
        ----------
        state
            The record of what runs; what ran on another host is taken out of it.
        takeover
            Take the stack from another host without waiting for signs of life.

        Raises
        ------
        InputError
            When another host runs the stack.
        """
        host = socket.gethostname()
        if Claims(self.path).latest() is None and state.processes and state.host not in (None, host) and not takeover:
            raise InputError(  # a version that gave no signs of life started it
                f"The stack in {self.path} runs on {state.host}, and this is {host}. Use it there; or, when that "
                "machine is gone for good, start with `deephyper-balsam server up --takeover`."
            )
        self.owner = take(self.path, self.waits, self.say, takeover=takeover)
        if state.host not in (None, host):
            state.processes = {}
        return self.owner

    @property
    def elsewhere(self) -> str | None:
        """Where the stack was started and not stopped, if that is another host."""
        found = Claims(self.path).latest()
        is_elsewhere = found is not None and found[0].left_at is None and not found[0].is_here
        return found[0].where if found is not None and is_elsewhere else None

    def require_not_elsewhere(self) -> None:
        """See that the stack was not started on another host.

        Raises
        ------
        InputError
            When it was.
        """
        if self.elsewhere is not None:
            raise InputError(
                f"The stack in {self.path} runs on {self.elsewhere}, and this is {socket.gethostname()}. Do it there."
            )

    def require_own(self) -> None:
        """See that this host runs the stack.

        Raises
        ------
        InputError
            When it does not.
        """
        self.owner = require(self.path)

    def environment(self, **more: str) -> dict[str, str]:
        """The user's environment without what would disturb a server, and with the mark that `down` looks for."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("BALSAM_", "DEEPHYPER_BALSAM_", "PG"))
        }
        pass_proxies_by(kept)
        if self.owner is not None:
            kept[CLAIM_VARIABLE] = str(self.owner.number)
        return {**kept, "PYTHONUNBUFFERED": "1", MARK_VARIABLE: str(self.path), **more}


def _holder(text: str) -> str:
    """Return who holds the lock, from what its holder wrote into it."""
    try:
        data = json.loads(text)
        return f"process {int(data['pid'])} on {data['host']}, since {data['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"
