"""What counts as an objective: a finite number, in whatever type it comes; and which way is better.

Every objective is maximised, as in DeepHyper: a search that minimises keeps minus what the run function returned. The
worker turns the sign, once. Tables and JSON have the loss beside it, and texts and figures show the loss.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

LOSS = "m:loss"
"""The column, beside ``objective``, of what the runs of a search that minimises returned."""


def objective_of(value: Any) -> float:
    """Return a number as a float: an int, a float, a Decimal or fraction, numpy's, or an array or tensor of one number.

    A bool is none: it is mostly a comparison that was left where a score was meant.

    Raises
    ------
    ValueError
        It is no finite number; the message says what was got, as the end of a sentence.
    """
    number = value
    if (hasattr(value, "item") and getattr(value, "size", 1) == 1) or hasattr(value, "numel"):
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            number = value.item()
    if number is None:
        raise ValueError("None instead of a number (is a `return` missing?)")
    if isinstance(number, str):
        raise ValueError(f"text instead of a number: {number!r}")
    if isinstance(number, bool) or not isinstance(number, (numbers.Real, Decimal)):
        raise ValueError(f"{type(number).__name__} instead of a number: {repr_of(number)}")
    try:
        found = float(number)
    except OverflowError:
        what = "an integer" if isinstance(number, int) else f"a {type(number).__name__}"
        raise ValueError(f"{what} too large for a float") from None
    except ValueError:  # a signalling NaN of decimal
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(str(found))
    return found


def repr_of(value: Any) -> str:
    """Return the repr of a value of the user's; where that raises, words that say so."""
    try:
        return repr(value)
    except (Exception, SystemExit) as error:
        return f"(its repr raises {type(error).__name__})"


def minimises(settings: Mapping[str, Any]) -> bool:
    """Return whether a search with these settings of its record minimises: by its problem, or its shell command."""
    problem, run = settings.get("problem") or {}, settings.get("run") or {}
    return bool(problem.get("minimize", False)) or command_minimises(run)


def command_minimises(spec: Any) -> bool:
    """Return whether the spec of what is run says ``maximize: false``, as that of a shell command can."""
    return isinstance(spec, Mapping) and spec.get("maximize") is False


def turned(objective: float, minimize: bool) -> float:
    """Return what is kept for what a run returned, or what a person is shown for what is kept: the same step."""
    return 0.0 - objective if minimize else objective  # 0 is no -0


def told(objective: float | None, minimize: bool) -> dict[str, Any]:
    """Return what JSON says of one trial: its objective, maximised; the direction; and the loss, if there is one."""
    loss = None if objective is None else turned(objective, True)
    return {"objective": objective, "minimize": minimize, **({"loss": loss} if minimize else {})}


def title(minimize: bool) -> str:
    """Return what people are told the number is."""
    return "objective (minimised)" if minimize else "objective"
