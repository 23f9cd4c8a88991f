"""Logins: a token ends with the password under which it was given, and wrong passwords wait, each name for itself.

Balsam's own tokens live until their time is over, whatever becomes of the account. Ours carry a mark of the password
that was good when they were given. Whoever changes or takes away the password ends them all, and no clock counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from deephyper_balsam.common.patching import patch
from deephyper_balsam.server import passwords

logger = logging.getLogger("deephyper_balsam.server.logins")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MARK_CLAIM = "mark"
_AT_ONCE = 2
_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 4.0
_NAMES = 1000
_NAME_LENGTH = 100  # of the database's column


class Logins:
    """What stands before Balsam's route for logins.

    A good login waits for nobody's wrong ones. Failures are counted for each name, so that those of a stranger who
    guesses for one account delay the answers to no other.

    Parameters
    ----------
    app
        Balsam's app.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._turns: asyncio.Semaphore | None = None
        self._failures: OrderedDict[str, int] = OrderedDict()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one login; the whole body is read before it takes a turn, so that nobody holds one."""
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        held: list[Message] = []

        async def give() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Message) -> None:
            held.append(message)

        self._turns = self._turns or asyncio.Semaphore(_AT_ONCE)
        async with self._turns:
            await self._app(scope, give, keep)
        name = parse_qs(body.decode("latin-1")).get("username", [""])[0][:_NAME_LENGTH]
        if held and held[0].get("status") == 200:
            self._failures.pop(name, None)
        else:
            await self._hold_back(name, _peer(scope))
        for message in held:
            await send(message)

    async def _hold_back(self, name: str, peer: str) -> None:
        times = self._failures.pop(name, 0) + 1
        self._failures[name] = times
        if len(self._failures) > _NAMES:
            self._failures.popitem(last=False)
        delay_s = min(_FIRST_DELAY_S * 2 ** min(times - 1, 10), _MAX_DELAY_S)
        logger.warning(
            "A login as %a from %s failed, no. %d since the last good one; answered after %.2f s",
            name,
            peer,
            times,
            delay_s,
        )
        await asyncio.sleep(delay_s)


def _peer(scope: Message) -> str:
    client = scope.get("client")
    return f"{client[0]}, port {client[1]}," if client else "this host, by the private socket,"


def bind_tokens() -> None:
    """Check passwords by one look at the account, and let the token that is given carry the mark of its password."""
    from balsam.schemas import UserOut
    from balsam.server import settings
    from fastapi import HTTPException
    from sqlalchemy import text

    class Account(UserOut):  # type: ignore[misc]
        mark: str

    look = text("SELECT id, username, hashed_password FROM users WHERE username = :name")

    def authenticate(db: Any, username: str, password: str) -> Account:
        row = db.execute(look, {"name": username}).first()
        good = passwords.matches(password, None if row is None else row.hashed_password)
        if row is None or not good:
            raise HTTPException(401)
        mark = passwords.mark(row.hashed_password, settings.auth.secret_key)
        return Account(id=row.id, username=row.username, mark=mark)

    def marking(give: Callable[[Any], tuple[Any, Any]]) -> Callable[[Account], tuple[Any, Any]]:
        import jwt

        def create(user: Account) -> tuple[Any, Any]:
            token, expiry = give(user)
            claims = jwt.decode(token, options={"verify_signature": False})
            claims[MARK_CLAIM] = user.mark
            return jwt.encode(claims, settings.auth.secret_key, algorithm=settings.auth.algorithm), expiry

        return create

    where = "balsam.server.auth.password_login"
    patch(f"{where}.authenticate_user_password", "server.logins", lambda _: authenticate)
    patch(f"{where}.create_access_token", "server.logins", marking)
