"""A search inside one allocation: ``python -m deephyper_balsam.launcher.inside -j MODE -t MIN NAME [SEARCH-OPTIONS]``.

On the allocation's first node (or the launch node) it runs the launcher and the search driver beside each other. A
site's job template starts it for a BatchJob of `search submit`, which others may follow (`store/allocation_chain.py`);
the scripts in ``jobscripts/`` start it in an allocation of which Balsam does not know yet.

Before the wall time the driver is told to end, then the launcher: what ran goes on when the same search goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from deephyper_balsam.common.loopback import pass_proxies_by
from deephyper_balsam.launcher.main import launcher_arguments, launcher_options, nodes_for_runs, signals_received

if TYPE_CHECKING:
    from deephyper_balsam.store.allocation_chain import Link
    from deephyper_balsam.store.gateway import Gateway

logger = logging.getLogger("deephyper_balsam.launcher.inside")  # as a program its name is another

# The launcher in MPI mode stops its runs two minutes before the wall time; the driver ends before it
DRAIN_S = 150.0
_GRACE_S = 60.0
_POLL_S = 0.2
_LEASE_LOOK_S = 3.0
_AWAY_S = 30.0
_MOST_KILLS = 3
# Never an allowed queue: an agent that sees the BatchJob before it is adopted refuses it instead of submitting another
QUEUE = "inside-an-allocation"
# What the driver's command ends with (deephyper_balsam.cli)
_BAD_INPUT, _NO_BALSAM, _INTERRUPTED = 2, 3, 130


class _Process(Protocol):
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def drain_s(wall_time_min: int) -> float:
    """Return how many seconds before the wall time the driver is told to end."""
    return DRAIN_S if wall_time_min * 60 > 2 * DRAIN_S else 0.25 * wall_time_min * 60


def adopt(
    gateway: Gateway, site_id: int, name: str, num_nodes: int, wall_time_min: int, mode: str, scheduler_id: int
) -> int:
    """Make this allocation known to Balsam, or find what an earlier start of it made; return the BatchJob's id."""
    known = [row for row in gateway.batch_jobs([site_id], ["running"]) if row["scheduler_id"] == scheduler_id]
    if known:
        return int(known[0]["id"])
    row = gateway.create_batch_job(
        {
            "site_id": site_id,
            "num_nodes": num_nodes,
            "wall_time_min": wall_time_min,
            "queue": QUEUE,
            "project": QUEUE,
            "job_mode": mode,
            "optional_params": {},
            "filter_tags": {"search": name},
        }
    )
    gateway.adopt_batch_job(row["id"], scheduler_id, _now())
    return int(row["id"])


def _now() -> str:
    return datetime.now(timezone.utc).replace(tzinfo=None).isoformat()


