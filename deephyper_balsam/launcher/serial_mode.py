"""Balsam's serial mode that ends when it should, shares jobs among its nodes, and talks to nobody else.

Balsam's own worker looks once a second and asks for as many jobs as a setting says, so that a node that starts first
has all of them; its master holds that many again for each node. Here a node asks for what it can start, and the
master holds what the nodes asked for and did not get, and what is about to be asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from deephyper_balsam.common.patching import patch
from deephyper_balsam.launcher import fork_server, script
from deephyper_balsam.launcher.applications import tolerate_applications
from deephyper_balsam.launcher.serial_channel import channel_file, receive, secured
from deephyper_balsam.launcher.wall_time import GIVEN_BACK, keep_wall_time_in_serial_mode

LOOPBACK_VARIABLE = "DEEPHYPER_BALSAM_LOOPBACK"
POLL_VARIABLE = "DEEPHYPER_BALSAM_POLL_S"
_OURS = "launcher.serial_mode"
_MASTER = "balsam.site.launcher._serial_mode_master"
_WORKER = "balsam.site.launcher._serial_mode_worker"
_IS_MASTER = "--run-master"
_AHEAD_S = 1.0
_REMEMBERED_S = 10.0
_QUIET_MS = 2000


def main() -> None:
    """Run Balsam's serial mode, looking each $DEEPHYPER_BALSAM_POLL_S seconds.

    With $DEEPHYPER_BALSAM_LOOPBACK the allocation is this machine alone. The master process is started by Balsam as
    this same file with ``--run-master``.
    """
    if _IS_MASTER not in sys.argv:  # the worker of a node starts its runs
        fork_server.start()
    from balsam.site.launcher.serial_mode import entry_point

    poll_s = float(os.environ.get(POLL_VARIABLE, "1"))
    if os.environ.get(LOOPBACK_VARIABLE):
        _know_the_machine()
    keep_wall_time_in_serial_mode(poll_s)
    tolerate_applications()
    _share_jobs(poll_s)
    _close_to_strangers(sys.argv)
    entry_point()


def fair_worker(worker: type, poll_s: float = 1.0) -> type:
    """Return Balsam's serial `Worker` that asks for what it can start, and starts it at once.

    Balsam's own keeps `serial_mode_prefetch_per_rank` jobs besides those that it runs. When fewer wait than that, as in
    a search, one node has them all and the others have nothing to do.
    """

    class FairWorker(worker):  # type: ignore[misc]
        job_specs: dict[int, dict[str, Any]]
        runnable_cache: dict[int, dict[str, Any]]
        _share = 1.0  # of a node, that a job takes; as long as none was seen one is asked for
        _just_started: Any = ()

        @property
        def num_prefetch_jobs(self) -> int:
            """How many jobs there should be that wait on this node: what is free of it."""
            return int(self.node_manager.aggregate_free_nodes() / self._share + 1e-6)

        @num_prefetch_jobs.setter
        def num_prefetch_jobs(self, _setting: int) -> None:
            pass

        @property
        def delay_sec(self) -> float:
            """Seconds between two looks; Balsam's setting knows whole ones only."""
            return poll_s

        @delay_sec.setter
        def delay_sec(self, _setting: int) -> None:
            pass

        def start_jobs(self) -> list[int]:
            told, self._just_started = list(self._just_started), ()
            return [*told, *super().start_jobs()]

        def handle_error(self, id: int, retcode: int) -> Any:
            if getattr(self.app_runs[id], "given_back", False):
                self.cleanup_proc(id)
                return GIVEN_BACK, ""
            return super().handle_error(id, retcode)

        def cycle(self) -> bool:
            goes_on = bool(super().cycle())
            if goes_on:
                # Learnt as jobs come: short runs have ended by the next look
                seen = (*self.job_specs.values(), *self.runnable_cache.values())
                self._share = min((spec["node_occupancy"] for spec in seen), default=self._share)
                self._just_started = super().start_jobs()
            return goes_on

    return FairWorker


