"""PostgreSQL's data on fast local storage, and in the stack's folder all that it takes to make it again.

``shipped/N/`` in the stack's folder has a base backup and the log (WAL) since then, which ``pg_receivewal`` writes
there as PostgreSQL does. PostgreSQL takes that receiver for a synchronous standby: a commit is answered only when its
log is on the disk there, too. So whatever happens to the local storage, nothing that was acknowledged is lost. Each
start makes the local data anew from the newest base and its log, on whatever host, and begins with a new base.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from deephyper_balsam.common.private import write_private
from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.server import programs
from deephyper_balsam.server.postgres import Postgres
from deephyper_balsam.server.stack_state import State

NAME = "node-local"
SHARED = "shared"
_PREFIX = "dhb-data-"
_STANDBY = "balsam"
_SEGMENT = "[0-9A-F]" * 24
_PLACES = ("/local/scratch", "/tmp")
_POLL_S = 0.1


def place_of(said: str) -> Path:
    """Return the folder that ``node-local`` or ``node-local:PATH`` means on this host.

    Raises
    ------
    InputError
        When it is neither, or there is no such folder.
    """
    name, colon, path = said.partition(":")
    if name != NAME or (colon and not path):
        raise InputError(f"The data can be node-local, node-local:FOLDER or shared, not {said!r}.")
    places = [path] if colon else [os.environ.get("TMPDIR", ""), *_PLACES, tempfile.gettempdir()]
    for place in filter(None, places):
        if os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise InputError(f"There is no folder {places[0]} for {said} data in which you may write on this host.")


class NodeLocal:
    """The local data of a stack, and what is shipped to its folder.

    Parameters
    ----------
    folder
        The stack's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shipped = folder / "shipped"

    @property
    def newest(self) -> Path | None:
        """The newest base that is whole, with its log beside it."""
        whole = [path for path in self._shipped.glob("[0-9]*") if (path / "base" / "PG_VERSION").is_file()]
        return max(whole, key=lambda path: int(path.name), default=None)

    def place(self, state: State, password: str) -> Shipping | None:
        """Make the data where the record says it shall be.

        Parameters
        ----------
        state
            The record, in which `data_dir` is set. What it named before is removed: all of that is shipped.
        password
            Of the database.

        Returns
        -------
        Shipping
            By which the log comes to the stack's folder; None where the data is in that folder.

        Raises
        ------
        InputError
            When there is no such place.
        """
        if state.data_dir is not None:
            remove(Path(state.data_dir))
            state.data_dir = None
        if state.data is None:
            if self.newest is not None:
                fresh = self._folder / "postgres.new"
                for old in (fresh, self._folder / "postgres"):
                    shutil.rmtree(old, ignore_errors=True)
                self.fill(fresh)
                fresh.rename(self._folder / "postgres")
            return None
        try:
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place_of(state.data)))  # mode 0700
        except OSError as error:
            raise InputError(f"No folder for {state.data} data can be made: {error.strerror}.") from error
        self.fill(made / "postgres")
        state.data_dir = str(made / "postgres")
        newest = self.newest
        return Shipping(self._folder, 1 if newest is None else int(newest.name) + 1, password)

    def fill(self, data: Path) -> None:
        """Make the data in a folder that there is not yet."""
        newest, before = self.newest, self._folder / "postgres"
        if newest is not None:
            shutil.copytree(newest / "base", data, symlinks=True)
            logs = data / "pg_wal"
            shutil.rmtree(logs, ignore_errors=True)
            (logs / "archive_status").mkdir(parents=True, mode=0o700)
            for path in sorted((newest / "wal").glob(f"{_SEGMENT}*")):
                name = path.name.removesuffix(".partial")
                if not (newest / "wal" / name).exists() or path.name == name:
                    shutil.copy2(path, logs / name)
        elif (before / "PG_VERSION").is_file():
            shutil.copytree(before, data, symlinks=True)

    def end(self) -> None:
        """Forget what was shipped: the data is in the stack's folder again."""
        shutil.rmtree(self._shipped, ignore_errors=True)


class Shipping:
    """One base of the data in the stack's folder, and the log since then.

    Parameters
    ----------
    folder
        The stack's folder.
    number
        Of the base.
    password
        Of the database.
    """

    def __init__(self, folder: Path, number: int, password: str) -> None:
        self._folder, self._base = folder, folder / "shipped" / str(number)
        self._known, self._password = folder / "pgpass", password

    @property
    def env(self) -> dict[str, str]:
        """What PostgreSQL's programs find in their environment: where the password is."""
        return {"PGPASSFILE": str(self._known), "PGREQUIREAUTH": "scram-sha-256"}

    def receiver(self, socket_dir: Path) -> list[str]:
        """Return the command that writes PostgreSQL's log to the stack's folder as it grows; its place is made."""
        shutil.rmtree(self._base, ignore_errors=True)
        (self._base / "wal").mkdir(mode=0o700, parents=True)
        for folder in (self._base, self._base.parent):
            folder.chmod(0o700)
        write_private(self._known, f"*:*:*:*:{self._password}\n")
        where = f"host='{_quoted(str(socket_dir))}' user=postgres application_name={_STANDBY}"
        wal = str(self._base / "wal")
        program = str(programs.installed() / "pg_receivewal")
        return [program, "--directory", wal, "--synchronous", "--no-loop", "--no-password", "--dbname", where]

    def begin(self, database: Postgres, timeout_s: float) -> None:
        """Ship a base, and from then on let each commit wait until its log has arrived.

        Raises
        ------
        ServerError
            When the base cannot be made, or the receiver does not come.
        """
        folder = self._base
        self._await(database, "SELECT count(*) > 0 FROM pg_stat_replication WHERE state = 'streaming'", timeout_s)
        command = [str(programs.installed() / "pg_basebackup"), "--pgdata", str(folder / "base.new")]
        command += ["--wal-method=none", "--checkpoint=fast", "--no-manifest", "--no-password", "--username=postgres"]
        command += [f"--host={database.socket_dir}"]
        done = subprocess.run(
            command,
            env={**os.environ, **self.env},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise ServerError(f"pg_basebackup ended with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")
        database.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{_STANDBY}'")
        database.execute("SELECT pg_reload_conf()")
        self._await(database, "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'", timeout_s)
        database.execute("SELECT pg_logical_emit_message(true, 'balsam', 'shipped')")  # what was before has arrived
        (folder / "base.new").rename(folder / "base")
        for other in folder.parent.glob("[0-9]*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        shutil.rmtree(self._folder / "postgres", ignore_errors=True)  # all of it is in the base

    @staticmethod
    def _await(database: Postgres, question: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not database.execute(question):
            if time.monotonic() > deadline:
                raise ServerError("PostgreSQL's log does not reach the stack's folder: see logs/postgres.log.")
            time.sleep(_POLL_S)


def remove(data: Path) -> None:
    """Remove local data, with the private folder that was made for it; without harm when there is none."""
    if data.parent.name.startswith(_PREFIX):
        with contextlib.suppress(OSError):
            shutil.rmtree(data.parent)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
