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
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from deephyper_balsam.common.clock import steady
from deephyper_balsam.common.patching import patch
from deephyper_balsam.launcher.serial_channel import receive
from deephyper_balsam.node import failure_policy

WALL_TIME_VARIABLE = "DEEPHYPER_BALSAM_WALL_TIME_MIN"
logger = logging.getLogger(__name__)

_OURS = "launcher.wall_time"
_MPI = "balsam.site.launcher._mpi_mode"
_MASTER = "balsam.site.launcher._serial_mode_master"
_WORKER = "balsam.site.launcher._serial_mode_worker"
_EARLY_SHARE = 0.1
_EARLIEST_S, _LATEST_S = 120.0, 6.0
_SHORT_MIN = 3
_WORKER_ANSWERS_S = 10.0
_RUNS_END_S = 2.0  # a worker that is told to end kills what still runs after a tenth of a second
_MASTER_ENDS_S = 20.0  # Slurm kills what is left 30 s after its first signal
_MOST_UPDATES = 10_000  # as Balsam's own
_FEED_S = 0.2  # what was put into a queue is under way for a moment

GIVEN_BACK = 12346
"""The exit code by which a serial worker tells its master of a run that is to go back to the queue."""

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


class LauncherEnd:
    """When a launcher of so many minutes ends, seen from its start.

    Parameters
    ----------
    wall_time_min
        Minutes of the allocation. The launcher ends a little before that, to have time to stop its runs in order.
    """

    def __init__(self, wall_time_min: int, clock: Callable[[], float] = steady) -> None:
        self._wall_time_min, self._clock = wall_time_min, clock
        self._began_at = clock()
        self.give_back: Callable[[], None] = lambda: None
        self._at = self._began_at + 60.0 * wall_time_min - early_s(wall_time_min)

    @classmethod
    def of_arguments(cls, arguments: list[str]) -> LauncherEnd:
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


def precise_mpi_source(source: type, end: LauncherEnd) -> type:
    """Return Balsam's `SynchronousJobSource` that takes only what fits before `end`.

    It gives its session back when `give_back` is called, not when the launcher begins to end: the server would put the
    runs back into the queue, another launcher start them, and this one's late word of its cut runs start them twice.
    """

    class PreciseSource(source):  # type: ignore[misc]
        def terminate(self) -> None:
            end.give_back = super().terminate

        def get_jobs(self, *arguments: Any, **limits: Any) -> Any:
            # Balsam's reckons what is left by the time of day, from this moment: nobody sets the clock meanwhile
            self.max_wall_time_min, self.start_time = end.startable_min, time.time()
            return super().get_jobs(*arguments, **limits)

    return PreciseSource


def when_told(told: Any, look_s: float = 1.0) -> type:
    """Return what stands for Balsam's `SigHandler` in a launcher's helper process: it ends when the launcher says so.

    Or when the launcher is gone.

    Parameters
    ----------
    told
        A `multiprocessing.Event` that the launcher sets.
    look_s
        The helper looks for work at least each `look_s` seconds.
    """

    class WhenTold:
        def __init__(self) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def is_set(self) -> bool:
            launcher = multiprocessing.parent_process()
            return bool(told.is_set()) or (launcher is not None and not launcher.is_alive())

        def wait_until_exit(self, timeout: float = 1.0) -> bool:
            told.wait(min(timeout, look_s))
            return self.is_set()

    return WhenTold


def fair_launcher(launcher: type) -> type:
    """Return Balsam's MPI mode that gives back a run whose end is nobody's fault, and says why in Balsam's log."""

    class FairLauncher(launcher):  # type: ignore[misc]
        def check_run(self, run: Any) -> dict[str, Any]:
            status: dict[str, Any] = super().check_run(run)
            if status["state"] == "RUN_ERROR" and getattr(run, "given_back", False):
                logger.warning("A run goes back to the queue: the batch or the file system was away as it ended")
                at, why = status["state_timestamp"], {"message": failure_policy.GIVEN_BACK}
                return {"state": "RUN_TIMEOUT", "state_timestamp": at, "state_data": why}
            return status

    return FairLauncher


def precise_updater(updater: type, end: LauncherEnd, told: Any, hold_s: float = 1.0) -> type:
    """Return Balsam's `BulkStatusUpdater` that ends when `told` to; after its last word the session is given back.

    And that sends what came within `hold_s` seconds. Balsam's own waits until nothing has come for a second, which in a
    search of short runs is a quarter of a minute and more: trials run, and everybody sees them wait.
    """

    class PreciseUpdater(updater):  # type: ignore[misc]
        def terminate(self) -> None:
            told.set()

        def _run(self) -> None:
            self.client.close_session()
            stop = when_told(told)()
            while not stop.is_set():
                arrived = _arrived(self.queue, hold_s)
                if arrived:
                    self._perform_updates(arrived)
            self._drain_queue()

        def _drain_queue(self) -> None:
            time.sleep(_FEED_S)
            super()._drain_queue()

        def join(self, *arguments: Any) -> None:
            super().join(*arguments)
            end.give_back()

    return PreciseUpdater


def _arrived(source: Any, hold_s: float) -> list[Any]:
    """Return the first item that comes within a second, and all that come within `hold_s` after it."""
    items: list[Any] = []
    wait_s, until = 1.0, math.inf
    while wait_s > 0 and len(items) < _MOST_UPDATES:
        try:
            items.append(source.get(timeout=wait_s))
        except queue.Empty:
            break
        until = min(until, time.monotonic() + hold_s)
        wait_s = until - time.monotonic()
    return items


