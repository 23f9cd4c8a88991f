"""Times and values as Balsam's API has them: ISO times, and parameters and return values as base64 of a pickle."""

from __future__ import annotations

import base64
import pickle
from datetime import datetime, timezone
from typing import Any

from deephyper_balsam.errors import BalsamError
from deephyper_balsam.store import values

_PLAIN = (str, int, float, bool, type(None))


def parse_time(text: str) -> float:
    """Seconds since the epoch of a time of the API; a time without zone is UTC."""
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def iso(moment: float) -> str:
    """Return seconds since the epoch as the API takes a time."""
    return datetime.fromtimestamp(moment, timezone.utc).isoformat()


def pack(value: Any) -> str:
    """Encode a job's parameters as Balsam does: base64 of what dill writes, which for plain values is a pickle."""
    if type(value) is dict and all(type(one) in _PLAIN for pair in value.items() for one in pair):
        return base64.b64encode(pickle.dumps(value)).decode()
    from balsam.schemas import serialize

    return str(serialize(value))


def unpack(text: str) -> Any:
    """Decode what Balsam encoded: parameters or a return value.

    Raises
    ------
    BalsamError
        When the text cannot be decoded, or holds more than plain values: what a server sends is never run here.
    """
    try:
        return values.read(text)
    except values.NotPlainError as error:
        raise BalsamError(f"A value from Balsam cannot be decoded here: {error}") from error


def unpack_error(text: str) -> str:
    """Return what an exception said that Balsam stored, without making one of its class.

    Raises
    ------
    BalsamError
        When the text cannot be decoded.
    """
    try:
        name, words = values.describe_error(text)
    except values.NotPlainError as error:
        raise BalsamError(f"An exception from Balsam cannot be decoded here: {error}") from error
    return f"{name}: {words}" if words else name
