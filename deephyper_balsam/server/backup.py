"""Backups of a stack: one private file with the database, the secrets and the site, from which another folder goes on.

The database is dumped by ``pg_dump``, which sees one moment of it, whatever happens meanwhile: all that the API had
acknowledged when the backup began is in it. A dump, and not a copy of PostgreSQL's files, since another release of
PostgreSQL reads it, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from deephyper_balsam.common.private import write_private
from deephyper_balsam.errors import InputError, ServerError
from deephyper_balsam.server import programs
from deephyper_balsam.server.postgres import Postgres
from deephyper_balsam.server.sign_of_life import NO_LINKS
from deephyper_balsam.server.stack import LocalStack
from deephyper_balsam.server.stack_state import State, Waits
from deephyper_balsam.sites.agent import PID_FILE
from deephyper_balsam.sites.local_batch import BatchJobs

_FORMAT = 1
_DUMP = "database.dump"
_SECRETS = "secrets.json"
_SITE = "site"
_TLS = "tls"
_NOT_OF_THE_SITE = ("log", PID_FILE)
_DATA = "data"
_IN_MEMORY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Manifest:
    """What a backup holds.

    Attributes
    ----------
    format
        The version of what stands in the file.
    made_at
        When the backup began (ISO 8601).
    host, folder
        Whose it is.
    site_name
        The name of the stack's site; None: it has none.
    with_data
        Whether the files of the runs are in it.
    site_config
        What the site was made of; None: it is this machine's.
    """

    format: int
    made_at: str
    host: str
    folder: str
    site_name: str | None
    with_data: bool
    site_config: str | None = None


def back_up(stack: LocalStack, target: Path, *, with_data: bool = False) -> Path:
    """Write a backup of a stack that runs, or that is stopped.

    Parameters
    ----------
    stack
        The stack.
    target
        A file that there is not yet; or a folder, in which a file of a new name is made.
    with_data
        Whether to take the files of the runs, too.

    Returns
    -------
    Path
        The file; only its owner may read it, for it holds the stack's secrets.

    Raises
    ------
    InputError
        When there is no place for it, or another host runs the stack.
    ServerError
        When the database cannot be dumped.
    """
    now = datetime.now(timezone.utc)
    path = _new_file(target, f"{stack.folder.name}-{now:%Y%m%d-%H%M%S}.tar", stack.folder)
    site = stack.site()
    manifest = Manifest(
        _FORMAT,
        now.isoformat(timespec="seconds"),
        socket.gethostname(),
        str(stack.folder),
        None if site is None else site.name,
        with_data,
        stack.files.state().site_config,
    )
    with _working_folder(path.parent) as work:
        with _running(stack) as database:
            _dump(database, work)
        whole = work / "whole.tar"
        with tarfile.open(whole, "x", format=tarfile.PAX_FORMAT) as tar:
            _add_text(tar, "manifest.json", json.dumps(asdict(manifest), indent=1))
            _add_text(tar, _SECRETS, (stack.folder / _SECRETS).read_text(encoding="utf-8"))
            tar.add(work / _DUMP, _DUMP)
            _add_folder(tar, stack.folder / _TLS, _TLS, ())
            left_out = _NOT_OF_THE_SITE if with_data else (*_NOT_OF_THE_SITE, _DATA)
            _add_folder(tar, stack.site_path, _SITE, left_out)
        _publish(whole, path)
    return path


def restore(backup: Path, folder: Path, say: Callable[[str], None], waits: Waits | None = None) -> Manifest:
    """Make a stack in a new folder from a backup; `LocalStack.up` starts it.

    Parameters
    ----------
    backup
        What `back_up` wrote.
    folder
        The stack's new folder, which there is not yet or which is empty.
    say
        Takes a line for whoever waits.
    waits
        How long something may take.

    Returns
    -------
    Manifest
        What the backup holds.

    Raises
    ------
    InputError
        When the file is no backup, or the folder holds something.
    ServerError
        When the database cannot be made from it.
    """
    folder = folder.expanduser().absolute()
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already, and nothing is overwritten. Name a new folder.")
    with _opened(backup) as (tar, manifest):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        except OSError as error:
            raise InputError(f"The folder {folder} cannot be made: {error.strerror}.") from error
        try:
            made = LocalStack(work, say, waits)
            made.files.make()
            _extract(tar, work)
            _fill(made, work / _DUMP)
            (work / _DUMP).unlink()
            BatchJobs(made.site_path).close_all(_moment(manifest))
            made.files.save(
                State(site_name=manifest.site_name, site_config=manifest.site_config, folder=manifest.folder)
            )
            shutil.rmtree(work / "alive", ignore_errors=True)
            os.rename(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return manifest


# --- the database ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(stack: LocalStack) -> Iterator[Postgres]:
    """Yield the stack's database; of a stack that is stopped it is started meanwhile."""
    database = stack.database(stack.files.state())
    if database.answers():
        yield database
        return
    if stack.files.elsewhere is not None:
        raise InputError(
            f"The stack in {stack.folder} was started on {stack.files.elsewhere}, and this is {socket.gethostname()}. "
            "Make the backup there; or, when that host is gone, run `deephyper-balsam server up` here first."
        )
    if stack.files.state().data is not None:
        raise InputError(
            f"The stack in {stack.folder} is stopped, and its data is made anew on a local disk when it starts: run "
            "`deephyper-balsam server up` first, then make the backup."
        )
    with stack.files.lock():
        state = stack.files.state()
        owner = stack.files.own(state)
        database = stack.database(state)
        with owner.kept(stack.files.waits.sign_s), _started(stack, database, state):
            yield database
        owner.leave("backed up")