def precise_serial_source(source: type, end: LauncherEnd, told: Any) -> type:
    """Return Balsam's `FixedDepthJobSource` that takes only what fits before `end`, and ends when `told` to."""

    class PreciseSource(source):  # type: ignore[misc]
        def terminate(self) -> None:
            told.set()

        def _get_acquire_parameters(self, num_jobs: int) -> dict[str, Any]:
            asked: dict[str, Any] = super()._get_acquire_parameters(num_jobs)
            return {**asked, "max_wall_time_min": end.startable_min}

    return PreciseSource


def precise_master(
    master: type, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> type:
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
            given_back = [log[0] for log in error_logs if log[1] == GIVEN_BACK and log[0] not in cut]
            super().update_job_states([], [], started_ids)
            failed = [log for log in error_logs if log[0] not in cut and log[1] != GIVEN_BACK]
            super().update_job_states(done_ids, failed, [])
            for job in given_back:
                logger.warning("Job %d goes back to the queue: its file system was away as it ended", job)
                why = {"message": failure_policy.GIVEN_BACK}
                self.status_updater.put(job, "RUN_TIMEOUT", state_timestamp=datetime.utcnow(), state_data=why)
            self._cut |= cut

        def shutdown(self) -> None:
            self._end_runs()
            self.num_workers = 0  # they have been told
            self.active_ids |= self._cut
            super().shutdown()

        def _end_runs(self) -> None:
            import zmq

            heard: set[str] = set()
            deadline = clock() + _WORKER_ANSWERS_S
            while len(heard) < self.num_workers and (left_s := deadline - clock()) > 0:
                self.socket.setsockopt(zmq.RCVTIMEO, max(1, round(1000 * left_s)))
                told = receive(self.socket)
                if told is None:
                    continue
                self.update_job_states(told.done, told.errors, told.started)
                self.active_ids |= set(told.started)
                self.active_ids -= {*told.done, *(job for job, _, _ in told.errors)}
                self.socket.send_json({"exit": True})
                heard.add(told.source)
                deadline = clock() + _WORKER_ANSWERS_S
            if len(heard) < self.num_workers:
                logger.warning("A worker did not answer for %.0f s: it has ended already", _WORKER_ANSWERS_S)
            sleep(_RUNS_END_S)

        def job_to_dict(self, job: Any) -> dict[str, Any]:
            told: dict[str, Any] = super().job_to_dict(job)
            told["envs"][WALL_TIME_VARIABLE] = str(job.wall_time_min)
            return told

    return PreciseMaster


def precise_worker(worker: type, end: LauncherEnd) -> type:
    """Return Balsam's serial `Worker` that does not start what it fetched early when it no longer fits."""

    class PreciseWorker(worker):  # type: ignore[misc]
        runnable_cache: dict[int, dict[str, Any]]

        def start_jobs(self) -> Any:
            fetched, startable = self.runnable_cache, end.startable_min
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


def keep_wall_time_in_mpi_mode(poll_s: float) -> None:
    """Let Balsam's MPI mode in this process keep its wall time.

    Parameters
    ----------
    poll_s
        It looks for work, and says what its runs do, each so many seconds.
    """
    end = LauncherEnd.of_arguments(sys.argv)
    told = multiprocessing.Event()
    patch(f"{_MPI}.countdown_timer_min", _OURS, lambda _: lambda _minutes, delay_sec: end.timer(min(poll_s, delay_sec)))
    patch(f"{_MPI}.SynchronousJobSource", _OURS, lambda source: precise_mpi_source(source, end))
    patch(f"{_MPI}.Launcher", _OURS, fair_launcher)
    patch(f"{_MPI}.BulkStatusUpdater", _OURS, lambda updater: precise_updater(updater, end, told, poll_s))


def keep_wall_time_in_serial_mode(poll_s: float = 1.0) -> None:
    """Let Balsam's serial mode in this process, master or worker, keep its wall time.

    Parameters
    ----------
    poll_s
        It looks for jobs, and says what they do, each so many seconds.
    """
    end = LauncherEnd.of_arguments(sys.argv)
    updater_told, source_told = multiprocessing.Event(), multiprocessing.Event()
    launch = [sys.executable, *sys.argv, "--run-master"]
    patch("balsam.site.job_source.SigHandler", _OURS, lambda _: when_told(source_told, poll_s))
    patch(f"{_MASTER}.BulkStatusUpdater", _OURS, lambda updater: precise_updater(updater, end, updater_told, poll_s))
    patch(f"{_MASTER}.countdown_timer_min", _OURS, lambda _: lambda _minutes, delay_sec: _first_at_once(end, delay_sec))
    patch(f"{_MASTER}.FixedDepthJobSource", _OURS, lambda source: precise_serial_source(source, end, source_told))
    patch(f"{_MASTER}.Master", _OURS, precise_master)
    patch(f"{_WORKER}.Worker", _OURS, lambda worker: precise_worker(worker, end))
    patch(f"{_WORKER}.launch_master_subprocess", _OURS, lambda _: lambda: PatientlyAwaited(launch))


def _first_at_once(end: LauncherEnd, delay_s: float) -> Iterator[float]:
    """Yield once whatever is left: the master takes the first before it begins, and dies of an empty timer."""
    yield max(end.left_s, 0.0) / 60
    yield from end.timer(delay_s)
