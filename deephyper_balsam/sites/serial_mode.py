"""Balsam's serial mode that ends when it should; for one machine, its master listens on 127.0.0.1 only."""

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
    entry_point()


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
