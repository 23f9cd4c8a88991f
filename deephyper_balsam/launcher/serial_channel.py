"""How the workers of a serial launcher talk to its master, so that nobody else can.

Whoever answers a worker tells it what to run, and whoever asks the master gets jobs with the launcher's environment. So
on one machine both meet at a Unix socket in a folder that only its owner may enter; on several the traffic is encrypted
by CURVE, the master admits only the key of its workers, and the workers only the key of their master. The keys stand in
a private file that the launcher writes beside its log (the nodes share that file system) and takes away at its end;
nothing secret is on a command line or in an environment. The master chooses its port when it binds it and
adds it to the file, so nobody can take that port first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from deephyper_balsam.common.private import open_at_once

logger = logging.getLogger(__name__)

_SUFFIX = ".channel"
_APPEARS_S = 600.0
_LOOK_S = 0.2
_ANSWER_LOOK_MS = 2000
_LARGEST_MESSAGE = 64 * 2**20


class ChannelError(RuntimeError):
    """The private file of a launcher is not there, or is not private."""


class _Stops(Protocol):
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Keys:
    """A key pair of the master and one of its workers, as Z85 text."""

    master_public: str
    master_secret: str
    worker_public: str
    worker_secret: str

    @classmethod
    def new(cls) -> Keys:
        """Draw both pairs.

        Raises
        ------
        ChannelError
            When the ZeroMQ library of this Python was built without CURVE.
        """
        import zmq

        if not zmq.has("curve"):
            raise ChannelError(
                f"the ZeroMQ library here (libzmq {zmq.zmq_version()}) was built without CURVE, so that serial mode "
                "cannot keep strangers out. Install pyzmq from its wheel (pip install --force-reinstall pyzmq), or use "
                "the job mode mpi."
            )
        return cls(*(key.decode() for pair in (zmq.curve_keypair(), zmq.curve_keypair()) for key in pair))


def channel_file(log_file: Path | str) -> Path:
    """Return the private file of the launcher with this log."""
    return Path(f"{log_file}{_SUFFIX}")


def open_on_one_machine(log_file: Path, folder: Path) -> Path:
    """Write the private file of a launcher whose workers all run on this machine; their socket lies in `folder`.

    `folder` must be open to its owner alone.
    """
    return _create(log_file, {"socket": str(folder / "master")})


def open_on_nodes(log_file: Path) -> Path:
    """Write the private file of a launcher on several nodes, with new keys."""
    return _create(log_file, {"keys": asdict(Keys.new())})


def _create(log_file: Path, content: dict[str, Any]) -> Path:
    path = channel_file(log_file)
    # O_EXCL: whatever somebody else laid there is never written to, and no symbolic link is followed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o600)
        file.write(json.dumps(content) + "\n")
    return path


@dataclass(frozen=True)
class Channel:
    """What the private file says.

    Attributes
    ----------
    path
        The file.
    socket
        The Unix socket where master and workers meet; None: they meet at a port.
    keys
        The keys; None where there is a Unix socket.
    port
        Where the master listens; None until it does.
    """

    path: Path
    socket: str | None
    keys: Keys | None
    port: int | None = None

    @classmethod
    def read(cls, path: Path) -> Channel:
        """Read the private file.

        Raises
        ------
        ChannelError
            When it is not there, belongs to somebody else, can be read by others, or is broken.
        """
        try:
            with open(path, encoding="utf-8", opener=open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                    raise ChannelError(
                        f"{path} must be a file of user {os.geteuid()} that only its owner may read (0600), but it "
                        f"belongs to user {status.st_uid} and has the mode {stat.S_IMODE(status.st_mode):04o}"
                    )
                lines = file.read().splitlines(keepends=True)
        except OSError as error:
            raise ChannelError(f"cannot read {path}: {error.strerror}") from error
        try:
            content: dict[str, Any] = {}
            for line in lines:
                if line.endswith("\n"):  # the master may be writing
                    content.update(json.loads(line))
            keys = Keys(**content["keys"]) if "keys" in content else None
            socket = None if keys else str(content["socket"])
            return cls(path, socket, keys, int(content["port"]) if "port" in content else None)
        except (ValueError, KeyError, TypeError) as error:
            raise ChannelError(f"{path} is broken: {error!r}") from error

    def bind(self, socket: Any) -> None:
        """Let the master's socket listen; its port is added to the file."""
        import zmq

        socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_MESSAGE)
        if self.keys is None:
            socket.bind(f"ipc://{self.socket}")
            return
        socket.curve_publickey = self.keys.master_public.encode()
        socket.curve_secretkey = self.keys.master_secret.encode()
        socket.curve_server = True
        port = socket.bind_to_random_port("tcp://*")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"port": port}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def connect(self, socket: Any, host: str, sleep: Callable[[float], None] = time.sleep) -> None:
        """Connect a worker's socket to the master on `host`, as soon as it listens.

        Raises
        ------
        ChannelError
            When it does not within ten minutes.
        """
        if self.keys is None:
            socket.connect(f"ipc://{self.socket}")
            return
        socket.curve_serverkey = self.keys.master_public.encode()
        socket.curve_publickey = self.keys.worker_public.encode()
        socket.curve_secretkey = self.keys.worker_secret.encode()
        deadline = time.monotonic() + _APPEARS_S
        while (port := Channel.read(self.path).port) is None:
            if time.monotonic() > deadline:
                raise ChannelError(f"the master on {host} did not write its port to {self.path}")
            sleep(_LOOK_S)
        socket.connect(f"tcp://{host}:{port}")

    def guard(self, context: Any) -> _Stops | None:
        """Admit only the workers' key to sockets of the master's context; what is returned must be stopped before it.

        None where there are no keys.
        """
        if self.keys is None:
            return None
        from zmq.auth.thread import ThreadAuthenticator

        authenticator = ThreadAuthenticator(context, log=logging.getLogger(f"{__name__}.zap"))
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=_Only(self.keys.worker_public))
        return cast(_Stops, authenticator)


