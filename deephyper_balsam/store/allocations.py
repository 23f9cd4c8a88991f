"""The allocations (Balsam's BatchJobs) that run a search: how many trials they run at once, and asking for more."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deephyper_balsam.common.timing import USUAL, Timing
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import BalsamError, UnreachableError
from deephyper_balsam.store import node_time
from deephyper_balsam.store.allocation_end import last_words
from deephyper_balsam.store.allocation_request import AllocationRequest
from deephyper_balsam.store.encoding import parse_time
from deephyper_balsam.store.gateway import Gateway, Row

logger = logging.getLogger(__name__)

_ALIVE = ("pending_submission", "queued", "running")
_ENDED = ("finished", "submit_failed")
_NOT_ENDED = (*_ALIVE, "pending_deletion")
_ALL_EVERY_S = 60.0  # what ended changes no more, and a site has thousands; but one may begin and end between two looks
_MAX_EARLY_DEATHS = 3
_EARLY_S = 60.0
_SAY_AGAIN_S = 300.0
_AHEAD_SHARE = 0.1  # of the wall time, the next one is asked for ahead, before the queue's own time is known
_AHEAD_S = 120.0
_AHEAD_LEAST_S = 10.0
SILENT_LAUNCHER_S = 150.0
"""A launcher gives a sign of life once a minute; Balsam itself waits five."""


@dataclass(frozen=True)
class Work:
    """What a search still has to do, as far as its budget says.

    Attributes
    ----------
    evaluations
        How many have not ended; None: no limit.
    seconds
        Until its time is over; None: no limit.
    """

    evaluations: int | None = None
    seconds: float | None = None


class Allocations:
    """Watches the BatchJobs of one search at one site, keeps as many as wanted, clears up after dead launchers.

    Parameters
    ----------
    site
        The site's row.
    tags
        What BatchJobs may ask of jobs, to run those of this search.
    slots
        How many evaluations an allocation of so many nodes runs at once.
    request
        What to ask for; None: nothing.
    timing
        How often to look at them.
    clock
        Any clock that only goes forward.

    Attributes
    ----------
    avoid
        Nodes that the next allocation should not have, where the site's job template takes an ``exclude``.
    """

    def __init__(
        self,
        gateway: Gateway,
        site: Row,
        tags: Mapping[str, str],
        slots: Callable[[int], int],
        request: AllocationRequest | None,
        *,
        timing: Timing = USUAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._site = dict(site)
        self._tags = dict(tags)
        self._slots_of = slots
        self.request = request
        self._look_s = timing.allocations_s
        self._clock = clock
        self._refreshed_at = -1e9
        self._alive: list[Row] = []
        self._seen: list[Row] = []
        self._read_all_at = -1e9
        self._ours: dict[int, float] = {}  # BatchJob id -> when it was last seen not to run yet
        self._ends_at: dict[int, float] = {}  # BatchJob id -> when its wall time will be over
        self._known: set[int] = set()
        # Whether one may have been made for us that we know nothing of: the answer was lost, or a driver was killed
        self._doubtful = request is not None
        self._asked_at: dict[int, float] = {}
        self._queued_s: deque[float] = deque(maxlen=5)  # how long the last ones waited in the scheduler's queue
        self._deaths = 0
        self._worked_at = -1e9
        self._said: tuple[str | None, float] = (None, -1e9)
        self._ended: set[int] = set()
        self._orphaned: dict[int, str] = {}  # session of a launcher whose BatchJob has ended -> its last sign of life
        self.avoid: Sequence[str] = ()

    # --- looking -------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look at the BatchJobs again, if the last look is old enough."""
        if self._clock() - self._refreshed_at < self._look_s:
            return
        rows = [row for row in self._read() if self._may_run_ours(row)]
        self._seen = rows
        self._alive = [row for row in rows if row["state"] in _ALIVE]
        first = not self._known and self._refreshed_at < 0
        now = self._refreshed_at = self._clock()
        for row in self._alive:
            made_unanswered = self._doubtful and row["id"] not in self._known and row["filter_tags"] == self._tags
            if made_unanswered or (row["id"] in self._ours and row["state"] != "running"):
                self._ours[row["id"]] = now
            if row["state"] == "running" and row["id"] not in self._ends_at:
                self._note_start(row, now, seen_waiting=not first)
        self._known, self._doubtful = {row["id"] for row in rows}, False
        ended = {row["id"]: row for row in rows if row["state"] in _ENDED}
        self._free_what_dead_launchers_hold(set(ended))
        self._say_notice(now)
        self._notice_deaths(ended)

    def _read(self) -> list[Row]:
        """Return the BatchJobs of the site: those that had ended at an earlier look as they were then."""
        site_ids = [self._site["id"]]
        if self._refreshed_at < 0 or self._clock() - self._read_all_at >= _ALL_EVERY_S:
            rows = self._gateway.batch_jobs(site_ids)
            self._read_all_at = self._clock()
            return rows
        known = {row["id"]: row for row in self._seen}
        found = {row["id"]: row for row in self._gateway.batch_jobs(site_ids, _NOT_ENDED)}
        open_ids = {row["id"] for row in self._seen if row["state"] in _NOT_ENDED} | self._ours.keys()
        ended = sorted(open_ids - found.keys())
        if ended:
            found.update((row["id"], row) for row in self._gateway.batch_jobs(site_ids, ids=ended))
        kept = {job_id: row for job_id, row in known.items() if job_id not in open_ids}
        return [row for _, row in sorted({**kept, **found}.items())]

    def _may_run_ours(self, row: Row) -> bool:
        return all(self._tags.get(key) == value for key, value in row["filter_tags"].items())

    def _note_start(self, row: Row, now: float, seen_waiting: bool) -> None:
        if row["id"] in self._asked_at:
            self._queued_s.append(now - self._asked_at.pop(row["id"]))
            seen_waiting = True
        at = self._gateway.now()
        site = self._site if seen_waiting else next((s for s in self._gateway.sites() if s["id"] == row["site_id"]), {})
        rest_s = node_time.left_s(row, site, at, at if seen_waiting else None)
        self._ends_at[row["id"]] = now + (60.0 * row["wall_time_min"] if rest_s is None else rest_s)

    @property
    def alive(self) -> list[Row]:
        """The BatchJobs that run or wait, at the last look."""
        return list(self._alive)

    @property
    def seen(self) -> list[Row]:
        """The BatchJobs that may run the search or might have, at the last look: those that ended as well."""
        return list(self._seen)

    @property
    def capacity(self) -> int:
        """How many trials the running allocations can run at once."""
        return sum(self._slots(row) for row in self._alive if row["state"] == "running")

    def _slots(self, row: Row) -> int:
        return self._slots_of(row["num_nodes"])

    @property
    def wall_time_s(self) -> float | None:
        """The time of an allocation: the longest of those that are alive and of what is asked for; None: unknown."""
        minutes = [row["wall_time_min"] for row in self._alive]
        if self.request is not None:
            minutes.append(self.request.wall_time_min)
        return 60.0 * max(minutes) if minutes else None

    @property
    def planned(self) -> int:
        """How many trials the allocations that wait in the scheduler's queue will run at once."""
        return sum(self._slots(row) for row in self._alive if row["state"] != "running")

    @property
    def largest_nodes(self) -> int | None:
        """How many nodes one evaluation can get at most, of what is asked for or alive; None: nothing is known."""
        sizes = [1 if row["job_mode"] == "serial" else row["num_nodes"] for row in self._alive]
        if self.request is not None:
            sizes.append(self.request.most_nodes)
        return max(sizes, default=None)

    def left_s(self, row: Row) -> float:
        """Return how many seconds of its wall time an allocation has left; one that waits has all of them."""
        if row["id"] not in self._ends_at:
            return 60.0 * float(row["wall_time_min"])
        return max(0.0, self._ends_at[row["id"]] - self._clock())

    def closing(self, needed_s: float) -> int:
        """Return how many of the running slots cannot finish another run, when no other allocation follows.

        Where one follows, new trials wait for it in the queue.
        """
        if self.request is not None or len([row for row in self._alive if row["state"] != "running"]):
            return 0
        return sum(self._slots(row) for row in self._alive if self.left_s(row) < needed_s)

    @property
    def notice(self) -> str | None:
        """What a person should know, if there is something: no allocation, or one that still waits."""
        name = self._site["name"]
        if not self._alive:
            if self.request is not None:
                return f"no allocation is alive at {name}: the next one is asked for"
            return (
                f"no allocation is alive at {name}: nothing starts until there is one "
                "(give `nodes` of an `allocation`, --nodes, or `balsam queue submit`)"
            )
        if not self.capacity:
            return f"waiting for an allocation at {name} (BatchJob {self._alive[0]['id']} is {self._alive[0]['state']})"
        return None

    def _say_notice(self, now: float) -> None:
        """Log the notice when it changes, and again every few minutes."""
        said, said_at = self._said
        if self.notice != said or (self.notice and now - said_at >= _SAY_AGAIN_S):
            if self.notice and (self._alive or self.request is None):  # else one is asked for in a moment
                level = logging.INFO if self._alive else logging.WARNING
                logger.log(level, "%s", self.notice[0].upper() + self.notice[1:])
            self._said = (self.notice, now)

    # --- asking --------------------------------------------------------------------------------------------------

    def ensure(self, work: Work | None = None) -> None:
        """Ask for an allocation if one may be asked for and is wanted.

        One is wanted while fewer than `max_allocations` are alive; and a little before the end of one that runs, so
        that the next stands ready: as long before as the scheduler's queue took lately. Never two ahead, and none that
        the rest of the work does not need.

        Raises
        ------
        BalsamError
            When the scheduler refuses.
        """
        if self.request is None or self._refreshed_at < 0 or not self._is_wanted(self.request, work or Work()):
            return
        site = self._site
        request = self.request
        optional = dict(request.optional_params)
        if self.avoid and "exclude" in (site.get("optional_batch_job_params") or {}):
            optional["exclude"] = ",".join(self.avoid)
        try:
            row = self._gateway.create_batch_job(
                {
                    "site_id": site["id"],
                    "num_nodes": request.nodes,
                    "wall_time_min": request.wall_time_min,
                    "queue": request.queue,
                    "project": request.project,
                    "job_mode": request.job_mode,
                    "optional_params": optional,
                    "filter_tags": self._tags,
                }
            )
        except UnreachableError:
            self._doubtful, self._refreshed_at = True, -1e9  # look again before asking again
            raise
        self._ours[row["id"]] = self._asked_at[row["id"]] = self._clock()
        self._alive.append(row)
        logger.info(
            "Asked %s for %s, %d min (BatchJob %d)",
            site["name"],
            counted(request.nodes, "node"),
            request.wall_time_min,
            row["id"],
        )

    def _is_wanted(self, request: AllocationRequest, work: Work) -> bool:
        if not self._alive:
            return True
        ahead_s = self._ahead_s(request)
        if work.evaluations is not None and work.evaluations <= self.capacity + self.planned:
            return False
        if work.seconds is not None and work.seconds <= ahead_s:
            return False
        lasting = [row for row in self._alive if self.left_s(row) > ahead_s]
        return len(lasting) < request.max_allocations and len(self._alive) <= request.max_allocations

    def _ahead_s(self, request: AllocationRequest) -> float:
        wall_s = 60.0 * request.wall_time_min
        if not self._queued_s:
            return min(max(_AHEAD_SHARE * wall_s, _AHEAD_S), wall_s / 2)
        return min(max(1.5 * max(self._queued_s), _AHEAD_LEAST_S), wall_s)

    def note_work(self) -> None:
        """Say that a trial of the search runs or has just ended."""
        self._worked_at = self._clock()

    def worked(self) -> None:
        """Trials ended: whatever dies next, allocations are of some use."""
        self._deaths = 0

    # --- ends ----------------------------------------------------------------------------------------------------

    def _notice_deaths(self, ended: Mapping[int, Row]) -> None:
        for job_id in [job_id for job_id in self._ours if job_id in ended]:
            row = ended[job_id]
            lived_s = self._clock() - self._ours.pop(job_id)
            refused = row["state"] == "submit_failed" and "error" in (row.get("status_info") or {})
            early = (
                row["state"] == "submit_failed"
                or lived_s < min(_EARLY_S, 30.0 * row["wall_time_min"])
                or self._worked_at < self._clock() - lived_s  # nothing ran while it lived
            )
            self._deaths = self._deaths + 1 if early else 0
            words = last_words(row, self._site) if early else ""
            logger.log(
                logging.WARNING if early else logging.INFO,
                "BatchJob %d ended after %.0f s%s",
                job_id,
                lived_s,
                f": {words}" if words else "",
            )
            if refused or self._deaths >= _MAX_EARLY_DEATHS:
                what = (
                    "The scheduler refused"
                    if refused
                    else f"The last {self._deaths} allocations ended at once or ran nothing; the last,"
                )
                raise BalsamError(f"{what} BatchJob {job_id}: {words}")

    def _free_what_dead_launchers_hold(self, ended: set[int]) -> None:
        """Take the sessions of launchers whose BatchJob has ended: Balsam lets their jobs stay RUNNING for minutes.

        A launcher that ends in order gives its session back itself; so one that is there at two looks, without a sign
        of life in between, is a dead one's. Its runs become RUN_TIMEOUT and start again.
        """
        if ended <= self._ended and not self._orphaned:
            return
        held = {session["id"]: session for session in self._gateway.sessions() if session.get("batch_job_id") in ended}
        for session_id, heartbeat in self._orphaned.items():
            session = held.get(session_id)
            if session is not None and session["heartbeat"] == heartbeat:
                self._gateway.end_session(session_id)
                logger.warning(
                    "The launcher of BatchJob %d died: what it ran starts again", held.pop(session_id)["batch_job_id"]
                )
        self._orphaned = {session_id: session["heartbeat"] for session_id, session in held.items()}
        self._ended = ended

    def free_what_silent_launchers_hold(self, now: float) -> None:
        """Take the sessions of launchers without a sign of life, where no agent is left to say that they ended.

        Parameters
        ----------
        now
            The server's clock.
        """
        for session in self._gateway.sessions():
            silent_s = now - parse_time(session["heartbeat"])
            if session["site_id"] == self._site["id"] and session.get("batch_job_id") and silent_s > SILENT_LAUNCHER_S:
                self._gateway.end_session(session["id"])
                logger.warning(
                    "The launcher of BatchJob %d at %s gave no sign for %.0f s: what it ran starts again elsewhere",
                    session["batch_job_id"],
                    self._site["name"],
                    silent_s,
                )

    @property
    def owned(self) -> bool:
        """Whether one that we asked for is alive."""
        return bool(self._ours)

    def release(self) -> None:
        """End the allocations that we asked for; others' go on."""
        for job_id in list(self._ours):
            self._gateway.end_batch_job(job_id)
            del self._ours[job_id]

    def leave(self) -> None:
        """Let the allocations that we asked for go on: what runs in them ends there."""
        for job_id in self._ours:
            logger.info("BatchJob %d goes on for what runs in it; its launcher leaves when nothing is left", job_id)
        self._ours.clear()
