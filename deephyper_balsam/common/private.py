"""Files and folders that only their owner may read or write, made and checked whatever the umask is."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
import tempfile
from pathlib import Path

MAX_SOCKET_PATH_BYTES = 107
"""The kernel takes no longer path for a socket."""

_PREFIX = "dhb-"
_TRIES = 40
_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(OSError):
    """A file, folder or listener belongs to another account, or others may write there, so nothing was sent."""


def account(uid: int) -> str:
    """Return the name of an account for a message."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def require_own(path: str | Path, found: os.stat_result, what: str) -> None:
    """Check that a file or folder is ours and that nobody else may write there.

    Raises
    ------
    UntrustedError
        When it is not.
    """
    if found.st_uid != os.geteuid():
        owner, me = account(found.st_uid), account(os.geteuid())
        raise UntrustedError(errno.EPERM, f"{what} {path} belongs to {owner} and this is {me}, so nothing was sent")
    if found.st_mode & _WRITE_BY_OTHERS:
        raise UntrustedError(
            errno.EPERM,
            f"other accounts may write in {what} {path} (mode {stat.S_IMODE(found.st_mode):04o}), so nothing was sent",
        )


def private_folder(before: str | Path | None = None, room: int = 24) -> Path:
    """Return a new or kept folder that only we may enter, short enough that a socket in it has a legal path.

    Parameters
    ----------
    before
        The folder of the last time, which is made anew under its name when it was removed; another name is taken when
        it is not ours any more.
    room
        How many bytes the socket's name may have.
    """
    if before is not None:
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                os.mkdir(before, 0o700)
            require_private(Path(before))
            return Path(before)
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) + len(_PREFIX) + 10 + room > MAX_SOCKET_PATH_BYTES:
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))


def require_private(folder: Path) -> None:
    """Check that a folder is ours and that nobody else may even enter it.

    Raises
    ------
    UntrustedError
        When it is not.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise UntrustedError(errno.ENOTDIR, f"{folder} is no folder, so nothing was sent")
    require_own(folder, found, "the folder")
    if found.st_mode & 0o077:
        raise UntrustedError(
            errno.EPERM, f"other accounts may enter the folder {folder} (mode {stat.S_IMODE(found.st_mode):04o})"
        )


def open_at_once(name: str, flags: int) -> int:
    """Open as an `opener`, without following a link or waiting for whoever would write into a pipe of that name."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def open_own(path: str, flags: int) -> int:
    """Open a file as `open` asks its `opener`, but only one of ours, whatever another account planted under its name.

    A link of our own is followed, for example to a scratch disk. What somebody else put there, be it a link, a pipe or
    a file that he could read and change, is moved aside, and a file of ours made; where the folder does not let us,
    nothing is opened. Whose it is, is asked of what was opened, so that nobody can exchange it between two looks.

    Raises
    ------
    UntrustedError
        When it cannot be moved.
    """
    for _ in range(_TRIES):
        try:
            seen = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                return os.open(path, flags | (os.O_EXCL if flags & os.O_CREAT else 0) | os.O_NOFOLLOW, 0o666)
            continue
        try:
            found = os.fstat(seen)
            if found.st_uid in (os.geteuid(), 0):
                if not stat.S_ISLNK(found.st_mode):
                    return os.open(f"/proc/self/fd/{seen}", flags & ~(os.O_CREAT | os.O_EXCL))
                path = os.path.join(os.path.dirname(path), os.readlink("", dir_fd=seen))
                continue
        finally:
            os.close(seen)
        try:
            os.rename(path, f"{path}.{found.st_uid}")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UntrustedError(errno.EPERM, f"{path} is something that {account(found.st_uid)} put there") from error
    raise UntrustedError(errno.ELOOP, f"{path} is a link without end, or another account exchanges it again and again")


def write_private(path: Path, content: str | bytes) -> None:
    """Write a file that only its owner may read, under a temporary name, and rename it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content if isinstance(content, bytes) else content.encode())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