def sharing_source(source: type, at_first: int) -> type:
    """Return Balsam's `FixedDepthJobSource` that holds as many jobs as its master says, `at_first` until then."""

    class SharingSource(source):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._depth = multiprocessing.Value("i", at_first)  # it is read in a process of its own
            super().__init__(*arguments, **options)

        @property
        def prefetch_depth(self) -> int:
            """How many jobs are kept ready."""
            return int(self._depth.value)

        @prefetch_depth.setter
        def prefetch_depth(self, _setting: int) -> None:
            pass

        def want(self, count: int) -> None:
            """Keep so many jobs ready from now on."""
            self._depth.value = count

    return SharingSource


def sharing_master(master: type, clock: Callable[[], float] = time.monotonic) -> type:
    """Return Balsam's serial `Master` that holds no more jobs than can start soon, and drops what no worker said.

    What can start soon is what workers asked for and did not get, and as many as ended lately within a second.
    """

    class SharingMaster(master):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._unmet: dict[str, int] = {}
            self._ends: deque[tuple[float, int]] = deque()
            self._began_at = clock()
            super().__init__(*arguments, **options)

        def handle_request(self) -> None:
            import zmq

            self.socket.setsockopt(zmq.RCVTIMEO, _QUIET_MS)  # signals and the time are looked at all the same
            report = receive(self.socket)
            if report is None:
                return
            self.update_job_states(report.done, report.errors, report.started)
            finished = {*report.done, *(job for job, _, _ in report.errors)}
            self.active_ids |= set(report.started)
            self.active_ids -= finished
            self.num_outstanding_jobs -= len(finished)
            specs = self.acquire_jobs(report.wanted)
            self._unmet[report.source] = report.wanted - len(specs)
            self.job_source.want(sum(self._unmet.values()) + self._about_to_end(len(finished)))
            self.socket.send_json({"new_jobs": specs})
            self.num_outstanding_jobs += len(specs)

        def _about_to_end(self, ended: int) -> int:
            """How many runs will end within the time that it takes to fetch what replaces them."""
            now = clock()
            self._ends.append((now, ended))
            while self._ends[0][0] < now - _REMEMBERED_S:
                self._ends.popleft()
            over_s = max(1.0, min(_REMEMBERED_S, now - self._began_at))
            return int(_AHEAD_S * sum(count for _, count in self._ends) / over_s)

    return SharingMaster


def _share_jobs(poll_s: float) -> None:
    workers = int(sys.argv[sys.argv.index("--num-workers") + 1])
    patch(f"{_WORKER}.Worker", _OURS, lambda worker: fair_worker(worker, poll_s))
    patch(f"{_MASTER}.Master", _OURS, sharing_master)
    patch(f"{_MASTER}.FixedDepthJobSource", _OURS, lambda source: sharing_source(source, workers))


def _close_to_strangers(arguments: list[str]) -> None:
    masters: list[Any] = []

    def remembered(launch: Callable[[], Any]) -> Callable[[], Any]:
        def launch_master() -> Any:
            masters.append(launch())
            return masters[-1]

        return launch_master

    path = channel_file(arguments[arguments.index("--log-filename") + 1])
    patch(f"{_WORKER}.launch_master_subprocess", _OURS, remembered)
    patch(f"{_MASTER}.zmq", _OURS, lambda _: secured(path))
    patch(f"{_WORKER}.zmq", _OURS, lambda _: secured(path, lambda: all(master.poll() is None for master in masters)))


def _know_the_machine() -> None:
    # Balsam compares the machine's name with the first part of the master's, which fails where the name has dots.
    short_name = socket.gethostname().split(".")[0]
    patch(f"{_WORKER}.socket", _OURS, lambda _: SimpleNamespace(gethostname=lambda: short_name))


if __name__ == "__main__":
    sys.exit(script.run(main))
