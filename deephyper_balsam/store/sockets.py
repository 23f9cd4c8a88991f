"""A Unix socket that only its owner can reach, and a client that proves whose it is before it sends a byte.

A TCP port of a machine belongs to whoever takes it first; a socket in a private folder belongs to the folder's owner.
The server makes the folder with `private.private_folder`. A client connects with `connect`, which refuses a folder or
socket of another account, one that others may write, and a listener that runs as somebody else.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import socket
import stat
import struct
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from deephyper_balsam.common.private import UntrustedError, account, require_own, require_private

SCHEME = "http+unix"
PROVE_PATH = "/auth/prove"
_RETRY_S = 0.01


def url_of(path: str | Path) -> str:
    """Return the URL under which a client finds the socket at `path`."""
    return f"{SCHEME}://{quote(str(path), safe='')}"


def path_of(url: str) -> str | None:
    """Return the path of the socket that `url` names; None for another kind of URL."""
    parts = urlsplit(url)
    return unquote(parts.netloc) if parts.scheme == SCHEME else None


def listen(path: Path, backlog: int = 2048) -> socket.socket:
    """Return a socket that listens at `path`, in a folder of `private_folder`; what a crash left there is replaced."""
    require_private(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o600)  # nobody else can enter the folder, so no moment is missed before this
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str | Path, timeout_s: float | None = None) -> socket.socket:
    """Connect to the socket at `path` once it is proven that our own account made it, and listens.

    The folder and the socket must belong to us, and nobody else may write there; then the kernel says who listens. The
    last answer holds also against somebody who puts another folder in the place between two looks.

    Raises
    ------
    UntrustedError
        When folder, socket or listener are somebody else's.
    OSError
        When nobody listens.
    """
    path = Path(path)
    require_private(path.parent)
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise UntrustedError(errno.ENOTSOCK, f"{path} is no socket, so nothing was sent")
    require_own(path, found, "the socket")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect(made, str(path), timeout_s)
        owner = _listener(made)
        if owner is not None and owner != os.geteuid():
            raise UntrustedError(
                errno.EPERM, f"{account(owner)} listens at {path} and not {account(os.geteuid())}, so nothing was sent"
            )
    except BaseException:
        made.close()
        raise
    return made


def _connect(made: socket.socket, path: str, timeout_s: float | None) -> None:
    made.settimeout(timeout_s)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            made.connect(path)
            return
        except BlockingIOError:  # the server's queue of new connections is full
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"{path} takes no more connections: its queue is full") from None
            time.sleep(_RETRY_S)


def _listener(made: socket.socket) -> int | None:
    """Return the account of the process that listens, from the kernel; None where the kernel cannot tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", made.getsockopt(socket.SOL_SOCKET, option, size))[1])


class Connection(HTTPConnection):
    """HTTP to the server at a Unix socket of ours."""

    def __init__(self, path: str | Path, timeout_s: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self.path = path

    def connect(self) -> None:
        """Connect; see `connect` of the module."""
        self.sock = connect(self.path, self.timeout)


def proof(key: str, nonce: str) -> str:
    """Return what only a server that knows `key` can answer to `nonce`."""
    return hmac.new(key.encode(), f"deephyper_balsam server: {nonce}".encode(), hashlib.sha256).hexdigest()
