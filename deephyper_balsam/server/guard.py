"""What stands before Balsam's app in our server: bounds on what a client may send, and the proof of whose server it is.

Balsam's app takes bodies of any size, opens accounts to whoever asks, and lets passwords be guessed without a pause.
"""

from __future__ import annotations

import asyncio
import logging
import select
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deephyper_balsam.common.patching import missing, patch
from deephyper_balsam.server import passwords
from deephyper_balsam.server.logins import MARK_CLAIM, Logins
from deephyper_balsam.store.sockets import PROVE_PATH, proof

logger = logging.getLogger("deephyper_balsam.server.guard")

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

MAX_BODY_BYTES = 128 * 1024 * 1024
"""Of a client with a token. A thousand jobs with large parameters have some ten."""
MAX_STRANGERS_BODY_BYTES = 64 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 4000
_LOGIN_PATH = "/auth/password/login"
_CLOSED_PATHS = ("/auth/password/register", "/subscribe-user")
_HEADERS_WITHIN_S = 30.0
_BODY_WITHIN_S = 30.0
_CHANNEL = "deephyper_balsam_users"


def close_routes() -> None:
    """Take out what no client of ours uses: to open an account, and to follow events that nobody publishes."""

    def without_them(routes: list[Any]) -> list[Any]:
        for path in _CLOSED_PATHS:
            if all(getattr(route, "path", None) != path for route in routes):
                raise missing(f"route {path} of its API")
        return [route for route in routes if getattr(route, "path", None) not in _CLOSED_PATHS]

    patch("balsam.server.main.app.router.routes", "server.guard", without_them)


class Guard:
    """The ASGI app around Balsam's.

    Parameters
    ----------
    app
        Balsam's app.
    challenge_key
        With what the server proves that it is the one that was started.
    known
        Whether a token is one of this server's that lives: who has none may send little.
    """

    def __init__(self, app: App, challenge_key: str, known: Callable[[str], Awaitable[bool]]) -> None:
        self._app = app
        self._key = challenge_key
        self._known = known
        self._logins = Logins(app)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path == PROVE_PATH:
            nonce = parse_qs(scope["query_string"].decode("latin-1")).get("nonce", [""])[0]
            await _answer(send, 200, proof(self._key, nonce))
            return
        length = 0
        chunked = False
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = int(value) if value.isdigit() else 0
            elif name == b"transfer-encoding":
                chunked = True
        app = self._logins if path == _LOGIN_PATH else self._app
        try:
            if length or chunked:
                receive = await self._bounded(scope, receive, length)
            await app(scope, receive, send)
        except _RefusedError as error:
            logger.warning("A request was refused: %s", error.said)
            await _answer(send, error.status, error.said, close=True)

    async def _bounded(self, scope: Message, receive: Any, length: int) -> _Bounded:
        """Return what passes a body on, as large as its sender may send; a stranger's must come in time, too."""
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = header.decode("latin-1").partition(" ")
        known = kind.lower() == "bearer" and await self._known(token)
        body = _Bounded(receive, MAX_BODY_BYTES if known else MAX_STRANGERS_BODY_BYTES, known)
        body.count(length)
        return body


class _RefusedError(BaseException):
    """A body is too large or too late. FastAPI takes any `Exception` while it reads a body for a faulty one."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(status, said)
        self.status, self.said = status, said


class _Bounded:
    """Passes a body on until it is larger or later than was allowed."""

    def __init__(self, receive: Callable[[], Awaitable[Message]], bound: int, known: bool) -> None:
        self._receive, self._bound, self._known = receive, bound, known
        self._until = None if known else time.monotonic() + _BODY_WITHIN_S
        self._received = 0

    def count(self, received: int) -> None:
        """Refuse a body of which so much came, or will come, if that is too much."""
        if received > self._bound:
            what = "in one request" if self._known else "without a valid token"
            raise _RefusedError(413, f"The body has {received} bytes or more, and {self._bound} are allowed {what}.")

    async def __call__(self) -> Message:
        """Return the next part of it."""
        try:
            left_s = None if self._until is None else max(0.0, self._until - time.monotonic())
            message = await asyncio.wait_for(self._receive(), left_s)
        except asyncio.TimeoutError:
            raise _RefusedError(
                408, f"The body did not come within {_BODY_WITHIN_S:.0f} s, and there is no valid token."
            ) from None
        self._received += len(message.get("body", b""))
        self.count(self._received)
        if not message.get("more_body"):
            self._until = None
        return message


async def _answer(send: Any, status: int, text: str, *, close: bool = False) -> None:
    body = ('"' + text + '"').encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """uvicorn's protocol for a connection whose headers must come within half a minute and may not be endless."""

    _headers_bytes: int | None = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_HEADERS_WITHIN_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._headers_bytes is not None:
            self._headers_bytes += len(data)
        super().data_received(data)
        if self._headers_bytes is not None and self._headers_bytes > MAX_HEADER_BYTES:
            logger.warning("A request with more than %d bytes of headers was refused", MAX_HEADER_BYTES)
            self.send_400_response("The headers are too large.")
            self._headers_bytes = None

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._headers_bytes = self._headers_bytes or 0

    def on_headers_complete(self) -> None:
        """Count no more until the next request."""
        self._stop_waiting()
        self._headers_bytes = None
        super().on_headers_complete()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