class Driver:
    """The driver's process: started when nobody drives the search, and again after an end that may pass.

    Such an end is: another driver was quicker; Balsam did not answer; it was killed, a few times at most.

    Parameters
    ----------
    start
        Starts the process; None: it cannot be started now.
    is_free
        Whether nobody drives the search now.
    is_stopped
        Whether the search is not to be driven any more: looked at before each start.
    """

    def __init__(
        self,
        start: Callable[[], _Process | None],
        is_free: Callable[[], bool],
        is_stopped: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._is_free, self._is_stopped, self._clock = start, is_free, is_stopped, clock
        self._process: _Process | None = None
        self._not_before = -1e9
        self._kills = 0

    def look(self) -> int | None:
        """Start it if it is time to; return its exit code when it has ended for good."""
        if self._process is None:
            if self._clock() < self._not_before:
                return None
            self._not_before = self._clock() + _LEASE_LOOK_S
            if self._is_stopped():
                return 0
            if self._is_free():
                self._process = self._start()
            return None
        code = self._process.poll()
        if code is None or not self._may_pass(code):
            return code
        logger.warning("The driver ended with exit code %d, and will be started again", code)
        self._process = None
        return None

    def _may_pass(self, code: int) -> bool:
        if code == _NO_BALSAM:
            self._not_before = self._clock() + _AWAY_S
            return True
        self._kills += code < 0
        return (code < 0 and self._kills <= _MOST_KILLS) or (code == _BAD_INPUT and not self._is_free())

    def end(self) -> int:
        """Tell it to end; its exit code."""
        return _INTERRUPTED if self._process is None else _end(self._process)


def run_both(
    driver: Driver,
    launcher: _Process,
    stop: Callable[[], bool],
    left_s: Callable[[], float],
    look: Callable[[], None] = lambda: None,
    before_end: Callable[[int | None], None] = lambda died: None,
) -> tuple[int, int | None]:
    """Wait for the driver, and end both in order.

    Parameters
    ----------
    driver
        The driver, which is started as it is looked at.
    launcher
        The launcher's process.
    stop
        Whether somebody asked to stop.
    left_s
        Seconds until the driver must be told to end.
    look
        Called often, while both run.
    before_end
        Called when the allocation ends before the search, with the code of a launcher that broke down, or None.

    Returns
    -------
    tuple
        The driver's exit code, and the launcher's if it ended before it was told to, else None.
    """
    died: int | None = None
    while (code := driver.look()) is None:
        died = launcher.poll()
        if stop() or left_s() <= 0 or died is not None:
            if died != 0:  # a launcher that leaves by itself has found nothing to do
                before_end(died)
            code = driver.end()
            break
        look()
        time.sleep(_POLL_S)
    _end(launcher)
    return code, died


def _end(process: _Process) -> int:
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def exit_code(driver: int, launcher: int | None) -> int:
    """Return the driver's code as a shell shows it; a launcher that broke down is told where the driver was fine."""
    shown = 128 - driver if driver < 0 else driver
    return shown or (0 if launcher is None else 128 - launcher if launcher < 0 else launcher)


def results_folder(asked_for: str, site_path: Path) -> Path:
    """Return the folder of searches where the driver writes: the one asked for if it is there, else the site's data."""
    wanted = Path(asked_for)
    return wanted if wanted.is_absolute() and os.access(wanted, os.W_OK) else site_path / "data"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@launcher_options
@click.option(
    "--chain",
    type=click.IntRange(min=0),
    help="This allocation is a BatchJob, and so many may follow. [default: it is made known to Balsam]",
)
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(name: str, options: Sequence[str], chain: int | None, wall_time_min: int, **launcher: Any) -> None:
    """Run the search NAME on this allocation, at the site in $BALSAM_SITE_PATH.

    With OPTIONS, which are those of `search run`, it is begun or goes on; without, it goes on as Balsam knows it.

    \b
    Example:
      python -m deephyper_balsam.launcher.inside -j mpi -t 60 digits-1 --problem digits --max-evals 500
    """
    began = time.monotonic()
    asked = signals_received()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("deephyper_balsam").setLevel(logging.INFO)

    pass_proxies_by(os.environ)  # launcher and driver inherit it

    from balsam.config import SiteConfig

    from deephyper_balsam.errors import DeepHyperBalsamError
    from deephyper_balsam.store.allocation_chain import Link
    from deephyper_balsam.store.gateway import Gateway

    site = SiteConfig()
    nodes = nodes_for_runs(site, launcher["spare_first_node"])
    scheduler_id = site.settings.launcher.compute_node.get_scheduler_id()
    if scheduler_id is None:
        raise click.UsageError("this is no batch job: the scheduler's id is in none of its variables")
    adopted = None
    try:
        gateway = Gateway()
        if chain is None:
            mode = launcher["job_mode"]
            adopted = adopt(gateway, site.site_id, name, len(nodes), wall_time_min, mode, scheduler_id)
    except DeepHyperBalsamError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(_NO_BALSAM)

    draining_s = drain_s(wall_time_min)
    ends = began + wall_time_min * 60
    link = Link(gateway, site.site_id, name, scheduler_id, chain or 0, draining_s)

    tags = launcher.pop("tags") or (f"search={name}",)
    running = _start_launcher(site, launcher_arguments(wall_time_min=wall_time_min, tags=tags, **launcher))

    driver = Driver(
        lambda: _start_driver(gateway, site, name, options),
        lambda: _nobody_drives(gateway, name),
        lambda: _is_stopped(link),
    )
    codes = run_both(
        driver,
        running,
        lambda: bool(asked),
        lambda: ends - draining_s - time.monotonic(),
        lambda: link.look(ends - time.monotonic()),
        lambda died: _go_on_later(gateway, link, asked, died),
    )
    _tell_the_end(gateway, adopted, link, codes[0])
    sys.exit(exit_code(*codes))


def _tell_the_end(gateway: Gateway, adopted: int | None, link: Link, code: int) -> None:
    """Say that this allocation is over, and give back the one that would follow when there is nothing left to do."""
    with _unless_balsam_fails("Balsam was not told that this allocation is over"):
        if adopted is not None:
            gateway.finish_batch_job(adopted, _now())  # nobody must count on these nodes any more
    with _unless_balsam_fails("The allocation that would follow was not given back"):
        if code in (0, 1, _BAD_INPUT):  # done, or never to be done
            link.end()


@contextlib.contextmanager
def _unless_balsam_fails(what: str) -> Iterator[None]:
    from deephyper_balsam.errors import BalsamError

    try:
        yield
    except BalsamError as error:
        logger.warning("%s: %s", what, error)


def _start_launcher(site: Any, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "deephyper_balsam.launcher.main", *arguments]
    # Sessions of their own: the scheduler's signals reach this process alone, which passes them on in order
    return subprocess.Popen(words, cwd=Path(site.site_path), start_new_session=True)


def _start_driver(gateway: Gateway, site: Any, name: str, options: Sequence[str]) -> subprocess.Popen[bytes] | None:
    from deephyper_balsam.store.record import find_records

    with _unless_balsam_fails("The driver cannot be started yet"):
        if options:
            [own] = [row["name"] for row in gateway.sites() if row["id"] == site.site_id]
            words = ["run", name, "--site", own, *options]
        else:
            asked_for: dict[str, Any] = next((one.settings["asked_for"] for one in find_records(gateway, name)), {})
            folder = results_folder(str(asked_for.get("log_dir", ".")), Path(site.site_path))
            words = ["resume", name, "--log-dir", str(folder)]
        return subprocess.Popen([sys.executable, "-m", "deephyper_balsam", "search", *words], start_new_session=True)
    return None


def _is_stopped(link: Link) -> bool:
    with _unless_balsam_fails("Balsam does not say whether the search was stopped"):
        return link.stopped()
    return False


def _go_on_later(gateway: Gateway, link: Link, signals: Sequence[int], died: int | None) -> None:
    """Say why this allocation ends before the search, and ask for the next one if it was not yet."""
    why = f"signal {signals[0]} came" if signals else "the wall time is near"
    if died is not None:
        why = f"its launcher broke down (exit code {died})"
    logger.info("The search is not done, but this allocation ends: %s", why)
    gateway.hurry()
    with _unless_balsam_fails("No allocation was asked for to follow this one"):
        link.ask()


def _nobody_drives(gateway: Gateway, name: str) -> bool:
    """Whether the search has no driver; when Balsam does not answer, none could begin."""
    from deephyper_balsam.store.lease import current_lease, read_leases

    with _unless_balsam_fails("Balsam does not say who drives the search"):
        leases = read_leases(gateway, name).get(name, [])
        return current_lease(leases, gateway.now()) is None
    return False


if __name__ == "__main__":
    main()
