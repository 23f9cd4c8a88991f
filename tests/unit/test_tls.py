"""A server for other hosts and its client, as real connections: who is not the server gets nothing and is told why."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
import yaml

from deephyper_balsam.server import guard, tls_listener
from deephyper_balsam.server.addresses import listen
from deephyper_balsam.server.certificates import Certificates
from deephyper_balsam.store.client import StackClient

HERE = ["127.0.0.1", "localhost"]
Say = Callable[[str], None]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the token that came."""
    said = dict(scope["headers"]).get(b"authorization", b"").decode()
    body = json.dumps(said).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(certificates: Certificates) -> Iterator[int]:
    """Our server over TLS on a free port, which is yielded."""
    config = uvicorn.Config(app, log_level="critical", lifespan="off", http=guard.BoundedProtocol, ws="none")
    with listen("127.0.0.1", 0) as listener, socket.socket(socket.AF_UNIX) as own:
        own.bind(str(certificates.folder / "own"))
        own.listen()
        server = tls_listener.Server(config, (listener, tls_listener.tls_context(certificates)))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[own])))
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    made = Certificates(tmp_path / "tls")
    made.renew(HERE)
    return made


@contextmanager
def client(folder: Path, port: int, authority: Path, host: str = "127.0.0.1") -> Iterator[StackClient]:
    """A client of the server at a port, who trusts an authority."""
    path = folder / "client.yml"
    path.write_text(yaml.safe_dump({"api_root": f"https://{host}:{port}", "token": "secret"}))
    path.with_suffix(".ca.pem").write_bytes(authority.read_bytes())
    made = StackClient(f"https://{host}:{port}", "secret", datetime.now(timezone.utc) + timedelta(hours=8))
    made.credentials_path = path
    with made.session:
        yield made


def refused(made: StackClient) -> str:
    with pytest.raises(requests.ConnectionError) as told:
        made.session.get(f"{made.api_root}/users/me", timeout=5)
    return str(told.value)


def test_a_client_with_the_authority_is_served_and_keeps_its_connection(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/dev/null")
    with serving(certificates) as port, client(tmp_path, port, certificates.authority) as made:
        for _ in range(3):
            assert made.session.get(f"{made.api_root}/x", timeout=5).json() == "Bearer secret"
        pools = made.session.get_adapter(made.api_root).poolmanager.pools
        assert [pools[key].num_connections for key in list(pools.keys())] == [1]


def test_a_server_of_another_authority_gets_no_token(tmp_path: Path, certificates: Certificates) -> None:
    mine = Certificates(tmp_path / "mine")
    mine.renew(HERE)
    with serving(certificates) as port, client(tmp_path, port, mine.authority) as made:
        told = refused(made)
    assert "is not the server of this client.yml (its certificate is of another authority), so nothing was sent" in told


@pytest.mark.parametrize(
    ("days", "names", "message"),
    [
        (-40, HERE, r"has expired by the clock of this host .*server up"),
        (+1, HERE, r"is not valid yet by the clock of this host .*Z?.*set the clock of this host"),
        (0, ["login7"], r"its certificate is not for the name 127.0.0.1, so nothing was sent"),
    ],
)
def test_a_certificate_that_does_not_hold_is_told_with_what_to_do(
    tmp_path: Path, days: int, names: list[str], message: str
) -> None:
    made_by = Certificates(tmp_path / "tls")
    # The authority holds; only the server's certificate is of another day
    now = datetime.now(timezone.utc)
    made_by.renew(names, now - timedelta(days=50))
    made_by.chain.unlink()
    made_by.renew(names, now + timedelta(days=days))
    with serving(made_by) as port, client(tmp_path, port, made_by.authority) as made:
        assert re.search(message, refused(made))


def test_the_name_of_a_host_is_checked_too(tmp_path: Path) -> None:
    made_by = Certificates(tmp_path / "tls")
    made_by.renew(["login7"])
    with serving(made_by) as port, client(tmp_path, port, made_by.authority, "localhost") as made:
        assert "its certificate is not for the name localhost" in refused(made)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "by which the server is known, cannot be read (No such file"), ("x", "damaged")]
)
def test_without_the_authoritys_file_nothing_is_sent(
    tmp_path: Path, certificates: Certificates, text: str | None, message: str
) -> None:
    with serving(certificates) as port, client(tmp_path, port, certificates.authority) as made:
        path = tmp_path / "client.ca.pem"
        path.unlink() if text is None else path.write_text(text)
        assert message in refused(made)


