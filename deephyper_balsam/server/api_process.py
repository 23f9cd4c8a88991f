"""The API of a local stack as a process: started on a socket of ours, asked whether it is ours, ended."""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import secrets
import shutil
import socket
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from deephyper_balsam.common import processes
from deephyper_balsam.common.private import private_folder, require_private, write_private
from deephyper_balsam.common.processes import tail
from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.server import parts
from deephyper_balsam.server.addresses import find_address, listen, names_of
from deephyper_balsam.server.credentials import TOKEN_LIFE, Credentials
from deephyper_balsam.server.stack_folder import MARK_VARIABLE, StackFolder
from deephyper_balsam.server.stack_state import SOCKET, State
from deephyper_balsam.store import sockets

_BALSAMS_LOG = "server-balsam.log"
"""Where Balsam writes an error that ends it."""
_MARK = "stack"
_POLL_S = 0.05


class ApiProcess:
    """Balsam's API (`server/api.py`) in a process of its own.

    Parameters
    ----------
    files
        The stack's folder.
    credentials
        Its secrets.
    """

    def __init__(self, files: StackFolder, credentials: Credentials) -> None:
        self._files, self._credentials = files, credentials

    def up(self, state: State, database_url: str, *, restart: bool) -> bool:
        """Start it if it does not run, or does not answer.

        Parameters
        ----------
        state
            The record, which is kept up.
        database_url
            Of the database.
        restart
            Start it anew in any case.

        Returns
        -------
        bool
            Whether it was started.

        Raises
        ------
        ServerError
            When it does not start; the message has the end of its log.
        """
        recorded = state.processes.get("api")
        if not restart and recorded is not None and recorded.alive and self._answers_in_time(state):
            return False
        self.stop(state)
        cwd = self._files.path / "api"
        cwd.mkdir(mode=0o700, exist_ok=True)  # Balsam's server reads .env in its working directory
        log = self._files.logs / "api.log"
        state.api_dir = str(self._socket_folder(state))
        self._files.save(state)
        known = self._credentials.rotate()
        order: dict[str, Any] = {
            "environment": self.settings(database_url),
            **{name: known[name] for name in ("challenge_key", "username", "password")},
            "folder": str(self._files.path),
            "look_s": self._files.waits.look_s,
        }
        command = [sys.executable, "-m", "deephyper_balsam.server.api"]
        with contextlib.ExitStack() as listeners:  # before there is anybody to take their place
            own = listeners.enter_context(sockets.listen(Path(state.api_dir) / SOCKET))
            descriptors = [own.fileno()]
            command += ["--fd", str(own.fileno())]
            if state.listen is not None:
                others = listeners.enter_context(self._listen_for_others(state, order))
                descriptors.append(others.fileno())
                command += ["--tls-fd", str(others.fileno())]
            child, state.processes["api"] = processes.start(
                command,
                cwd=cwd,
                env=self._files.environment(),
                log=log,
                stdout_to_log=False,  # Balsam prints a line for each request there
                order=json.dumps(order),
                pass_fds=descriptors,
            )
        self._files.save(state)
        deadline = time.monotonic() + self._files.waits.start_s
        while child.poll() is None:
            if self.answers(state):
                return True
            if time.monotonic() > deadline:
                self.stop(state)
                raise ServerError(f"Balsam's API did not answer within {self._files.waits.start_s:.0f} s. {tail(log)}")
            time.sleep(_POLL_S)
        said = log if log.stat().st_size else self._files.logs / _BALSAMS_LOG
        raise ServerError(f"Balsam's API ended with exit code {child.returncode}. {tail(said)}")

    def listen_at(self, state: State, where: str | None, port: int | None) -> None:
        """Take note of where other hosts shall reach it; when that is new, it is stopped, to start there.

        Parameters
        ----------
        state
            The record, which is kept up.
        where
            ``auto``, an address, a network interface, or ``none``; None: as before.
        port
            None: as before.

        Raises
        ------
        InputError
            When this host has no such address.
        """
        before = (state.listen, state.port)
        if where == "none":
            state.listen = state.address = state.port = state.reason = None
        elif where is not None:
            find_address(where)
            state.listen = where
        if port is not None:
            if state.listen is None:
                raise InputError(
                    "A port is for a server that other hosts reach: say where it listens, too, for example "
                    "`deephyper-balsam server up --listen auto`."
                )
            state.port = port
        if before != (state.listen, state.port):
            self.stop(state)
            self._files.save(state)

    def _listen_for_others(self, state: State, order: dict[str, Any]) -> socket.socket:
        """Listen where other hosts reach it, and add to its order what it needs there."""
        assert state.listen is not None
        found = find_address(state.listen)
        try:
            listener = listen(found.address, state.port or 0)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or state.port is None:
                raise ServerError(f"Cannot listen at {found.address}, port {state.port}: {error.strerror}.") from error
            self._files.say(f"Another program has taken port {state.port} of {found.address}: another port is used.")
            listener = listen(found.address, 0)
        state.address, state.reason, state.port = found.address, found.reason, listener.getsockname()[1]
        names = names_of(found.address)
        self._files.certificates.renew(names)
        order.update(tls_folder=str(self._files.certificates.folder), tls_names=names)
        return listener

    def stop(self, state: State) -> None:
        """End it and every stray of its kind.

        Parameters
        ----------
        state
            The record, from which it is removed.
        """
        found = parts.find(state, "api", MARK_VARIABLE, self._files.path, "deephyper_balsam.server.api")
        parts.stop(state, "api", found, self._files.waits.stop_s)

    def answers(self, state: State) -> bool:
        """Whether our own API answers at once.

        Parameters
        ----------
        state
            The record.

        Returns
        -------
        bool
            False also when another answers in its place, or it is too busy.
        """
        return bool(self._challenge(state))

    def settings(self, database_url: str) -> dict[str, str]:
        """Return the variables by which Balsam's server is set.

        Parameters
        ----------
        database_url
            Of the database.

        Returns
        -------
        dict
            Names and values; one of them is a secret.
        """
        return {
            "BALSAM_DATABASE_URL": database_url,
            "BALSAM_AUTH_SECRET_KEY": self._credentials.secrets()["signing_key"],
            "BALSAM_AUTH_LOGIN_METHODS": '["password"]',
            "BALSAM_AUTH_TOKEN_TTL": str(int(TOKEN_LIFE.total_seconds())),
            "BALSAM_LOG_DIR": str(self._files.logs),
            "BALSAM_LOG_LEVEL": "WARNING",  # INFO writes a line for each request
            "BALSAM_REDIS_PARAMS": json.dumps({"unix_socket_path": str(self._files.path / "api" / "no-redis.sock")}),
        }

    def remove_socket_folder(self, state: State) -> None:
        """Remove the folder of its socket.

        Parameters
        ----------
        state
            The record.
        """
        if state.api_dir is None:
            return
        folder = Path(state.api_dir)
        with contextlib.suppress(OSError):
            require_private(folder)
            if (folder / _MARK).read_text() == str(self._files.path):
                shutil.rmtree(folder)

    def _socket_folder(self, state: State) -> Path:
        """Return the folder of the API's socket: that of the last time, so that running clients find it again."""
        folder = private_folder(state.api_dir, room=len(SOCKET))
        mark = folder / _MARK
        with contextlib.suppress(OSError):
            if mark.read_text() != str(self._files.path):  # this stack is a copy of another, which may run
                folder = private_folder(room=len(SOCKET))
                mark = folder / _MARK
        write_private(mark, str(self._files.path))
        return folder

    def _answers_in_time(self, state: State) -> bool:
        """Whether our own API answers, which may take a while: one that is merely busy must not be killed."""
        busy_s = self._files.waits.busy_s
        deadline = time.monotonic() + busy_s
        while (answers := self._challenge(state)) is None and time.monotonic() < deadline:
            self._files.say(
                f"Waiting: Balsam's API is busy; it is started anew if it does not answer within {busy_s:.0f} s."
            )
            time.sleep(self._files.waits.settle_s)
        return bool(answers)

    def _challenge(self, state: State) -> bool | None:
        """Ask the API for the proof that it knows the key of its start; None: it is there, and too busy to answer."""
        path = state.socket
        if path is None:
            return False
        nonce = secrets.token_hex(16)
        try:
            code, answer = self._credentials.ask(path, "GET", f"{sockets.PROVE_PATH}?nonce={nonce}")
        except TimeoutError:
            return None
        except OSError:
            return False
        if code == HTTPStatus.SERVICE_UNAVAILABLE:  # more connections than it takes at once
            return None
        expected = sockets.proof(self._credentials.secrets()["challenge_key"], nonce)
        return code == HTTPStatus.OK and isinstance(answer, str) and hmac.compare_digest(answer, expected)