@contextlib.contextmanager
def _started(stack: LocalStack, database: Postgres, state: State) -> Iterator[None]:
    process = database.start(state.processes.get("postgres"), stack.files.environment(), stack.logs / "postgres.log")
    try:
        database.wait_ready(process, stack.files.waits.start_s)
        yield
    finally:
        database.stop(process)


def _dump(database: Postgres, work: Path) -> None:
    _client(database, work, "pg_dump", "--format=custom", "--no-owner", f"--file={work / _DUMP}", "balsam")


def _fill(stack: LocalStack, dump: Path) -> None:
    state = State()
    database = stack.database(state)
    with _started(stack, database, state):
        _client(database, stack.folder, "pg_restore", "--exit-on-error", "--no-owner", "--dbname=balsam", str(dump))


def _client(database: Postgres, work: Path, program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs as a client of the database, which reads the password from a private file."""
    known = work / "pgpass"
    write_private(known, f"*:*:*:*:{database.password}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    environment.update(PGPASSFILE=str(known), PGREQUIREAUTH="scram-sha-256")
    words = [f"--host={database.socket_dir}", "--username=postgres", "--no-password", *arguments]
    try:
        done = subprocess.run(
            [str(programs.installed() / program), *words],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    finally:
        known.unlink()
    if done.returncode:
        raise ServerError(f"{program} ended with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")


# --- the file --------------------------------------------------------------------------------------------------------


def _new_file(target: Path, name: str, stack: Path) -> Path:
    path = target.expanduser().absolute()
    path = path / name if path.is_dir() else path
    if os.path.lexists(path):
        raise InputError(f"{path} is there already, and nothing is overwritten. Name a new file, or a folder.")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} for the backup: make it first.")
    if path.parent.resolve().is_relative_to(stack.resolve()):
        raise InputError(f"{path} is in the stack's own folder: a backup there is lost with it. Name another place.")
    return path


@contextlib.contextmanager
def _working_folder(parent: Path) -> Iterator[Path]:
    try:
        work = Path(tempfile.mkdtemp(prefix=".balsam-backup.", suffix=".tmp", dir=parent))  # mode 0700
    except OSError as error:
        raise InputError(f"Cannot write in the folder {parent}: {error.strerror}. Name another.") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(whole: Path, path: Path) -> None:
    """Give a file its name when all of it is on the disk, and only if nobody has taken that name meanwhile."""
    whole.chmod(0o600)
    with open(whole, "rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(whole, path)
    except FileExistsError as error:
        raise InputError(f"{path} was made meanwhile, and nothing is overwritten. Name a new file.") from error
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.rename(whole, path)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
    tar.addfile(entry, io.BytesIO(data))


def _add_folder(tar: tarfile.TarFile, folder: Path, name: str, left_out: tuple[str, ...]) -> None:
    """Add the folders, files and links below a folder; what vanishes meanwhile, such as a temporary file, is left.

    Of those folders in it that are left out only the folder itself is added, empty.
    """
    for above, folders, files in os.walk(folder):
        inside = Path(above).relative_to(folder)
        within = (*folders, *(one for one in files if inside != Path() or one not in left_out))
        if inside == Path():
            folders[:] = [one for one in folders if one not in left_out]
        for one in within:
            path = Path(above) / one
            with contextlib.suppress(FileNotFoundError):
                _add(tar, path, str(PurePosixPath(name, inside.as_posix(), one)))


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        if stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode):
            tar.add(path, name, recursive=False)
        return
    with open(path, "rb") as file:
        entry = tar.gettarinfo(arcname=name, fileobj=file)
        if not entry.isreg():  # the second name of a file that is in it already
            entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", os.fstat(file.fileno()).st_size
        if entry.size <= _IN_MEMORY_BYTES:  # it may be cut or grow while it is read
            data = file.read(_IN_MEMORY_BYTES)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        else:
            tar.addfile(entry, file)


@contextlib.contextmanager
def _opened(backup: Path) -> Iterator[tuple[tarfile.TarFile, Manifest]]:
    try:
        with tarfile.open(backup, "r:") as tar:
            text = tar.extractfile("manifest.json")
            assert text is not None
            data: dict[str, Any] = json.load(text)
            if data["format"] > _FORMAT:
                raise InputError(f"{backup} was made by a later version of deephyper-balsam. Install that one.")
            manifest = Manifest(**{one.name: data[one.name] for one in fields(Manifest) if one.name in data})
            yield tar, manifest
    except (tarfile.TarError, KeyError, ValueError, TypeError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{backup} is no backup of a stack, or a part of it is missing: {error}.") from error
    except FileNotFoundError as error:
        raise InputError(f"There is no backup {backup}.") from error


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Write what a backup holds, and nothing elsewhere: links are made last, so that nothing is written through one."""
    links = []
    for entry in tar:
        parts = PurePosixPath(entry.name).parts
        known = parts[:1] in ((_SITE,), (_TLS,)) or entry.name in (_DUMP, _SECRETS)
        if not known or ".." in parts:
            continue
        path = folder.joinpath(*parts)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if entry.isdir():
            path.mkdir(mode=0o700, exist_ok=True)
        elif entry.issym():
            links.append((path, entry.linkname))
        elif entry.isreg():
            source = tar.extractfile(entry)
            assert source is not None
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600 | entry.mode & 0o100)
            with os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(source, file)
            os.utime(path, (entry.mtime, entry.mtime))
    for path, to in links:
        os.symlink(to, path)
    if not (folder / _DUMP).is_file() or not (folder / _SECRETS).is_file():
        raise KeyError(_DUMP)


def _moment(manifest: Manifest) -> float:
    return datetime.fromisoformat(manifest.made_at).timestamp()
