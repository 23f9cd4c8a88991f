"""What changed among the jobs of a search since the last look."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from deephyper_balsam.store import trial_rows
from deephyper_balsam.store.encoding import iso
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.schema import check_schema
from deephyper_balsam.store.snapshots import read_rows

# A look goes back a little, for a commit may land late: a request that takes long has its rows changed before ours.
# Each look goes back far enough for small requests; one now and then for the largest.
_OVERLAP_S = 1.5
_PUT_BACK_S = 5.0  # how far the newest change may lie ahead of the server's clock before that clock was set back
_LONG_OVERLAP_S = 30.0
_LONG_LOOK_EVERY_S = 10.0


class ChangePoller:
    """Reads the jobs of one search, each time those that changed lately, and knows which of them were noted before.

    Parameters
    ----------
    own
        Whoever looks has made the jobs: on their way into the queue they tell it nothing, and only a look that goes far
        back asks for them.
    """

    def __init__(
        self, gateway: Gateway, search: str, clock: Callable[[], float] = time.monotonic, *, own: bool = False
    ) -> None:
        self._gateway, self._search, self._clock = gateway, search, clock
        self._asked_for = trial_rows.BEGUN_STATES if own else None
        self._last: str | None = None  # the newest `last_update` that was noted, in the server's own words
        self._last_s = -math.inf
        self._noted: dict[int, tuple[str, float]] = {}  # job id -> last_update of what the next look may show again
        self._offered: dict[int, Row] = {}
        self._long_look_at = -math.inf

    def read(self, everything: bool = False) -> list[Row]:
        """Return the jobs that changed since what was noted last, and a little before; or all."""
        if self._last is None or everything:
            found: Iterable[Row] = read_rows(self._gateway, self._search)
        else:
            now = self._clock()
            far = now - self._long_look_at >= _LONG_LOOK_EVERY_S
            overlap_s, states = (_LONG_OVERLAP_S, None) if far else (_OVERLAP_S, self._asked_for)
            since = (datetime.fromisoformat(self._newest()) - timedelta(seconds=overlap_s)).isoformat()
            found = list(self._gateway.jobs(trial_rows.trial_tags(self._search), changed_since=since, states=states))
            if far:  # not before: a look that failed is made again
                self._long_look_at = now
        rows = {row["id"]: row for row in found if trial_rows.is_trial(row)}
        for row in rows.values():
            check_schema(row)
        return list({**self._offered, **rows}.values())

    def _newest(self) -> str:
        """Return from where on to look: the newest change, or the server's now where its clock was put back since."""
        assert self._last is not None
        return iso(self._gateway.now() - _OVERLAP_S) if self._was_put_back() else self._last

    def _was_put_back(self) -> bool:
        return self._last_s - self._gateway.now() > _PUT_BACK_S

    def look_far(self) -> None:
        """Let the next look go far back, and ask for all jobs."""
        self._long_look_at = -math.inf

    def offer_again(self, rows: Iterable[Row]) -> None:
        """Take these for new at the next look: nobody has dealt with what they say."""
        self._offered = {row["id"]: row for row in rows}
        for job_id in self._offered:
            self._noted.pop(job_id, None)

    def is_new(self, row: Row) -> bool:
        """Return whether a job has changed since it was noted."""
        return row["id"] not in self._noted or self._noted[row["id"]][0] != row["last_update"]

    def note(self, row: Row) -> None:
        """Say that a job was dealt with as it is."""
        self._offered.pop(row["id"], None)
        updated_s = trial_rows.updated_at(row)
        self._noted[row["id"]] = row["last_update"], updated_s
        if updated_s > self._last_s:
            self._last, self._last_s = row["last_update"], updated_s

    def forget_old(self) -> None:
        """Forget what no look will show again."""
        newest_s = self._gateway.now() if self._was_put_back() else self._last_s
        horizon_s = newest_s - _LONG_OVERLAP_S
        self._noted = {key: noted for key, noted in self._noted.items() if noted[1] >= horizon_s}
