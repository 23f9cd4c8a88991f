"""Who drives a search: each driver has one lease, a note in Balsam that it alone writes.

A driver first writes its claim, and then looks at the others'. So of two that start together at least one sees the
other, and a driver drives only after a look, made when its own claim was there, that showed no other living one.
`LeaseKeeper` is a driver's hold on its search; `read_leases` is what everybody else reads.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict

from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.common.timing import USUAL, Timing
from deephyper_balsam.common.wording import storable
from deephyper_balsam.errors import BalsamError, SearchRunningError, TakenOverError
from deephyper_balsam.store.encoding import iso, parse_time
from deephyper_balsam.store.gateway import Gateway, Row
from deephyper_balsam.store.notes import read_notes, write_note
from deephyper_balsam.store.schema import STAMP

logger = logging.getLogger(__name__)

GONE_AFTER_S = 60.0
"""A driver that gave no sign of life for so long counts as gone."""
FENCE_AFTER_S = 20.0
"""A driver that could give none for so long looks again before it changes anything."""

_LOOK_S = 0.3
_OUTAGES_KEPT = 20
_OVERLAP_S = 120.0  # a look goes back so far: a commit may land late, and there are few notes


def this_host() -> str:
    """Return the name of this machine, as Balsam keeps it."""
    return storable(socket.gethostname())


Outage = TypedDict("Outage", {"from": float, "to": float, "why": str})
"""From when until when Balsam did not answer a driver (epoch, by its own clock), and why."""


@dataclass(frozen=True)
class Lease:
    """One driver of a search, as its note has it.

    Attributes
    ----------
    id
        Of the note.
    host, pid, started
        The process; `started` tells it from another with the same pid.
    began_at
        When it claimed the search.
    driving_since
        When it began to drive; None: it never did.
    at
        Its last sign of life, by its own clock.
    left_at, why
        When and why it left; None: it has not said.
    takes_over
        The notes of the drivers that it found to be gone, or was told are.
    max_evals, timeout_s
        The budget that it was started with; None: not given.
    outages
        The last times when Balsam did not answer it: ``from``, ``to`` (its own clock) and ``why``.
    seen_at
        Its last sign of life, by the server's clock.
    """

    id: int
    host: str
    pid: int
    started: str
    began_at: float
    driving_since: float | None = None
    at: float = 0.0
    left_at: float | None = None
    why: str | None = None
    takes_over: tuple[int, ...] = ()
    max_evals: int | None = None
    timeout_s: float | None = None
    outages: tuple[Outage, ...] = ()
    seen_at: float = 0.0

    @classmethod
    def read(cls, row: Row) -> Lease:
        """Read a note."""
        known = {entry.name for entry in fields(cls)}
        data = {key: value for key, value in row["data"].items() if key in known}
        data.update({key: tuple(data.get(key) or ()) for key in ("takes_over", "outages")})
        return cls(**{**data, "id": row["id"], "seen_at": parse_time(row["last_update"])})

    def to_data(self) -> dict[str, Any]:
        """Return what the note holds."""
        return {**STAMP, **{key: value for key, value in asdict(self).items() if key not in ("id", "seen_at")}}

    @property
    def where(self) -> str:
        """The process, for a message."""
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it is this very process."""
        me = ProcessId.of(os.getpid())
        return me is not None and (self.host, self.pid, self.started) == (this_host(), me.pid, me.started)

    def is_alive(self, server_now: float) -> bool:
        """Return whether it may still drive: it gave a sign lately, and is no process of this machine that ended."""
        if self.left_at is not None or server_now - self.seen_at >= GONE_AFTER_S:
            return False
        if self.host != this_host():
            return True
        me = ProcessId.of(os.getpid())
        this_machine = me is not None and _boot(me.started) == _boot(self.started)
        return not this_machine or ProcessId(self.pid, self.started).alive

    @property
    def drove_s(self) -> float:
        """How long it drove, as far as it is known."""
        end = self.at if self.left_at is None else self.left_at
        return 0.0 if self.driving_since is None else max(0.0, end - self.driving_since)


def _boot(mark: str) -> str:
    return mark.partition(":")[0] if ":" in mark else ""


