"""Who drives a search: one life of a driver is one note in Balsam, written by that driver alone.

A driver first writes its claim, and then looks at the others'. So of two that start together at least one sees the
other, and a driver drives only after a look, made when its own claim was there, that showed no other living one.
`Wheel` is a driver's hold on its search; `read_lives` is what everybody else reads.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from deephyper_balsam.errors import SearchRunningError, TakenOverError
from deephyper_balsam.gateway import Gateway, Row, iso, parse_time
from deephyper_balsam.notes import read_notes, write_note
from deephyper_balsam.process_id import ProcessId

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
GONE_AFTER_S = 60.0
"""A driver that gave no sign of life for so long counts as gone."""
FENCE_AFTER_S = 20.0
"""A driver that could give none for so long looks again before it changes anything."""

_LOOK_S = 0.3
_OUTAGES_KEPT = 20
_OVERLAP_S = 120.0  # a look goes back so far: a commit may land late, and there are few notes


@dataclass(frozen=True)
class Life:
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
    outages: tuple[dict[str, Any], ...] = ()
    seen_at: float = 0.0

    @classmethod
    def read(cls, row: Row) -> Life:
        """Read a note."""
        known = {entry.name for entry in fields(cls)}
        data = {key: value for key, value in row["data"].items() if key in known}
        data.update({key: tuple(data.get(key) or ()) for key in ("takes_over", "outages")})
        return cls(**{**data, "id": row["id"], "seen_at": parse_time(row["last_update"])})

    def to_data(self) -> dict[str, Any]:
        """Return what the note holds."""
        return {key: value for key, value in asdict(self).items() if key not in ("id", "seen_at")}

    @property
    def where(self) -> str:
        """The process, for a message."""
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it is this very process."""
        me = ProcessId.of(os.getpid())
        return me is not None and (self.host, self.pid, self.started) == (socket.gethostname(), me.pid, me.started)

    def is_alive(self, server_now: float) -> bool:
        """Return whether it may still drive: it gave a sign lately, and is no process of this machine that ended."""
        if self.left_at is not None or server_now - self.seen_at >= GONE_AFTER_S:
            return False
        if self.host != socket.gethostname():
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


def read_lives(gateway: Gateway, search: str | None = None) -> dict[str, list[Life]]:
    """Return the lives of a search (of all: None) by its name, the oldest first; those that never drove too."""
    found: dict[str, list[Life]] = {}
    for row in read_notes(gateway, search, "driver"):
        found.setdefault(row["tags"]["record"], []).append(Life.read(row))
    return found


def at_the_wheel(lives: Iterable[Life], server_now: float) -> Life | None:
    """Return who drives, or is about to; None: nobody does."""
    living = _living(list(lives), server_now)
    return next((life for life in living if life.driving_since is not None), living[0] if living else None)


def _living(lives: list[Life], server_now: float) -> list[Life]:
    gone = {job_id for life in lives for job_id in life.takes_over}
    return [life for life in lives if life.id not in gone and life.is_alive(server_now)]


