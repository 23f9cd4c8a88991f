"""Text from elsewhere (a run, a configuration, another person, Balsam) made fit to be shown.

A terminal obeys what it is sent: an escape sequence in an error message moves the cursor, changes the title or the
colours, or hides a line; a direction mark turns words around. What is shown has none of these, it shows how they are
written. Files for programs (CSV, JSON, Parquet) hold what was there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_KEPT = "\n\t\u200c\u200d"  # lines and columns; what joins letters of some scripts and parts of a picture
_PICTURES = 0x2400  # where Unicode has a picture for each of the first control characters
_NUMBER = re.compile(r"0x[0-9a-f]+|[-+]?[0-9]+(?:[.,_][0-9]+)*(?:\.?e[-+]?[0-9]+)?|[-+]?\b(?:nan|inf)\b", re.IGNORECASE)
_SAFE = re.compile(r"[ -~\n\t]*")


def printable(text: str) -> str:
    r"""Return a text in which what would not be printed stands as Python writes it: ``\x1b``, ``\u202e``."""
    if _SAFE.fullmatch(text) or text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in _KEPT else _escaped(one) for one in text)


def storable(text: str) -> str:
    """Return `text` with what Balsam's database cannot hold escaped: what is no UTF-8, and the character NUL.

    Balsam's API answers 500 for ever to a row with the first, and refuses the second.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def pictured(text: str) -> str:
    """Return a text for a figure: of the same length, a picture in the place of a control character."""
    if text.isprintable():
        return text
    return "".join(_picture(one) for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape", "surrogatepass").decode("ascii")


def _picture(one: str) -> str:
    if ord(one) < 0x20:
        return chr(_PICTURES + ord(one))
    if ord(one) == 0x7F:
        return "\u2421"
    return one if one.isprintable() or one in _KEPT else "\N{REPLACEMENT CHARACTER}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a count with what is counted: ``1 trial``, ``12 trials``, ``0 trials``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def without_numbers(message: str) -> str:
    """Return a message with a sign in the place of each number: those of one kind differ in nothing else."""
    return _NUMBER.sub("#", message)


def by_kind(messages: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return messages and how often each was said, by kind: an example of each and how often it was.

    Messages that differ only in their numbers are of one kind, and the example says so. The most frequent comes first.
    """
    kinds: dict[str, list[tuple[str, int]]] = {}
    for message, times in messages:
        kinds.setdefault(without_numbers(message), []).append((message, times))
    found = []
    for members in kinds.values():
        example = max(members, key=lambda entry: entry[1])[0]
        several = len({message for message, _ in members}) > 1
        found.append((f"{example} (also with other numbers)" if several else example, sum(n for _, n in members)))
    return sorted(found, key=lambda entry: -entry[1])
