"""The end of a launcher's time, kept exactly.

A launcher takes only jobs whose `wall_time_min` fits into what is left before it ends itself, rounded down. Balsam's
own MPI mode reckons with the end of the allocation, two minutes after its own; in the last half minute both modes
reckon with no end at all; and serial mode fetches jobs long before it starts them.

And it ends in order, also when a scheduler signals all its processes at once: first the runs end, then the launcher
says its last word about them, then it gives its session back. A word after that would leave a job RUNNING for ever.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from deephyper_balsam.sites.batch import WALL_TIME_VARIABLE

logger = logging.getLogger(__name__)

_EARLY_SHARE = 0.1
_EARLIEST_S, _LATEST_S = 120.0, 6.0
_SHORT_MIN = 3
_WORKER_ANSWERS_S = 10.0
_RUNS_END_S = 2.0  # a worker that is told to end kills what still runs after a tenth of a second
_MASTER_ENDS_S = 20.0  # Slurm kills what is left 30 s after its first signal
_FEED_S = 0.2  # what was put into a queue is under way for a moment
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


def when_told(told: Any) -> type:
    """Return what stands for Balsam's `SigHandler` in a launcher's helper process: it ends when the launcher says so.

    Or when the launcher is gone.

    Parameters
    ----------
    told
        A `multiprocessing.Event` that the launcher sets.
    """

    class WhenTold:
        def __init__(self) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def is_set(self) -> bool:
            launcher = multiprocessing.parent_process()
            return bool(told.is_set()) or (launcher is not None and not launcher.is_alive())

        def wait_until_exit(self, timeout: float = 1.0) -> bool:
            told.wait(timeout)
            return self.is_set()

    return WhenTold


def precise_updater(updater: type, ending: Ending, told: Any) -> type:
    """Return Balsam's `BulkStatusUpdater` that ends when `told` to; after its last word the session is given back."""

    class PreciseUpdater(updater):  # type: ignore[misc]
        def terminate(self) -> None:
            told.set()

        def _drain_queue(self) -> None:
            time.sleep(_FEED_S)
            super()._drain_queue()

        def join(self, *arguments: Any) -> None:
            super().join(*arguments)
            ending.give_back()

    return PreciseUpdater


def precise_serial_source(source: type, ending: Ending, told: Any) -> type:
    """Return Balsam's `FixedDepthJobSource` that takes only what fits before `ending`, and ends when `told` to."""

    class PreciseSource(source):  # type: ignore[misc]
        def terminate(self) -> None:
            told.set()

        def _get_acquire_parameters(self, num_jobs: int) -> dict[str, Any]:
            asked: dict[str, Any] = super()._get_acquire_parameters(num_jobs)
            return {**asked, "max_wall_time_min": ending.startable_min}

    return PreciseSource


def precise_master(master: type, sleep: Callable[[float], None] = time.sleep) -> type:
    """Return Balsam's serial `Master` that ends the runs before its last word about them.

    It tells its workers each job's `wall_time_min` in the job's environment.
    """

    class PreciseMaster(master):  # type: ignore[misc]
        _cut: frozenset[int] = frozenset()

        def update_job_states(self, done_ids: Any, error_logs: Any, started_ids: Any) -> None:
            """Say that a run began before saying that it ended, where a worker tells both at once.

            Runs that fail while a signal ends everything are cut: the signal has reached them too.
            """
            cut = frozenset(log[0] for log in error_logs if self.sig_handler.is_set())
            super().update_job_states([], [], started_ids)
            super().update_job_states(done_ids, [log for log in error_logs if log[0] not in cut], [])
            self._cut |= cut

        def shutdown(self) -> None:
            self._end_runs()
            self.num_workers = 0  # they have been told
            self.active_ids |= self._cut
            super().shutdown()

        def _end_runs(self) -> None:
            import zmq

            self.socket.setsockopt(zmq.RCVTIMEO, round(1000 * _WORKER_ANSWERS_S))
            try:
                for _ in range(self.num_workers):
                    told = self.socket.recv_json()
                    self.update_job_states(told["done"], told["error"], told["started"])
                    self.active_ids |= set(told["started"])
                    self.active_ids -= {*told["done"], *(log[0] for log in told["error"])}
                    self.socket.send_json({"exit": True})
            except zmq.Again:
                logger.warning("A worker did not answer for %.0f s: it has ended already", _WORKER_ANSWERS_S)
            sleep(_RUNS_END_S)

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


class PatientlyAwaited(subprocess.Popen):  # type: ignore[type-arg]
    """A serial master, which Balsam's worker would kill after five seconds, before its last word."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait at least as long as a master's end may take."""
        return super().wait(None if timeout is None else max(timeout, _MASTER_ENDS_S))


def mend_mpi_mode(poll_s: float) -> None:
    """Let Balsam's MPI mode in this process keep its end, and look for work each `poll_s` seconds."""
    from balsam.site import status_updater
    from balsam.site.launcher import _mpi_mode

    ending = Ending.of_arguments(sys.argv)
    _mpi_mode.countdown_timer_min = lambda _minutes, delay_sec: ending.timer(min(poll_s, delay_sec))
    _mpi_mode.SynchronousJobSource = precise_mpi_source(_mpi_mode.SynchronousJobSource, ending)
    told = multiprocessing.Event()
    status_updater.SigHandler = when_told(told)
    _mpi_mode.BulkStatusUpdater = precise_updater(_mpi_mode.BulkStatusUpdater, ending, told)


def mend_serial_mode() -> None:
    """Let Balsam's serial mode in this process, master or worker, keep its end."""
    from balsam.site import job_source, status_updater
    from balsam.site.launcher import _serial_mode_master, _serial_mode_worker

    ending = Ending.of_arguments(sys.argv)
    updater_told, source_told = multiprocessing.Event(), multiprocessing.Event()
    status_updater.SigHandler, job_source.SigHandler = when_told(updater_told), when_told(source_told)
    _serial_mode_master.BulkStatusUpdater = precise_updater(_serial_mode_master.BulkStatusUpdater, ending, updater_told)
    _serial_mode_master.countdown_timer_min = lambda _minutes, delay_sec: _first_at_once(ending, delay_sec)
    _serial_mode_master.FixedDepthJobSource = precise_serial_source(
        _serial_mode_master.FixedDepthJobSource, ending, source_told
    )
    _serial_mode_master.Master = precise_master(_serial_mode_master.Master)
    _serial_mode_worker.Worker = precise_worker(_serial_mode_worker.Worker, ending)
    _serial_mode_worker.launch_master_subprocess = lambda: PatientlyAwaited([sys.executable, *sys.argv, "--run-master"])


def _first_at_once(ending: Ending, delay_s: float) -> Iterator[float]:
    """Yield once whatever is left: the master takes the first before it begins, and dies of an empty timer."""
    yield max(ending.left_s, 0.0) / 60
    yield from ending.timer(delay_s)