def test_who_listens_without_tls_gets_no_token(tmp_path: Path, certificates: Certificates) -> None:
    got = bytearray()

    def stranger(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            got.extend(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=stranger, args=(listener,))
        thread.start()
        with client(tmp_path, listener.getsockname()[1], certificates.authority) as made:
            told = refused(made)
        thread.join(20)
    assert "does not speak TLS as our server does" in told
    assert b"secret" not in got


@pytest.mark.parametrize("root", ["http://127.0.0.1:80", "https://", "ftp://x", "127.0.0.1:443"])
def test_an_address_that_proves_nothing_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="speaks to https:// and"):
        StackClient(root)


def test_plain_http_to_the_port_is_told_to_use_https(certificates: Certificates) -> None:
    with serving(certificates) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/auth/password/login", body=b"x" * 100_000)
        answer = connection.getresponse()
        assert answer.status == 400
        assert b"speaks TLS alone. Use https://" in answer.read()
        connection.close()


def test_strangers_who_connect_and_say_nothing_keep_nobody_out(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_listener, "_HANDSHAKE_S", 0.5)
    monkeypatch.setattr(tls_listener, "_HANDSHAKES_AT_ONCE", 4)
    with serving(certificates) as port, client(tmp_path, port, certificates.authority) as made:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for one in half:
            one.sendall(b"\x16")
        try:
            assert made.session.get(f"{made.api_root}/x", timeout=10).status_code == 200
            for one in idle:
                one.settimeout(10)
                assert one.recv(1) == b"", "it was closed"
        finally:
            for one in (*idle, *half):
                one.close()


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    made_by = Certificates(tmp_path / "tls")
    made_by.renew(HERE, datetime.now(timezone.utc) - timedelta(days=25))
    context = tls_listener.tls_context(made_by)
    before = made_by.chain.read_bytes()
    tls_listener.keep_valid(context, made_by.folder, HERE, every_s=0.05)
    deadline = time.monotonic() + 20
    while made_by.chain.read_bytes() == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    ours, theirs = socket.socketpair()
    trusting = ssl.create_default_context(cafile=str(made_by.authority))
    with ours, theirs:
        thread = threading.Thread(target=lambda: context.wrap_socket(theirs, server_side=True).close())
        thread.start()
        with trusting.wrap_socket(ours, server_hostname="127.0.0.1") as wrapped:
            ends = ssl.cert_time_to_seconds(str((wrapped.getpeercert() or {})["notAfter"]))
        thread.join(20)
    assert ends > time.time() + 29 * 86400


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_host_whose_clock_is_off_is_told_so_and_works(
    tmp_path: Path,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hours: int,
) -> None:
    """The server's clock is moved here, and with it the Date of its answers; its certificate holds by both clocks."""
    off = (datetime.now(timezone.utc) + timedelta(hours=hours)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    monkeypatch.setattr(uvicorn.config.Config, "load", _with_date(uvicorn.config.Config.load, off))
    with serving(certificates) as port, client(tmp_path, port, certificates.authority) as made:
        for _ in range(3):
            assert made.session.get(f"{made.api_root}/x", timeout=5).json() == "Bearer secret"
        left = made._left()
    assert left is not None
    assert abs(left - timedelta(hours=8 - hours)) < timedelta(minutes=1), "a token's life is told by the server's clock"
    [told] = [record.getMessage() for record in caplog.records if "The clock of" in record.getMessage()]
    assert f"is 24.0 h {'behind' if hours > 0 else 'ahead of'} that of Balsam's server. Set it (NTP)" in told


def _with_date(load: Callable[[uvicorn.Config], None], date: str) -> Callable[[uvicorn.Config], None]:
    def loaded(config: uvicorn.Config) -> None:
        config.date_header = False
        config.headers = [("Date", date)]
        load(config)

    return loaded
