"""The allocations (Balsam's BatchJobs) that run a search: how many trials they run at once, and asking for more."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deephyper_balsam.errors import BalsamError, InputError, UnreachableError
from deephyper_balsam.gateway import Gateway, Row, parse_time

logger = logging.getLogger(__name__)

_ALIVE = ("pending_submission", "queued", "running")
_ENDED = ("finished", "submit_failed")
_MAX_EARLY_DEATHS = 3
_EARLY_S = 60.0
_QUOTED_LINES, _QUOTED_CHARS = 15, 300  # Balsam logs whole pickled applications
_SAY_AGAIN_S = 300.0
_AHEAD_SHARE = 0.1  # of the wall time, the next one is asked for ahead, before the queue's own time is known
_AHEAD_S = 120.0
_AHEAD_LEAST_S = 10.0
SILENT_LAUNCHER_S = 150.0
"""A launcher gives a sign of life once a minute; Balsam itself waits five."""

_OUTPUTS = ("*_mode_*.log*", "*_mode_*.out")


@dataclass(frozen=True)
class AllocationRequest:
    """The allocations that the driver asks for while there is work.

    Attributes
    ----------
    nodes, wall_time_min, queue, project
        Of each, as the site's scheduler knows them.
    job_mode
        ``"mpi"``: each evaluation starts through the machine's MPI launcher; ``"serial"``: single-node evaluations,
        many of them, started by a worker on each node.
    optional_params
        What the site's job template takes besides.
    max_allocations
        How many are kept at the same time; one more may wait in the scheduler's queue for one that is about to end.
    """

    nodes: int
    wall_time_min: int = 60
    queue: str = "local"
    project: str = "local"
    job_mode: str = "mpi"
    optional_params: dict[str, str] = field(default_factory=dict)
    max_allocations: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.wall_time_min < 1:
            raise InputError(
                "`nodes >= 1` and `wall_time_min >= 1` must hold, but got "
                f"(nodes={self.nodes}, wall_time_min={self.wall_time_min})."
            )
        if self.max_allocations < 1:
            raise InputError(f"`max_allocations >= 1` must hold, but got {self.max_allocations}.")
        if self.job_mode not in ("mpi", "serial"):
            raise InputError(f"`job_mode` must be 'mpi' or 'serial', but got {self.job_mode!r}.")

    @property
    def most_nodes(self) -> int:
        """How many nodes one evaluation can get in it."""
        return 1 if self.job_mode == "serial" else self.nodes


Requests = AllocationRequest | Mapping[str, AllocationRequest | None] | None
"""What to ask for: the same at every site, or for each site by its name; None: nothing."""


def by_site(asked: Requests, sites: Sequence[str]) -> dict[str, AllocationRequest | None]:
    """Return what to ask for at each of `sites`; a site that is not named asks for nothing.

    Raises
    ------
    InputError
        A name is no site of the search.
    """
    if not isinstance(asked, Mapping):
        return dict.fromkeys(sites, asked)
    check_sites(asked, sites, "`allocation`")
    return {site: asked.get(site) for site in sites}


def check_sites(named: Iterable[str], sites: Sequence[str], what: str) -> None:
    """Refuse names that are no sites of the search; `what` gave them."""
    unknown = [name for name in named if name not in sites]
    if unknown:
        raise InputError(
            f"{what} names {', '.join(map(repr, unknown))}, which is no site of this search; its sites are "
            f"{', '.join(sites)}."
        )


def to_record(requests: Mapping[str, AllocationRequest | None]) -> dict[str, Any] | None:
    """Return what the record of a search keeps of its requests: one for its only site, else by the site's name."""
    plain = {site: None if one is None else asdict(one) for site, one in requests.items()}
    if len(plain) == 1:
        return next(iter(plain.values()))
    return plain if any(plain.values()) else None


