"""Bounds on what a client may send to our server, with small numbers: a real uvicorn, a stand-in for Balsam's app."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
import uvicorn

from deephyper_balsam.server import guard, logins
from deephyper_balsam.store.sockets import PROVE_PATH, proof

KEY = "key"
TOKEN = "good"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, as FastAPI does, and tell how long it was; only one password is right."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    status = 401 if scope["path"] == "/auth/password/login" and size != 5 else 200
    body = str(size).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def known(token: str) -> bool:
    return token == TOKEN


class Served:
    """The guarded app at a socket, as `server/api.py` serves it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(100)
        config = uvicorn.Config(
            guard.Guard(app, KEY, known),
            log_level="warning",
            http=guard.BoundedProtocol,
            ws="none",
            lifespan="off",
            limit_concurrency=guard.MAX_CONNECTIONS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(30)
        made.connect(self.path)
        return made

    def ask(self, text: bytes) -> bytes:
        with self.connect() as made:
            made.sendall(text)
            return until_closed_or_whole(made)


def until_closed_or_whole(made: socket.socket) -> bytes:
    """Return what comes until the server closes the connection, or an answer with its body is there."""
    found = b""
    while True:
        try:
            part = made.recv(65536)
        except ConnectionResetError:
            return found
        found += part
        head, end, body = found.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not part or (end and lengths and len(body) >= int(lengths[0].split(b":")[1])):
            return found


def request(path: str = "/", body: bytes = b"", method: str = "GET", **headers: str) -> bytes:
    given = {"Host": "x", **({"Content-Length": str(len(body))} if body else {}), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split()[1])


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name, value in {
        "MAX_CONNECTIONS": 5,
        "_HEADERS_WITHIN_S": 1.0,
        "MAX_HEADER_BYTES": 2000,
        "MAX_STRANGERS_BODY_BYTES": 100,
        "MAX_BODY_BYTES": 1000,
    }.items():
        monkeypatch.setattr(guard, name, value)
    monkeypatch.setattr(logins, "_FIRST_DELAY_S", 0.0)
    made = Served(tmp_path / "s")
    yield made
    made.close()


def test_more_connections_than_are_allowed_are_refused_until_some_close(served: Served) -> None:
    idle = [served.connect() for _ in range(4)]
    for one in idle:  # each is one that the server has taken: it answers, and is kept open
        one.sendall(request())
        assert status(until_closed_or_whole(one)) == 200
    beyond = [served.connect() for _ in range(3)]
    assert status(served.ask(request())) == 503
    idle[0].sendall(request())
    assert status(until_closed_or_whole(idle[0])) in (200, 503)
    for one in [*idle, *beyond]:
        one.close()
    deadline = time.monotonic() + 30
    while status(served.ask(request())) != 200:
        assert time.monotonic() < deadline, "connections that were closed still count"


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: y\r\n"], ids=["nothing", "a line", "a header"]
)
def test_a_connection_whose_headers_do_not_come_is_closed(served: Served, sent: bytes) -> None:
    with served.connect() as made:
        made.sendall(sent)
        assert made.recv(1000) == b""  # it ends, without an answer, or the time-out of this test is over
    assert status(served.ask(request())) == 200


def test_headers_that_come_drop_by_drop_gain_no_time(served: Served) -> None:
    with served.connect() as made:
        made.sendall(b"GET / HTTP/1.1\r\n")
        made.settimeout(0.05)
        deadline = time.monotonic() + 30
        while True:
            try:
                made.sendall(b"X: y\r\n")
                if made.recv(1000) == b"":
                    break
            except TimeoutError:
                assert time.monotonic() < deadline, "it is open still"
            except OSError:
                break


def test_a_request_whose_headers_are_whole_may_take_its_time(served: Served) -> None:
    with served.connect() as made:
        made.sendall(request(method="POST", **{"Content-Length": "4"}))
        time.sleep(1.5)  # longer than its headers may take
        made.sendall(b"abcd")
        answer = until_closed_or_whole(made)
    assert status(answer) == 200
    assert answer.endswith(b"4")


def test_endless_headers_are_refused_and_the_next_request_is_not(served: Served) -> None:
    assert status(served.ask(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000)) == 400
    with served.connect() as made:
        for _ in range(5):  # what was counted for one request does not count for the next
            made.sendall(request(X="y" * 1500))
            assert status(until_closed_or_whole(made)) == 200


@pytest.mark.parametrize(
    ("size", "token", "expected"),
    [(100, None, 200), (101, None, 413), (101, "bad", 413), (101, TOKEN, 200), (1000, TOKEN, 200), (1001, TOKEN, 413)],
)
def test_a_body_is_bounded_by_who_sends_it(served: Served, size: int, token: str | None, expected: int) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    answer = served.ask(request(body=b"x" * size, method="POST", **headers))
    assert status(answer) == expected
    assert expected != 413 or b"are allowed" in answer


