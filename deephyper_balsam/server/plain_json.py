"""What Balsam's API takes, keeps and hands out: only values that PostgreSQL keeps and that every client can read.

Balsam's own writes a row first and makes its answer then. One value that JSON takes and that the answer cannot hold
(half of a surrogate pair, a number beyond 64 bits, lists within lists) so gives 500 for a row that is there, and 500
for every list that has it in, for good. Here such a request is refused before anything is written, and a row that
holds such a value all the same, written by another server, is handed out with the value escaped.
"""

from __future__ import annotations

import json
import re
from typing import Any

from deephyper_balsam.common.patching import patch

_MAY_BE_HUGE = re.compile(rb"\d{19}")
_DEEP_FROM = 100  # as many brackets as this can make no value that is too deep
_ROOM = 8  # levels that an answer puts around what a request sent
_MOST_LEVELS = 100  # of a value that is escaped
_TOO_DEEP = "(nested too deeply to be shown)"


class UnsayableError(ValueError):
    """A request holds a value that could be written, and never be read again."""


def read_request(content: bytes) -> Any:
    """Return the JSON value of a request's body.

    Raises
    ------
    UnsayableError
        When it holds what an answer cannot: the message says what.
    json.JSONDecodeError
        When it is no JSON at all.
    """
    import orjson

    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            json.loads(content)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):
            pass
        raise UnsayableError(
            f"The request holds a value that cannot be kept ({error}): text must be valid Unicode, numbers finite, and "
            "lists and objects not nested too deeply."
        ) from None
    if _MAY_BE_HUGE.search(content):  # orjson makes floats of such integers
        json.loads(content, parse_int=_within_64_bits)
    if content.count(b"[") + content.count(b"{") > _DEEP_FROM and _is_too_deep(value):
        raise UnsayableError("The request holds lists or objects that are nested too deeply.")
    return value


def read_column(text: str) -> Any:
    """Return a JSON value of the database, with what no answer can hold escaped."""
    import orjson

    try:
        value = orjson.loads(text)
    except ValueError:
        try:
            value = _escaped(json.loads(text))
        except RecursionError:
            return {"unreadable": _TOO_DEEP}
    if len(text) > 2 * _DEEP_FROM and text.count("[") + text.count("{") > _DEEP_FROM and _is_too_deep(value):
        value = _escaped(value)
    return value


def _within_64_bits(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**64:
        raise UnsayableError(f"The request holds the integer {text[:40]}: integers must fit into 64 bits.")
    return number


def _is_too_deep(value: Any) -> bool:
    import orjson

    for _ in range(_ROOM):
        value = [value]
    try:
        orjson.dumps(value)
    except TypeError:  # its recursion limit
        return True
    return False


def _escaped(value: Any, level: int = 0) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value) if abs(value) < 10**308 else str(value)
    if level >= _MOST_LEVELS and isinstance(value, (dict, list)):
        return _TOO_DEEP
    if isinstance(value, dict):
        return {_escaped(key): _escaped(entry, level + 1) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry, level + 1) for entry in value]
    return value


def keep_plain(app: Any, engine: Any) -> None:
    """Refuse what cannot be kept with 400 and the reason, before anything is written; read all that is there.

    Call it before the app's middleware is built, and hand `read_column` to the engine.
    """
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from sqlalchemy import event, exc

    async def read_json(request: Any) -> Any:
        try:
            return read_request(await request.body())
        except UnsayableError as error:
            raise HTTPException(400, str(error)) from error

    async def refused(_request: Any, error: Any) -> Any:
        return JSONResponse({"detail": _said(error)}, status_code=400)

    patch("starlette.requests.Request.json", "server.plain_json", lambda _: read_json)
    for kind in (exc.DataError, exc.IntegrityError):
        app.add_exception_handler(kind, refused)

    def say_what_it_is(context: Any) -> None:
        error = context.original_exception
        if isinstance(error, ValueError):  # psycopg2 sends no text with a NUL character in it
            raise exc.DataError(context.statement, None, error) from error

    event.listen(engine, "handle_error", say_what_it_is)
    event.listen(engine, "connect", _read_all_times)


def _said(error: Any) -> str:
    lines = str(error.orig).strip().splitlines()
    return f"The database cannot keep a value of this request: {lines[0] if lines else type(error.orig).__name__}"


def _read_all_times(connection: Any, _record: Any) -> None:
    """Read moments outside Python's calendar as its first or last; in psycopg2 they would be errors."""
    from datetime import datetime, timezone

    from psycopg2 import extensions

    def reader(known: Any, zone: Any) -> Any:
        def read(text: str | None, cursor: Any) -> Any:
            try:
                return known(text, cursor)
            except (ValueError, OverflowError):
                return (datetime.min if text and text.endswith("BC") else datetime.max).replace(tzinfo=zone)

        return read

    for number, known, zone in ((1114, extensions.PYDATETIME, None), (1184, extensions.PYDATETIMETZ, timezone.utc)):
        made = extensions.new_type((number,), f"ANY_TIME_{number}", reader(known, zone))
        extensions.register_type(made, connection)