def read_leases(gateway: Gateway, search: str | None = None) -> dict[str, list[Lease]]:
    """Return the leases of a search (None: of all) by its name, the oldest first; those that never drove too."""
    found: dict[str, list[Lease]] = {}
    for row in read_notes(gateway, search, "driver"):
        found.setdefault(row["tags"]["record"], []).append(Lease.read(row))
    return found


def current_lease(leases: Iterable[Lease], server_now: float) -> Lease | None:
    """Return who drives, or is about to; None: nobody does."""
    living = _living(list(leases), server_now)
    return next((lease for lease in living if lease.driving_since is not None), living[0] if living else None)


def _living(leases: list[Lease], server_now: float) -> list[Lease]:
    gone = {job_id for lease in leases for job_id in lease.takes_over}
    return [lease for lease in leases if lease.id not in gone and lease.is_alive(server_now)]


@dataclass
class LeaseKeeper:
    """The hold of this process on a search. `claim` makes one; `beat` keeps it; `leave` gives it back.

    `news` are the notes that were new at the last beats; whoever uses them takes them out.
    """

    gateway: Gateway
    search: str
    lease: Lease
    clock: Callable[[], float]
    timing: Timing = USUAL
    news: list[Row] = field(default_factory=list)
    _signed_at: float = 0.0

    @classmethod
    def claim(
        cls,
        gateway: Gateway,
        search: str,
        site_id: int,
        *,
        takeover: bool = False,
        max_evals: int | None = None,
        timeout_s: float | None = None,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        timing: Timing = USUAL,
    ) -> LeaseKeeper:
        """Become the driver of a search; of several that try at the same moment exactly one does.

        Parameters
        ----------
        gateway
            Balsam's API.
        search
            The search's name.
        site_id
            The site that keeps the note.
        takeover
            Take over even from a driver with a recent sign of life; only if it is dead.
        max_evals, timeout_s
            The budget that this driver is given (evaluations, seconds); None: not given.
        clock
            Its moments (epoch); by default the server's.
        sleep
            Waits so many seconds.
        timing
            How often it gives a sign of life.

        Raises
        ------
        SearchRunningError
            When another driver is at work, or was quicker; it is named.
        """
        clock = clock or gateway.now
        before = _living(read_leases(gateway, search).get(search, []), gateway.now()) if takeover else []
        me = ProcessId.of(os.getpid()) or ProcessId(os.getpid(), "")
        lease = Lease(
            id=-1,
            host=this_host(),
            pid=me.pid,
            started=me.started,
            began_at=clock(),
            at=clock(),
            takes_over=tuple(other.id for other in before),
            max_evals=max_evals,
            timeout_s=timeout_s,
        )
        lease = replace(lease, id=write_note(gateway, site_id, search, "driver", lease.to_data()))
        keeper = cls(gateway, search, lease, clock, timing, _signed_at=lease.at)
        try:
            keeper._win(sleep)
            keeper._let_go(before, sleep)
        except BaseException as error:
            keeper.leave(f"did not drive: {error or type(error).__name__}")
            raise
        return keeper

    def _win(self, sleep: Callable[[float], None]) -> None:
        while True:
            leases = read_leases(self.gateway, self.search)[self.search]
            others = [lease for lease in _living(leases, self.gateway.now()) if lease.id != self.lease.id]
            # An earlier lease of this very process has been given up, or will find that it was
            mine = [lease.id for lease in others if lease.is_here and lease.id < self.lease.id]
            others = [lease for lease in others if lease.id not in mine]
            driving = [lease for lease in others if lease.driving_since is not None]
            if driving or any(lease.id < self.lease.id for lease in others):
                raise SearchRunningError(self._refusal((driving or others)[0]))
            if not others:
                break
            # They came later and will see us; or they looked before we were there, and will say that they drive
            sleep(_LOOK_S)
            if self._silent_s >= self.timing.heartbeat_s:
                self._sign(replace(self.lease, at=self.clock()))
        gone = [lease.id for lease in leases if lease.left_at is None and lease.id < self.lease.id]
        signed_at = self._signed_at
        now = self.clock()
        self._sign(replace(self.lease, driving_since=now, at=now, takes_over=tuple(sorted({*gone, *mine}))))
        silent_s = self.clock() - signed_at
        if silent_s >= FENCE_AFTER_S:  # this took so long that another may have found us gone
            self._look(silent_s)

    def _refusal(self, other: Lease) -> str:
        age_s = max(0.0, self.gateway.now() - other.seen_at)
        if other.driving_since is None:
            return f"The search {self.search!r} is being started by {other.where} at this moment ({age_s:.0f} s ago)."
        return (
            f"The search {self.search!r} is being driven by process {other.pid} on {other.host} (last sign of life "
            f"{age_s:.0f} s ago). "
            f"Stop it with `deephyper-balsam search stop {self.search}`; if it is dead, wait {GONE_AFTER_S:.0f} s, or "
            "take over: --takeover, or `takeover=True` from Python."
        )

    def _let_go(self, taken_over: list[Lease], sleep: Callable[[float], None]) -> None:
        """Give a driver that was taken over, and may be alive all the same, the time to notice it."""
        waiting = [lease.id for lease in taken_over if self.gateway.now() - lease.seen_at < 3 * self.timing.heartbeat_s]
        until = self.clock() + 2 * self.timing.heartbeat_s
        while waiting and self.clock() < until:
            sleep(_LOOK_S)
            leases = read_leases(self.gateway, self.search)[self.search]
            waiting = [lease.id for lease in leases if lease.id in waiting and lease.is_alive(self.gateway.now())]

    # --- while it drives -----------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Give a sign of life, if the last is old enough.

        Raises
        ------
        TakenOverError
            Another driver has taken over: this one must not touch anything any more.
        """
        if self._silent_s >= self.timing.heartbeat_s:
            self._beat()

    def fence(self) -> None:
        """Call before anything is changed: after a long silence, look whether another driver has taken over.

        Raises
        ------
        TakenOverError
            It has.
        """
        if self._silent_s >= FENCE_AFTER_S:
            self._beat()

    @property
    def _silent_s(self) -> float:
        """Seconds since the last sign of life; where the clock was put back, too many rather than too few."""
        elapsed_s = self.clock() - self._signed_at
        return elapsed_s if elapsed_s >= 0 else FENCE_AFTER_S

    def _beat(self) -> None:
        silent_s = self._silent_s
        self._sign(replace(self.lease, at=self.clock()))
        self._look(silent_s)

    def _look(self, silent_s: float) -> None:
        """Read what is new since the last look but one; leave if another driver has the search."""
        since = self.gateway.now() - silent_s - _OVERLAP_S
        rows = list(read_notes(self.gateway, self.search, changed_since=iso(since)))
        leases = [Lease.read(row) for row in rows if row["tags"]["kind"] == "driver"]
        others = [lease for lease in leases if lease.id != self.lease.id]
        for other in others:
            if self.lease.id in other.takes_over:
                raise TakenOverError(self._lost_to(other, silent_s))
        for other in _living(others, self.gateway.now()):
            if other.id in self.lease.takes_over:
                continue
            # One that is deciding yields to us; but it may have taken our silence for our end
            if other.driving_since is not None or silent_s >= FENCE_AFTER_S:
                raise TakenOverError(self._lost_to(other, silent_s))
        known = {row["id"] for row in self.news}
        self.news += [row for row in rows if row["tags"]["kind"] != "driver" and row["id"] not in known]

    def _lost_to(self, other: Lease, silent_s: float) -> str:
        silence = (
            f" after {silent_s:.0f} s without a sign of life from here"
            if silent_s > 3 * self.timing.heartbeat_s
            else ""
        )
        return (
            f"The search {self.search!r} was taken over by {other.where}{silence}. This driver stops and changes "
            f"nothing more; see `deephyper-balsam search status {self.search}`."
        )

    def _sign(self, lease: Lease) -> None:
        if self.gateway.write_data({lease.id: lease.to_data()}):
            raise BalsamError(
                f"The note of this driver is gone: somebody deleted what Balsam keeps of the search {self.search!r}. "
                "The driver stops; what it found so far is in its results.csv."
            )
        self.lease, self._signed_at = lease, lease.at

    def note_outage(self, began_at: float, why: str) -> None:
        """Remember that Balsam did not answer from `began_at` until now; the next sign of life says so."""
        outage: Outage = {"from": began_at, "to": self.clock(), "why": why[:300]}
        self.lease = replace(self.lease, outages=(*self.lease.outages, outage)[-_OUTAGES_KEPT:])

    def leave(self, why: str) -> None:
        """Say that this driver drives no more, and why."""
        now = self.clock()
        self._sign(replace(self.lease, at=now, left_at=now, why=why))
