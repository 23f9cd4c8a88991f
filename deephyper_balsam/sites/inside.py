"""A search inside one allocation: ``python -m deephyper_balsam.sites.inside -t MIN NAME SEARCH-OPTIONS``.

The scripts in ``jobscripts/`` run it on the first node (or the launch node): the launcher and the search driver beside
each other. The allocation is made known to Balsam as a BatchJob, from which the driver learns how many evaluations fit.
Before the wall time the driver is told to end, then the launcher: what ran goes on when the same search runs again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import click

# The launcher in MPI mode stops its runs two minutes before the wall time; the driver ends before it
DRAIN_S = 150.0
_GRACE_S = 60.0
_POLL_S = 0.2
# Never an allowed queue: an agent that sees the BatchJob before it is adopted refuses it instead of submitting another
QUEUE = "inside-an-allocation"


class _Process(Protocol):
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def adopt(
    gateway: Any, site_id: int, name: str, num_nodes: int, wall_time_min: int, mode: str, scheduler_id: int
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


def run_both(
    driver: _Process, launcher: _Process, stop: Callable[[], bool], left_s: Callable[[], float]
) -> tuple[int, int | None]:
    """Wait for the driver, and end both in order.

    Parameters
    ----------
    driver, launcher
        The processes.
    stop
        Whether somebody asked to stop.
    left_s
        Seconds until the driver must be told to end.

    Returns
    -------
    tuple
        The driver's exit code, and the launcher's if it ended before it was told to, else None.
    """
    died: int | None = None
    while driver.poll() is None:
        died = launcher.poll()
        if stop() or left_s() <= 0 or died is not None:
            break
        time.sleep(_POLL_S)
    code = _end(driver)
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


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-t", "--wall-time-min", type=click.IntRange(min=1), required=True, help="Minutes of the allocation.")
@click.option("-j", "--job-mode", type=click.Choice(["mpi", "serial"]), default="mpi", show_default=True)
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(wall_time_min: int, job_mode: str, name: str, options: Sequence[str]) -> None:
    """Run the search NAME on this allocation, at the site in $BALSAM_SITE_PATH; OPTIONS are those of `search run`.

    \b
    Example:
      python -m deephyper_balsam.sites.inside -t 60 digits-1 --problem digits --evals-per-node 4 --max-evals 500
    """
    began = time.monotonic()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))

    from balsam.config import SiteConfig

    from deephyper_balsam.errors import BalsamError
    from deephyper_balsam.gateway import Gateway

    site = SiteConfig()
    nodes = site.settings.launcher.compute_node.get_job_nodelist()
    scheduler_id = site.settings.launcher.compute_node.get_scheduler_id()
    if scheduler_id is None:
        raise click.UsageError("this is no batch job: the scheduler's id is in none of its variables")
    gateway = Gateway()
    row = next((row for row in gateway.sites() if row["id"] == site.site_id), None)
    if row is None:
        raise click.UsageError(f"Balsam does not know the site in {site.site_path}")
    batch_job_id = adopt(gateway, site.site_id, name, len(nodes), wall_time_min, job_mode, scheduler_id)

    python = [sys.executable, "-m"]
    tags = ["--tag", f"search={name}"]
    launching = [*python, "deephyper_balsam.sites.launcher", "-j", job_mode, "-t", str(wall_time_min), *tags]
    driving = [*python, "deephyper_balsam", "search", "run", name, "--site", row["name"], *options]
    # Sessions of their own: the scheduler's signals reach this process alone, which passes them on in order
    launcher = subprocess.Popen(launching, cwd=Path(site.site_path), start_new_session=True)
    driver = subprocess.Popen(driving, start_new_session=True)
    drain_s = DRAIN_S if wall_time_min * 60 > 2 * DRAIN_S else 0.25 * wall_time_min * 60
    ends = began + wall_time_min * 60 - drain_s
    codes = run_both(driver, launcher, lambda: bool(asked), lambda: ends - time.monotonic())
    try:
        gateway.finish_batch_job(batch_job_id, _now())  # nobody must count on these nodes any more
    except BalsamError as error:
        click.echo(f"Balsam was not told that this allocation is over: {error}", err=True)
    sys.exit(exit_code(*codes))


if __name__ == "__main__":
    main()
