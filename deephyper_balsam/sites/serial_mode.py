"""Balsam's serial mode that ends when it should and shares jobs among its nodes.

For one machine, its master listens on 127.0.0.1 only.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from types import SimpleNamespace
from typing import Any

from deephyper_balsam.sites.ending import mend_serial_mode

LOOPBACK_VARIABLE = "DEEPHYPER_BALSAM_LOOPBACK"


def main() -> None:
    """Run Balsam's serial mode, on loopback if $DEEPHYPER_BALSAM_LOOPBACK is set.

    The master process is started by Balsam as this same file with ``--run-master``.
    """
    from balsam.site.launcher.serial_mode import entry_point

    if os.environ.get(LOOPBACK_VARIABLE):
        _stay_on_loopback()
    mend_serial_mode()
    _share_jobs()
    entry_point()


def fair_worker(worker: type) -> type:
    """Return Balsam's serial `Worker` that asks for what it can start, and starts it at once.

    Balsam's own keeps `serial_mode_prefetch_per_rank` jobs besides those that it runs. When fewer wait than that, as in
    a search, one node has them all and the others have nothing to do.
    """

    class FairWorker(worker):  # type: ignore[misc]
        job_specs: dict[int, dict[str, Any]]
        _share = 1.0  # of a node, that a job takes; as long as none was seen one is asked for
        _just_started: Any = ()

        @property
        def num_prefetch_jobs(self) -> int:
            """How many jobs there should be that wait on this node: what is free of it."""
            shares = [spec["node_occupancy"] for spec in self.job_specs.values()]
            self._share = min(shares, default=self._share)
            return int(self.node_manager.aggregate_free_nodes() / self._share + 1e-6)

        @num_prefetch_jobs.setter
        def num_prefetch_jobs(self, _setting: int) -> None:
            pass

        def start_jobs(self) -> list[int]:
            told, self._just_started = list(self._just_started), ()
            return [*told, *super().start_jobs()]

        def cycle(self) -> bool:
            goes_on = bool(super().cycle())
            if goes_on:
                self._just_started = super().start_jobs()
            return goes_on

    return FairWorker


def _share_jobs() -> None:
    from balsam.site.launcher import _serial_mode_worker

    _serial_mode_worker.Worker = fair_worker(_serial_mode_worker.Worker)


def _stay_on_loopback() -> None:
    import zmq
    from balsam.site.launcher import _serial_mode_worker

    class LoopbackSocket(zmq.Socket):  # type: ignore[type-arg]
        def bind(self, addr: str) -> Any:
            return super().bind(_loopback(addr))

        def connect(self, addr: str) -> Any:
            return super().connect(_loopback(addr))

    zmq.Context._socket_class = LoopbackSocket  # type: ignore[misc]
    # Balsam compares the machine's name with the first part of the master's, which fails where the name has dots.
    short_name = socket.gethostname().split(".")[0]
    _serial_mode_worker.socket = SimpleNamespace(gethostname=lambda: short_name)


def _loopback(address: str) -> str:
    return f"tcp://127.0.0.1:{address.rpartition(':')[2]}" if address.startswith("tcp://") else address


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)
    main()
