"""What this project replaces in Balsam: one table, and the one way to do it.

Each entry works around a fault of the Balsam for which it was written. A Balsam of another version may have mended the
fault, or may have moved what we replace, and half of a set of patches is worse than none. So a patch is refused, with
one clear error at the start of the program, where Balsam has another version or lacks the name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from deephyper_balsam.errors import BalsamChangedError

BALSAM_VERSION = "0.7.0a24"
"""The Balsam that the patches were written for."""


@dataclass(frozen=True)
class Patch:
    """One name of Balsam, or of what its server stands on, that is replaced.

    Attributes
    ----------
    name
        The dotted name.
    module
        Which module of this package replaces it, as its room and name.
    fault
        What goes wrong without it.
    """

    name: str
    module: str
    fault: str


_MPI = "balsam.site.launcher._mpi_mode"
_MASTER = "balsam.site.launcher._serial_mode_master"
_LOGIN = "balsam.server.auth.password_login"
_WORKER = "balsam.site.launcher._serial_mode_worker"

PATCHES = (
    Patch(f"{_MPI}.ApplicationDefinition", "launcher.applications", "one application that cannot be read ends it"),
    Patch(f"{_MASTER}.ApplicationDefinition", "launcher.applications", "one application that cannot be read ends it"),
    Patch(f"{_MPI}.countdown_timer_min", "launcher.wall_time", "polls in whole seconds; ends by the time of day"),
    Patch(f"{_MPI}.SynchronousJobSource", "launcher.wall_time", "takes what does not fit; ends its session early"),
    Patch(f"{_MPI}.Launcher", "launcher.wall_time", "a run cut by an outage counts as the application's error"),
    Patch(f"{_MPI}.BulkStatusUpdater", "launcher.wall_time", "ends before the launcher's last word; holds news back"),
    Patch("balsam.site.job_source.SigHandler", "launcher.wall_time", "ends at a signal that all processes get"),
    Patch(f"{_MASTER}.countdown_timer_min", "launcher.wall_time", "dies of an empty timer; ends by the time of day"),
    Patch(
        f"{_MASTER}.BulkStatusUpdater", "launcher.wall_time", "ends before the launcher's last word; holds news back"
    ),
    Patch(f"{_MASTER}.FixedDepthJobSource", "launcher.wall_time", "takes jobs that do not fit"),
    Patch(f"{_MASTER}.Master", "launcher.wall_time", "says its last word about runs that go on"),
    Patch(f"{_WORKER}.Worker", "launcher.wall_time", "starts what it fetched early and no longer fits"),
    Patch(f"{_WORKER}.launch_master_subprocess", "launcher.wall_time", "kills the master before its last word"),
    Patch(f"{_MASTER}.FixedDepthJobSource", "launcher.serial_mode", "holds jobs that other launchers could run"),
    Patch(f"{_MASTER}.Master", "launcher.serial_mode", "dies of a message that is no worker's"),
    Patch(f"{_WORKER}.Worker", "launcher.serial_mode", "the first node takes all jobs; looks in whole seconds"),
    Patch(f"{_WORKER}.launch_master_subprocess", "launcher.serial_mode", "a worker waits for a master that has ended"),
    Patch(f"{_MASTER}.zmq", "launcher.serial_mode", "any stranger may ask for jobs, and the port is fixed"),
    Patch(f"{_WORKER}.zmq", "launcher.serial_mode", "any stranger may tell it what to run"),
    Patch(f"{_WORKER}.socket", "launcher.serial_mode", "does not know its own machine where its name has dots"),
    Patch("aredis", "server.no_redis", "imports distutils, which Python 3.12 has no more"),
    Patch("balsam.server.pubsub.pubsub.publish", "server.fast_paths", "waits five seconds for a missing Redis"),
    Patch("balsam.server.models.base._engine", "server.fast_paths", "updates of many rows wait for an answer to each"),
    Patch(
        "balsam.server.main.app.user_middleware",
        "server.fast_paths",
        "logs the time of each request, for a quarter of it",
    ),
    Patch("balsam.server.auth.token.user_from_token", "server.fast_paths", "decodes the token at each request"),
    Patch("balsam.server.models.crud.jobs.fetch", "server.fast_paths", "makes its SQL anew for each run"),
    Patch("balsam.server.models.crud.jobs.bulk_update", "server.fast_paths", "makes its SQL anew; updates deadlock"),
    Patch("balsam.server.models.crud.jobs.update_query", "server.fast_paths", "a job may name a stranger's BatchJob"),
    Patch("balsam.server.models.crud.sessions.acquire", "server.fast_paths", "a job may wait while newer ones start"),
    Patch("fastapi.dependencies.utils.run_in_threadpool", "server.fast_paths", "a thread for what waits for nothing"),
    Patch(
        "fastapi.dependencies.utils.contextmanager_in_threadpool",
        "server.fast_paths",
        "a thread for what waits for nothing",
    ),
    Patch("balsam.server.routers.jobs.list", "server.large_answers", "a large page takes a gigabyte, kept for good"),
    Patch("starlette.requests.Request.json", "server.plain_json", "takes values that no answer can hold"),
    Patch("balsam.server.main.app.router.routes", "server.guard", "opens an account to whoever asks"),
    Patch(f"{_LOGIN}.authenticate_user_password", "server.logins", "a login takes a fifth of a second of a core"),
    Patch(f"{_LOGIN}.create_access_token", "server.logins", "a token outlives its password"),
    Patch("balsam.server.models.tables.Base.metadata", "server.api", "an index that SQLAlchemy refuses to make"),
)
"""All patches, in the order in which they are made. docs/design.md shows this table."""

_WHAT_TO_DO = (
    f"but this package replaces parts of Balsam {BALSAM_VERSION} and fits that version alone. "
    f"Install it: pip install balsam=={BALSAM_VERSION}"
)
_claimed: set[tuple[str, str]] = set()


def claim(name: str, module: str) -> None:
    """Say that a module is about to replace a name, where `patch` cannot do that itself.

    Parameters
    ----------
    name, module
        A row of `PATCHES`.

    Raises
    ------
    BalsamChangedError
        When Balsam has another version.
    ValueError
        When `PATCHES` has no such row, or it was claimed before in this process.
    """
    if not any((row.name, row.module) == (name, module) for row in PATCHES):
        raise ValueError(f"{module} replaces {name}, but the table PATCHES in {__name__} has no such row")
    if (name, module) in _claimed:
        raise ValueError(f"{module} has replaced {name} before in this process")
    require_version()
    _claimed.add((name, module))


def patch(name: str, module: str, make: Callable[[Any], Any]) -> None:
    """Replace what a dotted name stands for, once in a process.

    Parameters
    ----------
    name, module
        A row of `PATCHES`.
    make
        Called with what stands there; what it returns takes its place. It may change that and return it.

    Raises
    ------
    BalsamChangedError
        When Balsam has another version, or lacks the name.
    ValueError
        When `PATCHES` has no such row, or it was done before in this process.
    """
    claim(name, module)
    place, last = _place_of(name)
    setattr(place, last, make(getattr(place, last)))


def require_version() -> None:
    """Check that Balsam has the version that the patches were written for.

    Raises
    ------
    BalsamChangedError
        When it has another, or is not installed.
    """
    try:
        found = f"Balsam {metadata.version('balsam')}"
    except metadata.PackageNotFoundError:
        found = "No Balsam"
    if found != f"Balsam {BALSAM_VERSION}":
        raise BalsamChangedError(f"{found} is installed, {_WHAT_TO_DO}")


def missing(name: str) -> BalsamChangedError:
    """Return the error for what should be in Balsam and is not.

    Parameters
    ----------
    name
        What is missing.

    Returns
    -------
    BalsamChangedError
        With what to do.
    """
    return BalsamChangedError(f"The Balsam that is installed has no {name}, {_WHAT_TO_DO}")


def _place_of(name: str) -> tuple[Any, str]:
    """Return the module or object that holds a dotted name, and the name's last part."""
    *above, last = name.split(".")
    place: Any = import_module(above[0])
    for number, part in enumerate(above[1:], start=2):
        if not hasattr(place, part) and isinstance(place, ModuleType):
            with suppress(ModuleNotFoundError):
                import_module(".".join(above[:number]))
        place = getattr(place, part, None)
    if not hasattr(place, last):
        raise missing(name)
    return place, last