@dataclass
class Wheel:
    """The hold of this process on a search. `claim` makes one; `beat` keeps it; `leave` gives it back.

    `news` are the notes that were new at the last beats; whoever uses them takes them out.
    """

    gateway: Gateway
    search: str
    life: Life
    clock: Callable[[], float] = time.time
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
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Wheel:
        """Become the driver of a search; of several that try at the same moment exactly one does.

        Parameters
        ----------
        takeover
            The driver that there is, is gone, however lately it gave a sign of life.

        Raises
        ------
        SearchRunningError
            When another driver is at work, or was quicker; it is named.
        """
        before = _living(read_lives(gateway, search).get(search, []), gateway.now()) if takeover else []
        me = ProcessId.of(os.getpid()) or ProcessId(os.getpid(), "")
        life = Life(
            id=-1,
            host=socket.gethostname(),
            pid=me.pid,
            started=me.started,
            began_at=clock(),
            at=clock(),
            takes_over=tuple(other.id for other in before),
            max_evals=max_evals,
            timeout_s=timeout_s,
        )
        life = replace(life, id=write_note(gateway, site_id, search, "driver", life.to_data()))
        wheel = cls(gateway, search, life, clock, _signed_at=life.at)
        try:
            wheel._win(sleep)
            wheel._let_go(before, sleep)
        except BaseException as error:
            wheel.leave(f"did not drive: {error or type(error).__name__}")
            raise
        return wheel

    def _win(self, sleep: Callable[[float], None]) -> None:
        while True:
            lives = read_lives(self.gateway, self.search)[self.search]
            others = [life for life in _living(lives, self.gateway.now()) if life.id != self.life.id]
            # An earlier life in this very process has been given up, or will find that it was
            mine = [life.id for life in others if life.is_here and life.id < self.life.id]
            others = [life for life in others if life.id not in mine]
            driving = [life for life in others if life.driving_since is not None]
            if driving or any(life.id < self.life.id for life in others):
                raise SearchRunningError(self._refusal((driving or others)[0]))
            if not others:
                break
            # They came later and will see us; or they looked before we were there, and will say that they drive
            sleep(_LOOK_S)
            if self._silent_s >= HEARTBEAT_S:
                self._sign(replace(self.life, at=self.clock()))
        gone = [life.id for life in lives if life.left_at is None and life.id < self.life.id]
        signed_at = self._signed_at
        now = self.clock()
        self._sign(replace(self.life, driving_since=now, at=now, takes_over=tuple(sorted({*gone, *mine}))))
        silent_s = self.clock() - signed_at
        if silent_s >= FENCE_AFTER_S:  # this took so long that another may have found us gone
            self._look(silent_s)

    def _refusal(self, other: Life) -> str:
        age_s = max(0.0, self.gateway.now() - other.seen_at)
        if other.driving_since is None:
            return f"The search {self.search!r} is being started by {other.where} at this moment ({age_s:.0f} s ago)."
        return (
            f"The search {self.search!r} is being driven by process {other.pid} on {other.host} (last sign of life "
            f"{age_s:.0f} s ago). "
            f"Stop it with `deephyper-balsam search stop {self.search}`; if it is dead, wait {GONE_AFTER_S:.0f} s, or "
            "use --takeover."
        )

    def _let_go(self, taken_over: list[Life], sleep: Callable[[float], None]) -> None:
        """Give a driver that was taken over, and may be alive all the same, the time to notice it."""
        waiting = [life.id for life in taken_over if self.gateway.now() - life.seen_at < 3 * HEARTBEAT_S]
        until = self.clock() + 2 * HEARTBEAT_S
        while waiting and self.clock() < until:
            sleep(_LOOK_S)
            lives = read_lives(self.gateway, self.search)[self.search]
            waiting = [life.id for life in lives if life.id in waiting and life.is_alive(self.gateway.now())]

    # --- while it drives -----------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Give a sign of life, if the last is old enough.

        Raises
        ------
        TakenOverError
            Another driver has taken over: this one must not touch anything any more.
        """
        if self._silent_s >= HEARTBEAT_S:
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
        self._sign(replace(self.life, at=self.clock()))
        self._look(silent_s)

    def _look(self, silent_s: float) -> None:
        """Read what is new since the last look but one; leave if another driver has the search."""
        since = self.gateway.now() - silent_s - _OVERLAP_S
        rows = list(read_notes(self.gateway, self.search, changed_since=iso(since)))
        lives = [Life.read(row) for row in rows if row["tags"]["kind"] == "driver"]
        others = [life for life in lives if life.id != self.life.id]
        for other in others:
            if self.life.id in other.takes_over:
                raise TakenOverError(self._lost_to(other, silent_s))
        for other in _living(others, self.gateway.now()):
            if other.id in self.life.takes_over:
                continue
            # One that is deciding yields to us; but it may have taken our silence for our end
            if other.driving_since is not None or silent_s >= FENCE_AFTER_S:
                raise TakenOverError(self._lost_to(other, silent_s))
        known = {row["id"] for row in self.news}
        self.news += [row for row in rows if row["tags"]["kind"] != "driver" and row["id"] not in known]

    def _lost_to(self, other: Life, silent_s: float) -> str:
        silence = f" after {silent_s:.0f} s without a sign of life from here" if silent_s > 3 * HEARTBEAT_S else ""
        return (
            f"The search {self.search!r} was taken over by {other.where}{silence}. This driver stops and changes "
            f"nothing more; see `deephyper-balsam search status {self.search}`."
        )

    def _sign(self, life: Life) -> None:
        self.gateway.write_data({life.id: life.to_data()})
        self.life, self._signed_at = life, life.at

    def note_outage(self, began_at: float, why: str) -> None:
        """Remember that Balsam did not answer from `began_at` until now; the next sign of life says so."""
        outage = {"from": began_at, "to": self.clock(), "why": why[:300]}
        self.life = replace(self.life, outages=(*self.life.outages, outage)[-_OUTAGES_KEPT:])

    def leave(self, why: str) -> None:
        """Say that this driver drives no more, and why."""
        now = self.clock()
        self._sign(replace(self.life, at=now, left_at=now, why=why))
