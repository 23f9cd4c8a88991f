"""What changed among the jobs of a search since the last look."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from deephyper_balsam import jobs
from deephyper_balsam.gateway import Gateway, Row

_OVERLAP_S = 10.0  # a look goes back this far: clocks differ, and a commit may land late


class Changes:
    """Reads the jobs of one search, each time those that changed lately, and knows which of them were noted before."""

    def __init__(self, gateway: Gateway, search: str) -> None:
        self._gateway, self._search = gateway, search
        self.begin_again()

    def begin_again(self) -> None:
        """Take everything for new at the next look."""
        self._since: str | None = None
        self._since_s = -math.inf
        self._noted: dict[int, tuple[str, float]] = {}  # job id -> last_update of what the next look may show again

    def read(self, everything: bool = False) -> list[Row]:
        """Return the jobs that changed since what was noted last, and a little before; or all."""
        since = None if everything else self._since
        return list(self._gateway.jobs(jobs.trial_tags(self._search), changed_since=since))

    def is_new(self, row: Row) -> bool:
        """Return whether a job has changed since it was noted."""
        return row["id"] not in self._noted or self._noted[row["id"]][0] != row["last_update"]

    def note(self, row: Row) -> None:
        """Say that a job was dealt with as it is."""
        updated_s = jobs.updated_at(row)
        self._noted[row["id"]] = row["last_update"], updated_s
        if updated_s - _OVERLAP_S > self._since_s:
            self._since_s = updated_s - _OVERLAP_S
            self._since = (datetime.fromisoformat(row["last_update"]) - timedelta(seconds=_OVERLAP_S)).isoformat()

    def forget_old(self) -> None:
        """Forget what no look will show again."""
        self._noted = {key: noted for key, noted in self._noted.items() if noted[1] >= self._since_s}