def from_record(recorded: Mapping[str, Any] | None, sites: Sequence[str]) -> dict[str, AllocationRequest | None]:
    """Return the requests of a search from what its record keeps."""
    plain = dict.fromkeys(sites, recorded) if len(sites) == 1 else recorded or {}
    return {site: AllocationRequest(**one) if (one := plain.get(site)) else None for site in sites}


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
        refresh_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._site = dict(site)
        self._tags = dict(tags)
        self._slots_of = slots
        self.request = request
        self._refresh_s = refresh_s
        self._clock = clock
        self._refreshed_at = -1e9
        self._alive: list[Row] = []
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
        if self._clock() - self._refreshed_at < self._refresh_s:
            return
        rows = [row for row in self._gateway.batch_jobs([self._site["id"]]) if self._may_run_ours(row)]
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

    def _may_run_ours(self, row: Row) -> bool:
        return all(self._tags.get(key) == value for key, value in row["filter_tags"].items())

    def _note_start(self, row: Row, now: float, seen_waiting: bool) -> None:
        left_s = 60.0 * row["wall_time_min"]
        if row["id"] in self._asked_at:
            self._queued_s.append(now - self._asked_at.pop(row["id"]))
        elif not seen_waiting:  # it ran before we looked: only the site's agent knows since when
            left_s = min(left_s, self._left_by_agent(row))
        self._ends_at[row["id"]] = now + left_s

    def _left_by_agent(self, row: Row) -> float:
        """Return the seconds that the scheduler gives a running BatchJob, as the agent last said, in whole minutes."""
        site = next((site for site in self._gateway.sites() if site["id"] == row["site_id"]), {})
        status = (site.get("queued_jobs") or {}).get(str(row["scheduler_id"]), {})
        return 60.0 * (int(status.get("time_remaining_min", row["wall_time_min"])) + 1)

    @property
    def alive(self) -> list[Row]:
        """The BatchJobs that run or wait, at the last look."""
        return list(self._alive)

    @property
    def capacity(self) -> int:
        """How many trials the running allocations can run at once."""
        return sum(self._slots(row) for row in self._alive if row["state"] == "running")

    def _slots(self, row: Row) -> int:
        return self._slots_of(row["num_nodes"])

    @property
    def wall_time_s(self) -> float | None:
        """The time of an allocation: the longest of those that are alive, else what is asked for; None: unknown."""
        minutes = [row["wall_time_min"] for row in self._alive]
        if not minutes and self.request is not None:
            minutes = [self.request.wall_time_min]
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
                "(give --nodes, or `balsam queue submit`)"
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
            "Asked %s for %d nodes, %d min (BatchJob %d)", site["name"], request.nodes, request.wall_time_min, row["id"]
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
            words = self._last_words(row) if early else ""
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

    def _last_words(self, row: Row) -> str:
        """Return what is known of a BatchJob's end: the scheduler's error, or the ends of its logs if they are here."""
        info = row.get("status_info") or {}
        if info.get("error"):
            return str(info["error"])
        script = info.get("submit_script")
        if not script:
            return "nothing is known of it"
        log_folder = Path(str(self._site.get("path", ""))) / "log"
        output = Path(script).with_suffix(".output")
        logs = [path for path in (output, *_launchers_logs(log_folder, _began_at(row))) if path.is_file()]
        if not logs:
            return f"its script is {script}; its launcher's log is in {log_folder}, which cannot be read from here"
        return "see " + "; ".join(map(_quote, logs))

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


def _began_at(row: Row) -> float:
    """Return a moment (epoch) before which a BatchJob's launcher cannot have written."""
    submitted = (row.get("status_info") or {}).get("submit_time")
    try:
        return parse_time(str(submitted)) - 5.0
    except ValueError:
        return 0.0


def _launchers_logs(folder: Path, since: float) -> list[Path]:
    """Return the log and the output that a launcher wrote last in a site's log folder, after `since`."""
    found = []
    for pattern in _OUTPUTS:
        written = {
            path: path.stat().st_mtime for path in folder.glob(pattern) if path.is_file() and path.stat().st_size
        }
        newest = max(written, key=lambda path: written[path], default=None)
        if newest is not None and written[newest] >= since:
            found.append(newest)
    return found


def _quote(log: Path) -> str:
    tail = log.read_text(errors="replace").strip().splitlines()[-_QUOTED_LINES:]
    tail = [line if len(line) <= _QUOTED_CHARS else line[: _QUOTED_CHARS - 1] + "…" for line in tail]
    return f"{log}; its last lines:\n" + "\n".join(tail) if tail else f"{log} (empty)"
