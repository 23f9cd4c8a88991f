"""Allocations that carry the driver of their search, one after the other.

A BatchJob whose optional parameter ``search`` names a search runs that search's driver beside its launcher: the site's
job template starts `launcher.inside` for it. Its parameter ``chain`` says how many such BatchJobs may
follow. Each is asked for by the one before it, so that an allocation that fails at once is followed by none.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from deephyper_balsam.common.clock import steady
from deephyper_balsam.errors import BalsamError, NotLoggedInError
from deephyper_balsam.store import trial_data
from deephyper_balsam.store.driver_requests import STOP, read_requests
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.trial_rows import trial_tags

logger = logging.getLogger(__name__)

SEARCH, CHAIN = "search", "chain"
"""The optional parameters of a BatchJob, which a site's settings must allow and its job template must know."""

WAITING = ("pending_submission", "queued")
ALIVE = (*WAITING, "running")

FRUITLESS = 2
"""When so many allocations in a row brought no result, none follows."""

_LOOK_S = 5.0
_LEAST_AHEAD_S = 10.0  # an agent looks for new BatchJobs each few seconds
_SELDOM_S = 60.0


def batch_job(
    site_id: int, search: str, *, nodes: int, wall_time_min: int, queue: str, project: str, job_mode: str, chain: int
) -> dict[str, Any]:
    """Return the BatchJob, for Balsam's API, that runs a search with its driver and lets `chain` others follow."""
    return {
        "site_id": site_id,
        "num_nodes": nodes,
        "wall_time_min": wall_time_min,
        "queue": queue,
        "project": project,
        "job_mode": job_mode,
        "optional_params": {SEARCH: search, CHAIN: str(chain)},
        "filter_tags": trial_tags(search),
    }


def find(gateway: Gateway, site_ids: Iterable[int], search: str, states: Sequence[str] | None = None) -> list[Row]:
    """Return the BatchJobs that carry the driver of a search, the oldest first."""
    rows = gateway.batch_jobs(site_ids, states)
    return sorted((row for row in rows if row["optional_params"].get(SEARCH) == search), key=lambda row: int(row["id"]))


def withdraw(gateway: Gateway, site_ids: Iterable[int], search: str) -> list[int]:
    """Take the BatchJobs that carry the driver of a search, and have not begun, out of the queue; their ids."""
    waiting = [int(row["id"]) for row in find(gateway, site_ids, search, WAITING)]
    for batch_job_id in waiting:
        gateway.end_batch_job(batch_job_id)
    return waiting