def test_a_body_in_chunks_is_counted_as_it_comes(served: Served) -> None:
    chunk = b"32\r\n" + b"x" * 0x32 + b"\r\n"
    head = request(method="POST", **{"Transfer-Encoding": "chunked"})
    assert status(served.ask(head + chunk * 2 + b"0\r\n\r\n")) == 200
    assert status(served.ask(head + chunk * 20 + b"0\r\n\r\n")) == 413


def test_a_stranger_whose_body_does_not_come_is_refused_in_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_BODY_WITHIN_S", 0.5)
    for path in ("/", "/auth/password/login"):
        stalled = [served.connect() for _ in range(3)]
        for one in stalled:
            one.sendall(request(path, method="POST", **{"Content-Length": "5"}))
        assert status(served.ask(request("/auth/password/login", b"right", "POST"))) == 200, "they hold no turn"
        for one in stalled:
            answer = until_closed_or_whole(one)
            assert status(answer) == 408
            assert b"did not come within" in answer
            one.close()


def test_it_proves_whose_server_it_is(served: Served) -> None:
    answer = served.ask(request(f"{PROVE_PATH}?nonce=n"))
    assert proof(KEY, "n").encode() in answer
    assert proof("another", "n").encode() not in answer


@pytest.mark.parametrize("declared", [True, False], ids=["with its length", "in chunks"])
def test_who_has_a_token_fills_no_memory_either(declared: bool) -> None:
    """The real bound: what says that it is larger is refused unread, and what does not is read no further than that."""
    chunk = b"x" * 2**20
    taken: list[int] = []
    sent: list[Any] = []

    async def receive() -> Any:
        taken.append(len(chunk))
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    size = b"%d" % (guard.MAX_BODY_BYTES + 1)
    length = (b"content-length", size) if declared else (b"transfer-encoding", b"chunked")
    headers = [(b"authorization", b"Bearer " + TOKEN.encode()), length]
    scope = {"type": "http", "path": "/jobs/", "query_string": b"", "headers": headers}
    asyncio.run(guard.Guard(app, KEY, known)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert sum(taken) == (0 if declared else guard.MAX_BODY_BYTES + len(chunk))


def test_others_are_served_while_the_database_is_asked_for_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = guard.Tokens(engine=None)
    monkeypatch.setattr(tokens, "users", type("Users", (), {"quiet": False, "changed": lambda self, loop: True})())

    def read(token: str) -> str:
        time.sleep(1)
        return f"who has {token}"

    monkeypatch.setattr(tokens, "_read", read)

    async def serve() -> tuple[Any, int]:
        asked = asyncio.ensure_future(tokens.user("x"))
        served = 0
        while not asked.done():
            await asyncio.sleep(0.01)
            served += 1
        return await asked, served

    who, served = asyncio.run(serve())
    assert who == "who has x"
    assert served > 10


class Database:
    """A connection to PostgreSQL that notifies."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.notifies: list[str] = []

    def fileno(self) -> int:
        return self.ours.fileno()

    def notify(self) -> None:
        self.theirs.sendall(b"n")

    def poll(self) -> None:
        got = self.ours.recv(100, socket.MSG_DONTWAIT)
        if not got:
            raise OSError("the server closed the connection")
        self.notifies += ["told"] * len(got)


def test_what_the_database_tells_of_accounts_is_heard_before_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes together with it, as uvicorn takes one: what arrives makes a task."""
    made = [Database(), Database()]
    connections = iter(made)
    users = guard.Users(engine=None)
    monkeypatch.setattr(users, "_listen", lambda: next(connections))

    async def live() -> None:
        loop = asyncio.get_running_loop()

        async def request() -> bool:
            client, server = socket.socketpair()
            answer = loop.create_future()

            tasks = []

            async def serve() -> None:
                answer.set_result(users.quiet)

            def arrive() -> None:
                loop.remove_reader(server)
                tasks.append(loop.create_task(serve()))

            with client, server:
                loop.add_reader(server, arrive)
                client.sendall(b"GET")
                return bool(await answer)

        async def look() -> bool:
            found = await asyncio.to_thread(users.changed, loop)
            await asyncio.sleep(0)
            return found

        assert not users.quiet
        assert await look(), "nothing is known before the first look"
        for _ in range(3):
            assert users.quiet
            assert not await look()
        for times in (1, 2):
            for _ in range(times):
                made[0].notify()
            assert not await request()
            assert await look()
            assert users.quiet
        made[0].theirs.close()  # the database is started again
        assert not await request()
        assert await look()
        assert not users.quiet, "nobody listens any more"
        assert await look()
        assert users.quiet
        made[1].notify()
        assert not await request()

    asyncio.run(live())


def test_what_is_told_while_nobody_listens_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database()
    users = guard.Users(engine=None)
    monkeypatch.setattr(users, "_listen", lambda: database)

    async def live() -> None:
        loop = asyncio.get_running_loop()
        users.changed(loop)
        database.notify()  # between the look and the turn of the loop in which it begins to listen
        await asyncio.sleep(0)
        assert not users.quiet
        assert users.changed(loop)
        await asyncio.sleep(0)
        assert users.quiet

    asyncio.run(live())
