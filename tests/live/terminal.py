"""A terminal for a command under test: what stands on its screen at the moment, and its size, which may change."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte


class Terminal:
    """Runs a command with its three streams on a pseudo-terminal that a terminal emulator reads."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path, columns: int = 80, rows: int = 24
    ) -> None:
        self._emulated = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._emulated)
        self._lock = threading.Lock()
        self.written = b""
        self._leader, follower = pty.openpty()
        self._set_size(columns, rows)
        self.process = subprocess.Popen(
            command,
            env={**env, "TERM": "xterm-256color"},
            cwd=cwd,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        os.close(follower)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self._leader, 65536)
            except OSError:  # the command has ended: Linux says so with an error
                return
            if not read:
                return
            with self._lock:
                self.written += read
                self._stream.feed(read)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, as somebody does who draws at its window."""
        with self._lock:
            self._emulated.resize(rows, columns)
            self._emulated.reset()
        self._set_size(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    @property
    def rows(self) -> list[str]:
        """What stands on the screen now."""
        with self._lock:
            return [row.rstrip() for row in self._emulated.display]

    @property
    def text(self) -> str:
        """The same as one text."""
        return "\n".join(self.rows)

    def close(self) -> int:
        """End the command if it has not ended; its exit code."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        self._reader.join(10)
        os.close(self._leader)
        return code
