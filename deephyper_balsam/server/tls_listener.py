"""The API for other hosts: TCP connections that speak TLS, served by the app that the Unix socket serves.

Who speaks plain HTTP is told so and sends nothing more. A handshake has ten seconds, and not many are under way at
once: strangers can connect here. The certificate is renewed while the server runs; connections that stand keep theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from deephyper_balsam.errors import DeepHyperBalsamError
from deephyper_balsam.server.certificates import Certificates

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""How long a connection that is not used stays open: a handshake costs both sides some processor time."""

_HANDSHAKE_S = 10.0
_HANDSHAKES_AT_ONCE = 256
_LOOK_S = 3600.0
_TLS_RECORD = b"\x16"
_PLAIN = b"This port speaks TLS alone. Use https:// and the client.yml that `deephyper-balsam server up` wrote.\n"
_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\ncontent-length: "
    + str(len(_PLAIN)).encode()
    + b"\r\n\r\n"
    + _PLAIN
)


def tls_context(certificates: Certificates) -> ssl.SSLContext:
    """Return the server's side of TLS 1.2 and newer with its present certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificates.chain)
    return context


def keep_valid(context: ssl.SSLContext, folder: Path, names: Sequence[str], every_s: float = _LOOK_S) -> None:
    """Renew the server's certificate before it ends, from a thread of this process.

    Parameters
    ----------
    context
        What new connections use.
    folder
        With the authority.
    names
        For which the certificate holds.
    every_s
        Seconds between two looks.
    """
    certificates = Certificates(folder)

    def look() -> None:
        while True:
            time.sleep(every_s)
            try:
                if certificates.renew(names):
                    context.load_cert_chain(certificates.chain)
            except (OSError, DeepHyperBalsamError) as error:
                logger.error("The server's certificate could not be renewed: %s", error)

    threading.Thread(target=look, name="certificate", daemon=True).start()


class Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's server, which may listen for other hosts beside its sockets.

    Parameters
    ----------
    config
        uvicorn's.
    tls
        A TCP socket that listens, and the server's side of TLS; None: no other host reaches the server.
    """

    def __init__(self, config: uvicorn.Config, tls: tuple[socket.socket, ssl.SSLContext] | None = None) -> None:
        super().__init__(config)
        self._tls = tls
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        if self._tls is not None:
            listener, context = self._tls
            self._accepting = asyncio.get_running_loop().create_task(
                TlsListener(listener, context, self._new_protocol).run()
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to serve."""
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown(sockets)

    def _new_protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made


class TlsListener:
    """Accepts connections and gives those that speak TLS to the server's protocol.

    Parameters
    ----------
    listener
        A TCP socket that listens.
    context
        The server's side of TLS.
    protocol
        Makes the protocol for a connection.
    """

    def __init__(
        self, listener: socket.socket, context: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listener, self._context, self._protocol = listener, context, protocol
        self._handshakes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        room = asyncio.Semaphore(_HANDSHAKES_AT_ONCE)
        while True:
            await room.acquire()
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # no descriptors left, or a client that is gone already
                room.release()
                logger.warning("A connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
                continue
            task = loop.create_task(self._begin(connection))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)
            task.add_done_callback(lambda _: room.release())

    async def _begin(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        given = False
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            first = await asyncio.wait_for(_peek(loop, connection), _HANDSHAKE_S)
            if first == _TLS_RECORD:
                given = True  # the transport closes it from here on
                await loop.connect_accepted_socket(
                    self._protocol, connection, ssl=self._context, ssl_handshake_timeout=_HANDSHAKE_S
                )
            elif first:
                await asyncio.wait_for(loop.sock_sendall(connection, _ANSWER), _HANDSHAKE_S)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(asyncio.TimeoutError):  # what it sent is read, or the answer would be lost
                    await asyncio.wait_for(_drain(loop, connection), 1.0)
        except (OSError, asyncio.TimeoutError) as error:  # ssl.SSLError is an OSError
            logger.info("A connection did not come to TLS: %s", error)
        finally:
            if not given:
                connection.close()


async def _peek(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bytes:
    """Wait for the first byte, and leave it there."""
    ready: asyncio.Future[Any] = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, tell)
    try:
        await ready
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


async def _drain(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    while await loop.sock_recv(connection, 65536):
        pass