class Users:
    """Which accounts there are, told by the database as soon as one is removed or changed.

    Nothing is asked for a request: a trigger notifies, and the event loop hears it before the next request's turn.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._connection: Any = None
        self._told = True

    def prepare(self) -> None:
        """Make the trigger."""
        from sqlalchemy import text

        with self._engine.begin() as connection:
            for statement in (
                "CREATE OR REPLACE FUNCTION tell_users() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN PERFORM pg_notify('{_CHANNEL}', ''); RETURN NULL; END $$",
                "DROP TRIGGER IF EXISTS tell_users ON users",
                "CREATE TRIGGER tell_users AFTER UPDATE OR DELETE OR TRUNCATE ON users "
                "FOR EACH STATEMENT EXECUTE FUNCTION tell_users()",
            ):
                connection.execute(text(statement))

    @property
    def quiet(self) -> bool:
        """Whether nothing was told since the last call of `changed`; for the event loop alone, and it costs nothing."""
        return not self._told

    def changed(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether an account may have changed since the last call; also when the database was away meanwhile.

        Parameters
        ----------
        loop
            Listens to the database from now on, so that `quiet` knows.
        """
        import psycopg2

        if not self._told:
            return False
        try:
            told = self._connection is None
            if told:
                self._connection = self._listen()
            else:
                self._connection.poll()
                told = bool(self._connection.notifies)
                self._connection.notifies.clear()
            loop.call_soon_threadsafe(self._hear, loop, self._connection)
        except (psycopg2.Error, OSError, ValueError):
            self._connection = None
            return True
        return told

    def _listen(self) -> Any:
        import psycopg2

        connection = psycopg2.connect(str(self._engine.url.render_as_string(hide_password=False)))
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"LISTEN {_CHANNEL}")
        return connection

    def _hear(self, loop: asyncio.AbstractEventLoop, connection: Any) -> None:
        """Let the event loop tell when the database says something, or goes."""
        if connection is not self._connection or not self._told:
            return
        if select.select([connection], [], [], 0)[0]:  # it was told something since it was asked
            return
        descriptor = connection.fileno()

        def hear() -> None:
            self._told = True
            loop.remove_reader(descriptor)

        loop.add_reader(descriptor, hear)
        self._told = False

    def kept(self, user_id: int, username: str) -> str | None:
        """Return what is kept of an account's password; None when there is no such account, or no password is good."""
        from sqlalchemy import text

        with self._engine.connect() as connection:
            statement = text("SELECT hashed_password FROM users WHERE id = :id AND username = :name")
            row = connection.execute(statement, {"id": user_id, "name": username}).first()
            return None if row is None else row.hashed_password

    def ensure(self, username: str, password: str) -> None:
        """Make the account with this password, or give the account that there is this password."""
        from sqlalchemy import text

        with self._engine.begin() as connection:
            row = connection.execute(
                text("SELECT hashed_password FROM users WHERE username = :name"), {"name": username}
            ).first()
            if row is not None and passwords.is_ours(row[0]) and passwords.matches(password, row[0]):
                return
            connection.execute(
                text(
                    "INSERT INTO users (username, hashed_password) VALUES (:name, :hash) "
                    "ON CONFLICT (username) DO UPDATE SET hashed_password = excluded.hashed_password"
                ),
                {"name": username, "hash": passwords.hashed(password)},
            )


class Tokens:
    """Whose a token is: read once, until it expires or accounts change."""

    def __init__(self, engine: Any) -> None:
        self.users = Users(engine)
        self._known: dict[str, tuple[float, Any]] = {}
        self._looking = threading.Lock()

    async def user(self, token: str) -> Any:
        """Return the account of a token, as Balsam's `user_from_token` does and refusing what it refuses.

        Raises
        ------
        HTTPException
            401, when it is no token of this server, has expired, its account is no more, or it was given under another
            password than the account has now.
        """
        expiry, who = self._known.get(token, (0.0, None))
        if expiry > time.time() and self.users.quiet:
            return who
        import anyio

        loop = asyncio.get_running_loop()
        return await anyio.to_thread.run_sync(
            self._look_up, token, loop
        )  # others are served while the database answers

    def _look_up(self, token: str, loop: asyncio.AbstractEventLoop) -> Any:
        with self._looking:
            if self.users.changed(loop):
                self._known = {}
            expiry, who = self._known.get(token, (0.0, None))
            return who if expiry > time.time() else self._read(token)

    def _read(self, token: str) -> Any:
        import jwt
        from balsam.server import settings
        from balsam.server.auth.token import user_from_token
        from fastapi import HTTPException

        who = user_from_token(token)
        key = settings.auth.secret_key
        claims = jwt.decode(token, key, algorithms=[settings.auth.algorithm])
        kept = self.users.kept(who.id, who.username)
        if not kept or claims.get(MARK_CLAIM) != passwords.mark(kept, key):
            raise HTTPException(401, "Could not validate credentials", {"WWW-Authenticate": "Bearer"})
        now = time.time()
        self._known = {one: kept for one, kept in self._known.items() if kept[0] > now}
        self._known[token] = float(claims["exp"]), who
        return who

    async def accepts(self, token: str) -> bool:
        """Whether a token is one that `user` takes."""
        from fastapi import HTTPException

        try:
            await self.user(token)
        except HTTPException:
            return False
        return True