class _Only:
    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this key may speak; pyzmq asks."""
        return key == self._key


def secured(path: Path, alive: Callable[[], bool] = lambda: True) -> Any:
    """Return what stands for the module ``zmq`` in Balsam's master and worker: its sockets speak through the channel.

    Parameters
    ----------
    path
        The private file.
    alive
        Whether the master can still answer, as far as this process knows; a worker does not wait for a dead one.
    """
    from types import SimpleNamespace

    import zmq

    class ChannelSocket(zmq.Socket):  # type: ignore[type-arg]
        def bind(self, addr: str) -> Any:
            if not addr.endswith(":0"):
                return super().bind(addr)  # what the channel asks for, or another socket's
            channel = Channel.read(path)
            self.context.guard = channel.guard(self.context)
            return channel.bind(self)

        def connect(self, addr: str) -> Any:
            if not addr.endswith(":0"):
                return super().connect(addr)
            return Channel.read(path).connect(self, addr[len("tcp://") :].rpartition(":")[0])

        def recv_json(self, flags: int = 0, **kwargs: Any) -> Any:
            while self.type == zmq.REQ and not self.poll(_ANSWER_LOOK_MS):
                if not alive():
                    raise ChannelError("the master of this launcher has ended without a word")
            return super().recv_json(flags, **kwargs)

    class ChannelContext(zmq.Context):  # type: ignore[type-arg]
        _socket_class = ChannelSocket
        guard: _Stops | None = None

        def term(self) -> None:
            if self.guard is not None:
                self.guard.stop()
                self.guard = None
            super().term()

    return SimpleNamespace(
        Context=ChannelContext, REP=zmq.REP, REQ=zmq.REQ, LINGER=zmq.LINGER, RCVTIMEO=zmq.RCVTIMEO, Again=zmq.Again
    )


@dataclass(frozen=True)
class Report:
    """What a worker tells in one message.

    Attributes
    ----------
    source
        Its host.
    started, done
        Jobs whose run began, and whose run ended well.
    errors
        Job, exit code and last output of runs that ended otherwise.
    wanted
        How many jobs it can start.
    """

    source: str
    started: list[int]
    done: list[int]
    errors: list[tuple[int, int, str]]
    wanted: int

    @classmethod
    def read(cls, data: bytes) -> Report:
        """Read a message.

        Raises
        ------
        ValueError
            When it is none of a worker's.
        """
        message = json.loads(data)  # its errors are ValueErrors, UnicodeDecodeError among them
        if not isinstance(message, dict):
            raise ValueError(f"an object was expected, but got {type(message).__name__}")
        missing = {"source", "started", "done", "error", "request_num_jobs"} - set(message)
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        source, wanted = message["source"], message["request_num_jobs"]
        lists = [message[name] for name in ("started", "done", "error")]
        if not isinstance(source, str) or not _is_count(wanted) or not all(isinstance(one, list) for one in lists):
            raise ValueError("a host, a number and three lists were expected")
        started, done, errors = lists
        if not all(_is_count(job) for job in (*started, *done)):
            raise ValueError("a job is not a number")
        for error in errors:
            if not isinstance(error, list) or [type(part) for part in error] != [int, int, str]:
                raise ValueError("an error is not [job, exit code, text]")
        return cls(source, started, done, [(job, code, text) for job, code, text in errors], wanted)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def receive(socket: Any) -> Report | None:
    """Return what a worker says; None when nothing came in time, or when it was no message of a worker's.

    Such a message is logged and answered with nothing to do: the next one can come.
    """
    import zmq

    try:
        parts = socket.recv_multipart()
    except zmq.Again:
        return None
    try:
        if len(parts) != 1:
            raise ValueError(f"one part was expected, but got {len(parts)}")
        return Report.read(parts[0])
    except (ValueError, RecursionError) as error:
        logger.warning("A message that is no worker's was dropped: %s", error)
        with contextlib.suppress(zmq.ZMQError):
            socket.send_json({"new_jobs": [], "refused": str(error)})
        return None
