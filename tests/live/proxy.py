"""A proxy before Balsam's real API that loses requests and answers, answers 500 and is slow, by a seeded schedule."""

from __future__ import annotations

import random
import shutil
import socket
import threading
import time
from collections import Counter
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import yaml

from deephyper_balsam.common.private import private_folder
from deephyper_balsam.store import sockets

FAULTS = ("lost request", "lost answer", "500 before", "500 after", "slow")


class Proxy:
    """Passes requests on to the API at `url`; while `share` > 0, that share of them meets one of `FAULTS`, all in turn.

    `met` counts what requests met; `lost_creations` how many creations of jobs were done and not answered.
    """

    def __init__(self, url: str, seed: int) -> None:
        self.share = 0.0
        self.met: Counter[str] = Counter()
        self.lost_creations = 0
        self._path = sockets.path_of(url) or ""
        self._folder = private_folder()
        self._rng = random.Random(seed)
        self._due = 0.0
        self._deck: list[str] = []  # shuffled, so that every fault is met before one is met again
        self._lock = threading.Lock()
        self._server = _Server(str(self._folder / "proxy.sock"), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return sockets.url_of(str(self._server.server_address))

    def credentials(self, real: Path, path: Path) -> Path:
        """Write a credentials file that leads through the proxy."""
        path.write_text(
            yaml.safe_dump({**yaml.safe_load(real.read_text(encoding="utf-8")), "api_root": self.url}), encoding="utf-8"
        )
        key = real.with_suffix(".key").read_text(encoding="utf-8")
        path.with_suffix(".key").write_text(key, encoding="utf-8")
        return path

    def draw(self) -> str | None:
        """What the next request meets."""
        with self._lock:
            fault = None
            self._due += self.share * self._rng.uniform(0.5, 1.5)
            if self._due >= 1.0:
                self._due -= 1.0
                self._deck = self._deck or self._rng.sample(FAULTS, len(FAULTS))
                fault = self._deck.pop()
            self.met[fault or "nothing"] += 1
            return fault

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Make the request at the real API."""
        connection = sockets.Connection(self._path, timeout_s=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self._folder)


class _Server(ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        pass  # a connection that was dropped on purpose


def _handler_of(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def log_message(self, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
            fault = proxy.draw()
            if fault == "slow":
                time.sleep(2)
            if fault == "lost request":
                return self._drop()
            if fault == "500 before":
                return self._answer(500, "text/plain", b"injected")
            try:
                status, kind, answer = proxy.ask(self.command, self.path, body, headers)
            except (OSError, HTTPException):
                return self._drop()
            if fault in ("lost answer", "500 after") and (self.command, self.path) == ("POST", "/jobs/"):
                proxy.lost_creations += 1
            if fault == "lost answer":
                return self._drop()
            if fault == "500 after":
                return self._answer(500, "text/plain", b"injected")
            return self._answer(status, kind, answer)

        def _answer(self, status: int, kind: str, answer: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _drop(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

    return Handler