class Link:
    """One allocation of a chain, seen from inside: it finds its own BatchJob, and asks for the next one in time.

    Parameters
    ----------
    scheduler_id
        The scheduler's id of this allocation.
    chain
        How many allocations may follow.
    drain_s
        How many seconds before the end its driver leaves.
    clock
        For durations.
    now
        The time (epoch) by the server's clock; by default what its last answer told.

    Attributes
    ----------
    next_id
        The BatchJob that follows, or None.
    """

    def __init__(
        self,
        gateway: Gateway,
        site_id: int,
        search: str,
        scheduler_id: int,
        chain: int,
        drain_s: float,
        clock: Callable[[], float] = steady,
        now: Callable[[], float] | None = None,
    ) -> None:
        self._gateway, self._site_id, self._search = gateway, site_id, search
        self._scheduler_id, self._chain, self._drain_s, self._clock = scheduler_id, chain, drain_s, clock
        self._began, self._now = clock(), now or gateway.now
        self._look_at = -1e9
        self._row: Row | None = None
        self.next_id: int | None = None
        self._barren = False

    def look(self, left_s: float) -> None:
        """Ask for the next allocation if it is time to; call it as often as you like.

        It is asked for as long before this one's driver leaves as this one waited in the queue.
        """
        if not self._chain or self._clock() < self._look_at:
            return
        try:
            row = self._own()
            if row is not None and left_s <= self._drain_s + max(self._waited_s(row), _LEAST_AHEAD_S):
                self.ask()
        except BalsamError as error:
            logger.warning("The next allocation could not be asked for yet: %s", error)
            if isinstance(error, NotLoggedInError):
                with contextlib.suppress(NotLoggedInError):
                    self._gateway.reconnect()  # after a `balsam login` elsewhere
        self._look_at = self._clock() + (_LOOK_S if self.next_id is None and not self._barren else _SELDOM_S)

    def ask(self) -> None:
        """Ask for the next allocation, unless there is one, none may follow, or the last ones were of no use.

        Raises
        ------
        BalsamError
            When Balsam refuses or does not answer; call it again.
        """
        if self.next_id is not None:
            self._forget_refused()
        row = self._own() if self._chain and self.next_id is None else None
        if row is None or self.stopped():
            return
        for later in find(self._gateway, [self._site_id], self._search, ALIVE):
            if later["id"] > row["id"]:  # the answer was lost, or somebody submitted one
                self.next_id = int(later["id"])
                return
        barren_before, self._barren = self._barren, self._is_barren(row)
        if self._barren:
            if not barren_before:
                logger.warning("The last %d allocations brought no result: none follows until one does", FRUITLESS)
            return
        shape = {key: row[key] for key in ("wall_time_min", "queue", "project", "job_mode")}
        following = batch_job(self._site_id, self._search, nodes=row["num_nodes"], chain=self._chain - 1, **shape)
        following["optional_params"] = {**row["optional_params"], **following["optional_params"]}
        self.next_id = int(self._gateway.create_batch_job(following)["id"])
        logger.info("Asked for the next allocation, BatchJob %d; %d more may follow", self.next_id, self._chain - 1)

    def stopped(self) -> bool:
        """Return whether somebody stopped the search after this allocation was submitted.

        Raises
        ------
        BalsamError
            When Balsam does not answer.
        """
        row = self._own()
        since = self._began_at if row is None else _told(row, self._began_at)
        requests = read_requests(self._gateway, self._search)
        return any(request.what == STOP and request.given_at >= since for request in requests)

    def end(self) -> None:
        """Say that the search needs no more allocations: the next one is given back."""
        if self.next_id is not None:
            self._gateway.end_batch_job(self.next_id)
            logger.info("BatchJob %d is not needed any more", self.next_id)

    def _forget_refused(self) -> None:
        """Look whether the scheduler refused the next one, for example because its queue was full: then ask again.

        One whose script failed at once is in the same state, but nobody noted an error: it is not asked for again.
        """
        for row in find(self._gateway, [self._site_id], self._search, ["submit_failed"]):
            error = (row["status_info"] or {}).get("error")
            if row["id"] == self.next_id and error:
                logger.warning("The next allocation, BatchJob %d, was refused: %s", row["id"], error)
                self.next_id = None

    def _own(self) -> Row | None:
        """Return this allocation's BatchJob; the agent tells Balsam its scheduler's id only after it was submitted."""
        if self._row is None:
            rows = find(self._gateway, [self._site_id], self._search, ALIVE)
            own = [row for row in rows if row["scheduler_id"] == self._scheduler_id]
            self._row = own[-1] if own else None
        return self._row

    @property
    def _began_at(self) -> float:
        """When this allocation began, by the server's clock as its last answer told it."""
        return self._now() - (self._clock() - self._began)

    def _waited_s(self, row: Row) -> float:
        return max(0.0, self._began_at - _told(row, self._began_at))

    def _is_barren(self, row: Row) -> bool:
        rows = [other for other in find(self._gateway, [self._site_id], self._search) if other["id"] <= row["id"]]
        rows = [other for other in rows if other["scheduler_id"] is not None]  # others never were allocations
        if len(rows) < FRUITLESS:
            return False
        first = rows[-FRUITLESS]
        since = parse_time(first["start_time"]) if first["start_time"] else _told(first, self._began_at)
        changed = self._gateway.jobs(
            trial_tags(self._search), changed_since=datetime.fromtimestamp(since, timezone.utc).isoformat()
        )
        return not any((trial_data.gathered_at(job) or 0.0) >= since for job in changed)


def _told(row: Row, otherwise: float) -> float:
    """Return when a BatchJob was submitted (epoch), as the site's agent says."""
    told = (row.get("status_info") or {}).get("submit_time")
    return otherwise if told is None else parse_time(str(told))
