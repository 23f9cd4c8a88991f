"""Which version of the run function each trial was evaluated with, by the hash that its run left with its result."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from deephyper_balsam.common.wording import counted

logger = logging.getLogger(__name__)

_SHOWN = 4


class Versions:
    """The versions of a search's run function, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._trials: dict[str, list[int]] = {}

    def note(self, number: int, version: str | None) -> None:
        """Take in with which version a trial was evaluated; a new one is warned of."""
        if version is None:
            return
        known = version in self._trials
        self._trials.setdefault(version, []).append(number)
        if not known and len(self._trials) > 1:
            logger.warning("%s", self.notice)

    def note_now(self, version: str | None) -> None:
        """Take in which version the run function has now, before anything is evaluated with it."""
        if version is not None and self._trials and version not in self._trials:
            logger.warning(
                "The run function was changed (%s) since trials were evaluated with it (%s): objectives of both are "
                "mixed in this search from now on. To keep them apart, begin another search under a new name",
                version,
                ", ".join(self._trials),
            )

    @property
    def notice(self) -> str | None:
        """What a person should know, if there is something."""
        return said({version: len(numbers) for version, numbers in self._trials.items()})


def count(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many trials were evaluated with each version, from the lines of a search's table."""
    found: dict[str, int] = {}
    for line in lines:
        if line.get("m:code"):
            found[line["m:code"]] = found.get(line["m:code"], 0) + 1
    return found


def said(trials: Mapping[str, int]) -> str | None:
    """Return the words for a run function that was changed; `trials` says how many each version evaluated."""
    if len(trials) < 2:
        return None
    each = [f"{version} ({counted(number, 'trial')})" for version, number in trials.items()]
    more = "" if len(each) <= _SHOWN else f" and {len(each) - _SHOWN} more"
    return (
        f"the run function was changed during the search: {', '.join(each[:_SHOWN])}{more}; their objectives are mixed "
        "(column m:code of the results)"
    )
