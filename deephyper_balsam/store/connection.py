"""The connection by which everything reaches a stack of ours: it proves whom it talks to, and renews its token itself.

Nothing of Balsam is imported here, which takes a second of processor time; what Balsam's own programs need beside it
stands in `client.py`. The kind of `api_root` chooses the way:
``http+unix://`` is a Unix socket of this machine (`sockets.py`), ``https://`` a server on any host (`tls.py`).

A token lives for hours. The account's name and password, which renew it, lie in a file beside ``client.yml`` with the
suffix ``.key``, of mode 0600.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests
import yaml
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from deephyper_balsam.common.private import UntrustedError, open_at_once, require_own, write_private
from deephyper_balsam.store import sockets, tls
from deephyper_balsam.store.client_files import KEY_SUFFIX, turn

logger = logging.getLogger(__name__)

_TURN_S = 30.0  # how long a login of another process is waited for

_RENEWALS = 3  # of one request

Timeout = float | tuple[float | None, float | None] | None
"""Seconds, as `requests` takes them: for the connection and for the answer."""

_POOL = 10
_RENEW_BELOW = timedelta(hours=4)
_OVER = timedelta(seconds=1)
_CLOCKS_AGREE = timedelta(minutes=5)


_LOGIN = "auth/password/login"


class StackConnection:
    """A connection to Balsam's API on a stack of one's own.

    Parameters
    ----------
    api_root
        ``http+unix://`` and the quoted path of the server's socket, or ``https://`` and its address.
    token, token_expiry
        What the credentials file holds.

    Raises
    ------
    ValueError
        When `api_root` is of a kind that would send the token without proof of who listens.
    """

    def __init__(
        self,
        api_root: str,
        token: str | None = None,
        token_expiry: datetime | None = None,
        connect_timeout: float = 6.2,
        read_timeout: float = 120.0,
        retry_count: int = 10,
    ) -> None:
        if not _is_safe(api_root):
            raise ValueError(
                f"api_root is {api_root!r}, and this client speaks to {tls.SCHEME}:// and {sockets.SCHEME}:// alone: "
                "anywhere else anybody could take the token. Let `deephyper-balsam server up` write the file anew."
            )
        self.api_root, self.connect_timeout, self.read_timeout = api_root, connect_timeout, read_timeout
        self.retry_count = retry_count
        self._session: requests.Session | None = None
        self._pid = os.getpid()
        self.token = token
        self.token_expiry = _naive_utc(token_expiry)
        self.expires_in = timedelta(hours=240)
        self._authenticated = True  # a token that has expired is renewed when it is used
        self.credentials_path: Path | None = None
        self._renew_below = _RENEW_BELOW
        self._ahead: timedelta | None = None  # the server's clock of ours
        self._renewing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one process: a spawned one makes its own."""
        return {**self.__dict__, "_session": None, "_renewing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of `__getstate__`."""
        self.__dict__.update(state, _renewing=threading.Lock())

    @property
    def session(self) -> requests.Session:
        """The session of this process; a forked child makes its own, which shares no connection."""
        pid = os.getpid()
        if self._session is None or pid != self._pid:
            self._pid = pid
            self._session = _Session(self)
            self._renewing = threading.Lock()
        return self._session

    @property
    def file(self) -> Path:
        """The credentials file; the key and the server's authority lie beside it."""
        if self.credentials_path is None:
            named = os.environ.get("BALSAM_CLIENT_PATH") or Path.home() / ".balsam" / "client.yml"
            self.credentials_path = Path(named).resolve()  # key and lock lie beside it
        return self.credentials_path

    def close_session(self) -> None:
        """Let go of the session; the next request makes another."""
        self._session = None

    def renew(self, used: str | None, *, wait: bool, timeout: Timeout = None) -> bool:
        """Replace the token `used`; return whether there is another now.

        One process at a time logs in, and all others read what it wrote.

        Parameters
        ----------
        used
            The token that was refused or is about to expire.
        wait
            Whether to wait for a process that is at it; if not, the token in use goes on.
        timeout
            How many seconds to wait for the server's answer, as for the request that needs the token.
        """
        with self._renewing:
            if self.token != used:
                return True  # another thread did it
            if self._read(used):
                return True
            with turn(self.file, _patience_s(timeout) if wait else None) as ours:
                if not ours:
                    return False
                return self._read(used) or self._log_in(timeout)

    def fresh(self, timeout: Timeout = None) -> None:
        """Renew a token that has less than four hours left; one that has expired, before anything else is done."""
        left = self._left()
        if left is None or left > max(self._renew_below, _OVER):
            return
        try:
            self.renew(self.token, wait=left <= _OVER, timeout=timeout)
        except (OSError, ValueError) as error:  # while the token lives, a server that is away is told by the request
            logger.debug("The token was not renewed: %s", error)
        # A server that gives shorter tokens, or refuses, is not asked at each request
        self._renew_below = min(_RENEW_BELOW, (self._left() or left) / 2)

    def _left(self) -> timedelta | None:
        return None if self.token_expiry is None else self.token_expiry - self._now()

    def _now(self) -> datetime:
        """Return the moment by the server's clock, as far as it is known: a host whose clock is wrong can work, too."""
        return _utc_now() + (self._ahead or timedelta())

    def compare_clocks(self, date: str | None) -> None:
        """Learn from the first answer how the server's clock differs, and tell when that is much.

        Parameters
        ----------
        date
            The answer's header of that name.
        """
        if self._ahead is not None or date is None:
            return
        try:
            self._ahead = parsedate_to_datetime(date) - datetime.now(timezone.utc)
        except (TypeError, ValueError):
            return
        if abs(self._ahead) > _CLOCKS_AGREE:
            hours = abs(self._ahead).total_seconds() / 3600
            logger.warning(
                "The clock of this host, %s, is %.1f h %s that of Balsam's server. Set it (NTP): times would be wrong.",
                socket.gethostname(),
                hours,
                "behind" if self._ahead > timedelta() else "ahead of",
            )

    def _read(self, used: str | None) -> bool:
        """Take what the file holds when it is another token or another address."""
        try:
            data = yaml.safe_load(self.file.read_text())
            root, token, expiry = str(data["api_root"]), data["token"], _naive_utc(data.get("token_expiry"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            return False
        if not _is_safe(root) or token in (None, used):
            return False
        if expiry is not None and expiry - self._now() < _OVER:
            return False
        self.api_root, self.token, self.token_expiry = root, token, expiry
        return True

    def _log_in(self, timeout: Timeout) -> bool:
        key = self.file.with_suffix(KEY_SUFFIX)
        try:
            with open(key, encoding="utf-8", opener=open_at_once) as file:
                require_own(key, os.fstat(file.fileno()), "the key file")
                account = json.load(file)
            form = {"username": account["username"], "password": account["password"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The token cannot be renewed: %s: %s", key, error)
            return False
        url = f"{self.api_root.rstrip('/')}/{_LOGIN}"
        answer = requests.Session.request(
            self.session, "POST", url, data=form, timeout=timeout or (self.connect_timeout, self.read_timeout)
        )
        self.compare_clocks(answer.headers.get("Date"))
        if answer.status_code != 200:
            logger.warning("The token cannot be renewed: the server answered %d to the login", answer.status_code)
            return False
        said = answer.json()
        self.token = str(said["access_token"])
        self.token_expiry = _naive_utc(datetime.fromisoformat(said["expiration"]))
        self._save()
        return True

    def _save(self) -> None:
        """Write the new token into the file, for all the others."""
        try:
            data = {**yaml.safe_load(self.file.read_text()), "token": self.token, "token_expiry": self.token_expiry}
            write_private(self.file, yaml.safe_dump(data, sort_keys=False, indent=4))
        except (OSError, TypeError, yaml.YAMLError) as error:  # each then logs in for itself
            logger.warning("The new token could not be written into %s: %s", self.file, error)


class _Session(requests.Session):
    """A session that gives each request the client's token of that moment, and repeats one that came too late.

    The environment counts for nothing here: no proxy stands before a socket, and ``.netrc`` would replace the token.
    """

    def __init__(self, client: StackConnection) -> None:
        super().__init__()
        self.trust_env = False
        self._client = client
        self.adapters.clear()  # nothing else is spoken, wherever an answer may send us
        self.mount(f"{sockets.SCHEME}://", _Adapter())
        self.mount(f"{tls.SCHEME}://", tls.TlsAdapter(tls.authority_of(client.file)))

    def request(self, method: Any, url: Any, *args: Any, **options: Any) -> requests.Response:
        """Make a request; see `requests.Session.request`."""
        client = self._client
        timeout = options.get("timeout")
        client.fresh(timeout)
        root, used = client.api_root, client.token
        try:
            response = self._send(method, url, args, options)
        except requests.ConnectionError:
            # The server may have come back under another address
            if not client._read(None) or client.api_root == root:
                raise
            return self._send(method, client.api_root + str(url)[len(root) :], args, options)
        for _ in range(_RENEWALS):  # what another process wrote may be refused, too: the server began anew meanwhile
            if response.status_code != 401 or not client.renew(used, wait=True, timeout=timeout):
                break
            response.close()
            used = client.token
            there = client.api_root.rstrip("/") + str(url)[len(root.rstrip("/")) :]
            response = self._send(method, there, args, options)
        return response

    def _send(self, method: Any, url: Any, args: Any, options: dict[str, Any]) -> requests.Response:
        headers = {**(options.get("headers") or {}), "Authorization": f"Bearer {self._client.token}"}
        response = super().request(method, url, *args, **{**options, "headers": headers})
        self._client.compare_clocks(response.headers.get("Date"))
        return response


class _Adapter(HTTPAdapter):
    """The way of `requests` to a Unix socket."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}
        super().__init__()

    def get_connection_with_tls_context(
        self, request: requests.PreparedRequest, verify: Any, proxies: Any = None, cert: Any = None
    ) -> HTTPConnectionPool:
        """Return the connections to the socket that the request's URL names."""
        path = sockets.path_of(request.url or "")
        assert path is not None, "mounted for another scheme"
        return self._pools.setdefault(path, _Pool(path))

    def request_url(self, request: requests.PreparedRequest, proxies: Any) -> str:
        """Return what stands in the request's first line."""
        return request.path_url

    def close(self) -> None:
        """Close the connections."""
        for pool in self._pools.values():
            pool.close()
        super().close()


class _Pool(HTTPConnectionPool):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", maxsize=_POOL)
        self.socket_path = path

    def _new_conn(self) -> _Connection:  # urllib3's own name for what a pool of another kind replaces
        self.num_connections += 1
        return _Connection(self.socket_path, self.timeout.connect_timeout)


class _Connection(HTTPConnection):
    def __init__(self, path: str, timeout: Any) -> None:
        super().__init__("localhost", timeout=timeout)
        self.socket_path = path

    def connect(self) -> None:
        """Connect to the socket once it is proven whose it is."""
        timeout = self.timeout if isinstance(self.timeout, (int, float)) else None
        try:
            self.sock = sockets.connect(self.socket_path, timeout)
        except OSError as error:
            raise tls.RefusedError(self, _told(self.socket_path, error)) from error


def _is_safe(root: str) -> bool:
    """Return whether an address is of a kind that proves who listens before anything is sent."""
    return sockets.path_of(root) is not None or tls.is_tls(root)


def _told(path: str, error: OSError) -> str:
    if isinstance(error, UntrustedError):
        return str(error.strerror)
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return f"no server listens there ({error.strerror}); `deephyper-balsam server up` starts it"
    return error.strerror or str(error)


def _patience_s(timeout: Timeout) -> float:
    """Return how long a request may wait for another process to log in."""
    longest = timeout[1] if isinstance(timeout, tuple) else timeout
    return _TURN_S if longest is None else min(longest, _TURN_S)


def _utc_now() -> datetime:
    return datetime.now(timezone.utc).replace(tzinfo=None)


def _naive_utc(moment: datetime | None) -> datetime | None:
    """Return a moment as Balsam writes it: UTC without saying so."""
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment is not None and moment.tzinfo else moment
