"""The client's way to a server on another host: TLS that trusts the server's own authority alone.

The authority's certificate lies beside ``client.yml`` with the suffix ``.ca.pem``. Neither the system's authorities nor
the environment count, so nobody but the server of that file gets a token. What goes wrong is told with what to do.
"""

from __future__ import annotations

import ssl
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError, SSLError

SCHEME = "https"
AUTHORITY_SUFFIX = ".ca.pem"

_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64  # of OpenSSL's X509_V_ERR_*
_CLOCK = "If that is not the time, set the clock of this host."


def is_tls(url: str) -> bool:
    """Return whether a URL names a server that speaks TLS, at an address."""
    parts = urlsplit(url)
    return parts.scheme == SCHEME and bool(parts.hostname)


def authority_of(credentials: Path) -> Path:
    """Return where the authority's certificate of a credentials file is."""
    return credentials.with_suffix(AUTHORITY_SUFFIX)


class TlsAdapter(HTTPAdapter):
    """The way of `requests` to a TLS server whose authority is known.

    Parameters
    ----------
    authority
        The authority's certificate; it is read for each new connection.
    """

    def __init__(self, authority: Path) -> None:
        self._authority = authority
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Let the connections be ours."""
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {SCHEME: _Pool}

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        """Send a request, trusting our authority whatever the session says."""
        return super().send(request, *args, **{**options, "verify": str(self._authority), "proxies": {}, "cert": None})

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Set what a connection trusts; a file that is not there is told by the connection."""
        conn.cert_reqs, conn.ca_certs, conn.ca_cert_dir = "CERT_REQUIRED", str(verify), None


class RefusedError(NewConnectionError):
    """We do not connect, and this is why and what to do.

    Attributes
    ----------
    told
        One or two sentences for a person.
    """

    def __init__(self, connection: HTTPConnection, told: str) -> None:
        super().__init__(connection, told)
        self.told = told


class _Connection(HTTPSConnection):
    def connect(self) -> None:
        """Connect to a server of our authority.

        Raises
        ------
        RefusedError
            When it is not, or speaks no TLS; it says what to do.
        """
        try:
            super().connect()
        except (ssl.SSLError, SSLError) as error:
            within = error.args[0] if isinstance(error, SSLError) else error  # urllib3 wraps what it cannot read
            raise RefusedError(self, _told(within, self.host, self.port or 443, self.ca_certs)) from error


class _Pool(HTTPSConnectionPool):
    ConnectionCls = _Connection


def _told(error: object, host: str, port: int, authority: Any) -> str:
    """Return what is wrong and what to do, for an error of a handshake."""
    if not isinstance(error, ssl.SSLError):
        why = getattr(error, "strerror", error)
        return (
            f"{authority}, by which the server is known, cannot be read ({why}), so nothing was sent. It belongs "
            "beside client.yml: copy it from where client.yml is from"
        )
    there = f"{host}:{port}"
    if not isinstance(error, ssl.SSLCertVerificationError):
        if error.reason in ("NO_CERTIFICATE_OR_CRL_FOUND", "NO_START_LINE"):
            return f"{authority}, by which the server is known, is damaged: copy it again from where client.yml is from"
        return (
            f"what listens at {there} does not speak TLS as our server does ({error.reason or error}), so nothing was "
            "sent: another program may have taken its port; `deephyper-balsam server up` starts the server"
        )
    now = datetime.now(timezone.utc).isoformat(timespec="minutes")
    if error.verify_code == _EXPIRED:
        return (
            f"the certificate of the server at {there} has expired by the clock of this host ({now}), so nothing was "
            f"sent. {_CLOCK} Else run `deephyper-balsam server up` where the server runs: it renews the certificate"
        )
    if error.verify_code == _NOT_YET:
        return (
            f"the certificate of the server at {there} is not valid yet by the clock of this host ({now}), so nothing "
            f"was sent. {_CLOCK} Else set the clock of the server's host and run `deephyper-balsam server up` there"
        )
    if error.verify_code in (_OTHER_NAME, _OTHER_ADDRESS):
        return (
            f"the server at {there} is ours, but its certificate is not for the name {host}, so nothing was sent. Use "
            "the address in the client.yml that `deephyper-balsam server up` wrote, or let `server up --listen "
            f"{host}` listen there"
        )
    return (
        f"whoever listens at {there} is not the server of this client.yml (its certificate is of another authority), "
        "so nothing was sent. If the server was made anew, take its new client.yml, .key and .ca.pem; if not, tell "
        "whoever runs it"
    )
