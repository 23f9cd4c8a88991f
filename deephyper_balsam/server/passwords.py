"""The passwords of a stack's accounts: drawn by us, never chosen by a person.

Each has 192 random bits, which nobody guesses at any speed. So the hash that the database keeps is bcrypt at its lowest
cost: at the usual one each login, and each guess of a stranger, would take a fifth of a second of a core.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from functools import cache
from typing import Any

_COST = 4
"""Of bcrypt; lower it does not take."""
_MADE_BY_US = f"$2b${_COST:02}$"


def draw() -> str:
    """Return a new password."""
    return secrets.token_urlsafe(24)


def hashed(password: str) -> str:
    """Return what the database keeps of a password; each time another text."""
    return str(_bcrypt().hash(password))


def matches(password: str, kept: str | None) -> bool:
    """Whether it is the password of which this was kept; it takes as long when nothing was kept.

    Parameters
    ----------
    password
        What was given.
    kept
        What `hashed` returned, here or in Balsam; None: nobody has such an account, or no password is good for it.
    """
    try:
        found = bool(_bcrypt().verify(password, kept or _nobodys()))
    except (ValueError, TypeError):  # a password that bcrypt does not take, such as one with a NUL character
        return False
    return found and bool(kept)


def is_ours(kept: str | None) -> bool:
    """Whether what was kept is of the cost that is used here."""
    return bool(kept) and str(kept).startswith(_MADE_BY_US)


def mark(kept: str, key: str) -> str:
    """Return what a token says of the password under which it was given.

    Parameters
    ----------
    kept
        What the database keeps of the password.
    key
        The server's secret, so that the mark tells nothing of what is kept.
    """
    return hmac.new(key.encode(), kept.encode(), hashlib.sha256).hexdigest()[:32]


@cache
def _bcrypt() -> Any:
    from passlib.hash import bcrypt

    return bcrypt.using(rounds=_COST, ident="2b")


@cache
def _nobodys() -> str:
    return hashed(draw())
