"""The table of a search in memory: a line a trial, as in `results.csv`, and how many are in each state, and where."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from deephyper_balsam.trial import TrialState

Line = dict[str, Any]


class LiveTable:
    """Lines by trial number; a line has at least ``job_id``, ``job_status`` and ``m:site``."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}
        self._counts: Counter[tuple[str, TrialState]] = Counter()
        self._changed: dict[int, Line] = {}
        self._waiting: dict[str, set[int]] = defaultdict(set)  # site -> the numbers of the trials that wait there

    def clear(self) -> None:
        """Forget everything."""
        self._lines.clear()
        self._changed.clear()
        self._counts.clear()
        self._waiting.clear()

    def put(self, line: Line) -> None:
        """Take in a trial's line, in place of the one before."""
        before = self._lines.get(line["job_id"])
        if before is not None:
            self._counts[_key(before)] -= 1
            self._waiting[before["m:site"]].discard(line["job_id"])
        if line["job_status"] == TrialState.READY.value:
            self._waiting[line["m:site"]].add(line["job_id"])
        self._lines[line["job_id"]] = self._changed[line["job_id"]] = line
        self._counts[_key(line)] += 1

    def __getitem__(self, number: int) -> Line:
        return self._lines[number]

    def get(self, number: int) -> Line:
        """Return the line of a trial; an empty one for a trial that is not there."""
        return self._lines.get(number, {})

    def take_changed(self) -> list[Line]:
        """Return the lines that were taken in since the last call."""
        changed, self._changed = list(self._changed.values()), {}
        return changed

    @property
    def lines(self) -> list[Line]:
        """Return the lines by trial number."""
        return [self._lines[number] for number in sorted(self._lines)]

    def count(self, *states: TrialState, site: str | None = None) -> int:
        """Return how many trials are in one of `states`, at one site or everywhere."""
        return sum(
            number for (where, state), number in self._counts.items() if state in states and site in (None, where)
        )

    def waits_since(self, site: str) -> float | None:
        """Return when the first of the trials that wait at a site was submitted, as ``m:timestamp_submit`` has it."""
        lines = (self._lines[number] for number in self._waiting[site])
        return min((line["m:timestamp_submit"] for line in lines if line.get("m:timestamp_submit")), default=None)


def _key(line: Line) -> tuple[str, TrialState]:
    return line["m:site"], TrialState(line["job_status"])
