"""Wrong passwords wait, each name for itself; a token carries the mark of its password."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("passlib")

from deephyper_balsam.server import logins, passwords

GOOD = {"local": "right", "ann": "ann's own"}


class Door:
    """The logins of a server that knows two accounts; nobody sleeps, and how long they would have is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept: list[float] = []
        self.at_once = self.most_at_once = 0
        self.logins = logins.Logins(self._app)
        monkeypatch.setattr(logins.asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def _app(self, _scope: Any, receive: Any, send: Any) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        for _ in range(3):
            await real_sleep(0)
        message = await receive()
        assert not message["more_body"]
        given = [urlencode({"username": name, "password": word}).encode() for name, word in GOOD.items()]
        self.at_once -= 1
        await send({"type": "http.response.start", "status": 200 if message["body"] in given else 401})
        await send({"type": "http.response.body", "body": b"answer"})

    async def enter(self, name: str, password: str, client: tuple[str, int] | None = None, pieces: int = 1) -> int:
        body = urlencode({"username": name, "password": password}).encode()
        size = -(-len(body) // pieces)
        parts = [body[start : start + size] for start in range(0, len(body), size)]
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.logins({"type": "http", "client": client}, receive, send)
        assert sent[1]["body"] == b"answer"
        return int(sent[0]["status"])

    def try_in_turn(self, *attempts: tuple[str, str]) -> list[int]:
        async def all_of_them() -> list[int]:
            return [await self.enter(*one) for one in attempts]

        return asyncio.run(all_of_them())


real_sleep = asyncio.sleep


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    return Door(monkeypatch)


def test_a_wrong_password_waits_longer_each_time_and_a_good_one_forgets(door: Door) -> None:
    wrong, right = ("local", "guess"), ("local", "right")
    assert door.try_in_turn(*[wrong] * 6, right, wrong) == [401] * 6 + [200, 401]
    assert door.slept == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 0.25]


def test_guesses_for_one_name_delay_no_other_and_no_good_login(door: Door) -> None:
    door.try_in_turn(*[("local", "guess")] * 5)
    before = len(door.slept)
    assert door.try_in_turn(("ann", "ann's own"), ("ann", "mistyped"), ("local", "right")) == [200, 401, 200]
    assert door.slept[before:] == [0.25]


def test_what_is_kept_of_guesses_is_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "_NAMES", 10)
    door.try_in_turn(("local", "guess"), *[(f"name{number}" * 100, "x") for number in range(30)])
    assert len(door.logins._failures) == 10
    assert all(len(name) <= 100 for name in door.logins._failures)


def test_who_tried_is_logged_and_never_the_password(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asyncio.run(door.enter("local\nA login as 'x'", "hunter2", ("10.1.2.3", 4711), pieces=4))
        asyncio.run(door.enter("local", "hunter2"))
    assert "A login as \"local\\nA login as 'x'\" from 10.1.2.3, port 4711, failed, no. 1" in caplog.text
    assert "A login as 'local' from this host, by the private socket, failed" in caplog.text
    assert "hunter2" not in caplog.text
    assert len(caplog.records) == 2


def test_few_passwords_are_checked_at_once(door: Door) -> None:
    async def many() -> None:
        await asyncio.gather(*(door.enter("local", "guess") for _ in range(20)))

    asyncio.run(many())
    assert door.most_at_once == 2


def test_a_password_is_known_by_what_is_kept_of_it() -> None:
    password = passwords.draw()
    kept = passwords.hashed(password)
    assert len(password) >= 32
    assert passwords.hashed(password) != kept, "tokens of before would be good again"
    assert passwords.matches(password, kept)
    assert passwords.is_ours(kept)
    for wrong in (password + "x", "", "\0", "x" * 5000):
        assert not passwords.matches(wrong, kept), wrong
    for nothing in (None, ""):
        assert not passwords.matches(password, nothing)
        assert not passwords.is_ours(nothing)


def test_what_balsam_kept_of_a_password_is_read_and_known_as_of_another_cost() -> None:
    from passlib.hash import bcrypt

    kept = bcrypt.hash("secret")
    assert passwords.matches("secret", kept)
    assert not passwords.is_ours(kept)
    assert bcrypt.verify("secret", passwords.hashed("secret"))


def test_a_mark_tells_passwords_and_servers_apart() -> None:
    kept = passwords.hashed("secret")
    assert passwords.mark(kept, "key") == passwords.mark(kept, "key")
    assert len({passwords.mark(kept, "key"), passwords.mark(kept, "y"), passwords.mark(kept + "x", "key")}) == 3
