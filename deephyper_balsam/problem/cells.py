"""Values of hyperparameters as cells of a CSV, and back: what is read is what was written, in value and in type.

A configuration says that a hyperparameter is inactive by leaving it out; None is a value like any other. In a table the
cell of an inactive hyperparameter is empty, and None is the word ``None``. Numbers and bools are as Python writes them.
Text stands as it is, unless it would be read as something else (``1``, ``true``, ``None``, nothing at all): then it is
written as JSON writes it, in double quotes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from deephyper_balsam.errors import InputError

INACTIVE = ""
"""The cell of a hyperparameter that is inactive."""

_WORDS = {"None": None, "True": True, "False": False}
_INTEGER = re.compile(r"[+-]?[0-9]+")
# Words that pandas or a spreadsheet take for a missing value or a truth value; compared in lower case.
_MISSING = frozenset(
    ["none", "null", "nan", "-nan", "na", "n/a", "<na>", "#n/a", "#na", "#n/a n/a", "1.#ind", "-1.#ind", "1.#qnan"]
)
_TRUTHS = {"true": True, "false": False}
_MAX_DIGITS = 4000  # Python refuses to read whole numbers of more


def write_cell(value: Any) -> str:
    """Return the cell of a value: a str, a bool, a number or None."""
    if not isinstance(value, str):
        return repr(value) if isinstance(value, float) else str(value)
    return value if _is_plain(value) else json.dumps(value, ensure_ascii=not value.isprintable())


def read_cell(text: str) -> Any:
    """Return the value whose cell this is; an empty one is that of `INACTIVE`, and gives empty text."""
    if text in _WORDS:
        return _WORDS[text]
    if text.startswith('"'):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    if _INTEGER.fullmatch(text) and len(text) < _MAX_DIGITS:
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def read_choice(choices: Sequence[Any], text: str) -> Any:
    """Return the choice that a cell stands for, also where another program wrote it: ``1.0`` for True, ``2.0`` for "2".

    Raises
    ------
    InputError
        The cell stands for several of the choices, or for none.
    """
    value = read_cell(text)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    for found in _alike(choices, text, value):
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{text!r} could be each of {found!r}.")
    raise InputError(f"{text!r} is none of {list(choices)!r}.")


def _alike(choices: Sequence[Any], text: str, value: Any) -> list[list[Any]]:
    """Return the choices that a cell of another program may mean; the likeliest kind first."""
    numbers = [one for one in choices if isinstance(one, (int, float)) and not isinstance(one, bool)]
    bools = [one for one in choices if isinstance(one, bool)]
    texts = [one for one in choices if isinstance(one, str)]
    words, number = text.strip().lower(), _number(value)
    return [
        [one for one in texts if one == text],
        [one for one in numbers if number is not None and one == number],
        [one for one in bools if one is _TRUTHS.get(words) or (number is not None and one == number)],
        [one for one in choices if is_blank(text) and (one is None or one == "")],
        [one for one in texts if number is not None and _number(read_cell(one)) == number],
        [one for one in texts if words in _TRUTHS and one.lower() == words],
    ]


def is_blank(text: str) -> bool:
    """Return whether other programs write a missing value so."""
    return not text.strip() or text.strip().lower() in _MISSING


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _is_plain(text: str) -> bool:
    """Return whether text stands for itself in a cell, here and in pandas."""
    if not text.isprintable() or text != text.strip() or text.startswith('"'):
        return False
    if is_blank(text) or text.lower() in _TRUTHS:
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
