"""Balsam's serial mode for one machine: its master listens on 127.0.0.1, Balsam's own on every address."""

from __future__ import annotations

import multiprocessing
import socket
from types import SimpleNamespace
from typing import Any


def main() -> None:
    """Run Balsam's serial mode on loopback.

    The master process is started by Balsam as this same file with ``--run-master``.
    """
    import zmq
    from balsam.site.launcher import _serial_mode_worker
    from balsam.site.launcher.serial_mode import entry_point

    class LoopbackSocket(zmq.Socket):  # type: ignore[type-arg]
        def bind(self, addr: str) -> Any:
            return super().bind(_loopback(addr))

        def connect(self, addr: str) -> Any:
            return super().connect(_loopback(addr))

    zmq.Context._socket_class = LoopbackSocket  # type: ignore[misc]
    # Balsam compares the machine's name with the first part of the master's, which fails where the name has dots.
    short_name = socket.gethostname().split(".")[0]
    _serial_mode_worker.socket = SimpleNamespace(gethostname=lambda: short_name)
    entry_point()


def _loopback(address: str) -> str:
    return f"tcp://127.0.0.1:{address.rpartition(':')[2]}" if address.startswith("tcp://") else address


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)
    main()
