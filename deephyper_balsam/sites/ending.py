"""The end of a launcher's time, kept exactly.

A launcher takes only jobs whose `wall_time_min` fits into what is left before it ends itself, rounded down. Balsam's
own MPI mode reckons with the end of the allocation, two minutes after its own; in the last half minute both modes
reckon with no end at all; and serial mode fetches jobs long before it starts them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from deephyper_balsam.sites.batch import WALL_TIME_VARIABLE

_EARLY_SHARE = 0.1
_EARLIEST_S, _LATEST_S = 120.0, 6.0
_SHORT_MIN = 3
NOTHING = -1
"""Balsam's server takes 0 for no limit; no job has less than this."""


def early_s(wall_time_min: int) -> float:
    """Return how many seconds before the end of its allocation a launcher ends: a tenth, two minutes at most."""
    return min(_EARLIEST_S, max(_LATEST_S, _EARLY_SHARE * 60.0 * wall_time_min))


def startable_min(wall_time_min: int, spent_s: float) -> int:
    """Return the largest `wall_time_min` of a job that may start when so much of an allocation is over.

    `NOTHING` in the last minute. An allocation of less than three minutes has no minute to lose: there, a job of a
    minute may start till the end.
    """
    minutes = math.floor((60.0 * wall_time_min - early_s(wall_time_min) - spent_s) / 60)
    if minutes >= 1:
        return minutes
    return 1 if wall_time_min < _SHORT_MIN else NOTHING


class Ending:
    """When a launcher of so many minutes ends, seen from its start.

    Parameters
    ----------
    wall_time_min
        Minutes of the allocation. The launcher ends a little before that, to have time to stop its runs in order.
    """

    def __init__(self, wall_time_min: int, clock: Callable[[], float] = time.time) -> None:
        self._wall_time_min, self._clock = wall_time_min, clock
        self._began_at = clock()
        self.give_back: Callable[[], None] = lambda: None
        self._at = self._began_at + 60.0 * wall_time_min - early_s(wall_time_min)

    @classmethod
    def of_arguments(cls, arguments: list[str]) -> Ending:
        """Read ``--wall-time-min`` from a mode's command line."""
        return cls(int(arguments[arguments.index("--wall-time-min") + 1]))

    @property
    def left_s(self) -> float:
        """Seconds until the launcher ends."""
        return self._at - self._clock()

    @property
    def startable_min(self) -> int:
        """The largest `wall_time_min` of a job that may start now."""
        return startable_min(self._wall_time_min, self._clock() - self._began_at)

    def timer(self, delay_s: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[float]:
        """Yield the minutes that are left, each `delay_s` seconds, until there are none."""
        while self.left_s > 0:
            sleep(max(0.0, min(delay_s, self.left_s)))
            if self.left_s > 0:
                yield self.left_s / 60


def precise_mpi_source(source: type, ending: Ending) -> type:
    """Return Balsam's `SynchronousJobSource` that takes only what fits before `ending`.

    It gives its session back when `give_back` is called, not when the launcher begins to end: the server would put the
    runs back into the queue, another launcher start them, and this one's late word of its cut runs start them twice.
    """

    class PreciseSource(source):  # type: ignore[misc]
        def terminate(self) -> None:
            ending.give_back = super().terminate

        def get_jobs(self, *arguments: Any, **limits: Any) -> Any:
            self.max_wall_time_min, self.start_time = ending.startable_min, time.time()
            return super().get_jobs(*arguments, **limits)

    return PreciseSource


def precise_updater(updater: type, ending: Ending) -> type:
    """Return Balsam's `BulkStatusUpdater` after whose last word the session is given back."""

    class PreciseUpdater(updater):  # type: ignore[misc]
        def join(self, *arguments: Any) -> None:
            super().join(*arguments)
            ending.give_back()

    return PreciseUpdater


def precise_serial_source(source: type, ending: Ending) -> type:
    """Return Balsam's `FixedDepthJobSource` that takes only what fits before `ending`."""

    class PreciseSource(source):  # type: ignore[misc]
        def _get_acquire_parameters(self, num_jobs: int) -> dict[str, Any]:
            asked: dict[str, Any] = super()._get_acquire_parameters(num_jobs)
            return {**asked, "max_wall_time_min": ending.startable_min}

    return PreciseSource


def precise_master(master: type) -> type:
    """Return Balsam's serial `Master`, which tells its workers each job's `wall_time_min` in the job's environment."""

    class PreciseMaster(master):  # type: ignore[misc]
        def job_to_dict(self, job: Any) -> dict[str, Any]:
            told: dict[str, Any] = super().job_to_dict(job)
            told["envs"][WALL_TIME_VARIABLE] = str(job.wall_time_min)
            return told

    return PreciseMaster


def precise_worker(worker: type, ending: Ending) -> type:
    """Return Balsam's serial `Worker` that does not start what it fetched early when it no longer fits."""

    class PreciseWorker(worker):  # type: ignore[misc]
        runnable_cache: dict[int, dict[str, Any]]

        def start_jobs(self) -> Any:
            fetched, startable = self.runnable_cache, ending.startable_min
            late = {key: job for key, job in fetched.items() if int(job["envs"].get(WALL_TIME_VARIABLE, 0)) > startable}
            self.runnable_cache = {key: job for key, job in fetched.items() if key not in late}
            started = super().start_jobs()
            self.runnable_cache.update(late)  # they go back to the queue when the session ends
            return started

    return PreciseWorker


def mend_mpi_mode(poll_s: float) -> None:
    """Let Balsam's MPI mode in this process keep its end, and look for work each `poll_s` seconds."""
    from balsam.site.launcher import _mpi_mode

    ending = Ending.of_arguments(sys.argv)
    _mpi_mode.countdown_timer_min = lambda _minutes, delay_sec: ending.timer(min(poll_s, delay_sec))
    _mpi_mode.SynchronousJobSource = precise_mpi_source(_mpi_mode.SynchronousJobSource, ending)
    _mpi_mode.BulkStatusUpdater = precise_updater(_mpi_mode.BulkStatusUpdater, ending)


def mend_serial_mode() -> None:
    """Let Balsam's serial mode in this process, master or worker, keep its end."""
    from balsam.site.launcher import _serial_mode_master, _serial_mode_worker

    ending = Ending.of_arguments(sys.argv)
    _serial_mode_master.countdown_timer_min = lambda _minutes, delay_sec: _first_at_once(ending, delay_sec)
    _serial_mode_master.FixedDepthJobSource = precise_serial_source(_serial_mode_master.FixedDepthJobSource, ending)
    _serial_mode_master.Master = precise_master(_serial_mode_master.Master)
    _serial_mode_worker.Worker = precise_worker(_serial_mode_worker.Worker, ending)


def _first_at_once(ending: Ending, delay_s: float) -> Iterator[float]:
    """Yield once whatever is left: the master takes the first before it begins, and dies of an empty timer."""
    yield max(ending.left_s, 0.0) / 60
    yield from ending.timer(delay_s)
