"""`deephyper-balsam quickstart`: a whole search on a Balsam of one's own, from one command."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deephyper_balsam.cli.common import drive, run_target
from deephyper_balsam.cli.report import write_report
from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.evaluators.balsam import BalsamEvaluator

_NAME = "quickstart"


@click.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default="quickstart",
    show_default=True,
    help="Where everything is put.",
)
@click.option(
    "--method", type=click.Choice(["ambs", "random", "ga"]), default="ambs", show_default=True, help="Search method."
)
@click.option("--max-evals", type=click.IntRange(min=1), default=30, show_default=True, help="Evaluations.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Evaluations at a time.")
@click.option(
    "--problem", default="digits", show_default=True, help="A bundled application, or what `search run` takes."
)
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Makes the search repeatable.")
@click.option("--keep", is_flag=True, help="Leave Balsam running, to look around with its own commands.")
def quickstart(folder: Path, method: str, max_evals: int, workers: int, problem: str, seed: int, keep: bool) -> None:
    """Start a Balsam server, site and launcher in one folder, search a network on real data, stop what was started.

    \b
    Example:
      deephyper-balsam quickstart --max-evals 30 --workers 2
    """
    from deephyper_balsam.allocations import AllocationRequest
    from deephyper_balsam.apps import resolve_problem, resolve_run
    from deephyper_balsam.evaluators.balsam import BalsamEvaluator
    from deephyper_balsam.jobs import Resources
    from deephyper_balsam.search import Search
    from deephyper_balsam.sites.local import LocalStack

    space = resolve_problem(problem)
    space.check()
    resolve_run(run_target(problem))  # what is wrong with it is said before anything is started
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it is to stop what it started, as on Ctrl-C
    stack = LocalStack(folder / "balsam")
    was_running = stack.status().running
    click.echo(f"Starting Balsam in {stack.folder} ...")
    status = stack.up()
    click.echo(f"  server {status.url}, site {status.site.name if status.site else '?'}")
    try:
        evaluator = BalsamEvaluator(
            run_target(problem),
            "local",
            resources=Resources(evals_per_node=workers),
            allocation=AllocationRequest(nodes=1, wall_time_min=120),
            client_path=stack.client_path,
        )
        name = _free_name(evaluator, folder)
        click.echo(
            f"Searching {space.name} with {method}: {max_evals} evaluations, {workers} at a time (search {name})"
        )
        code = drive(Search(space, evaluator, name, method, seed=seed, log_dir=folder), max_evals, None)
        if code == 0:
            _report(evaluator, folder / name / "report.html")
    finally:
        if keep or was_running:
            click.echo("Balsam goes on running; point its own commands at it with")
            for variable, value in stack.env.items():
                click.echo(f"  export {variable}={shlex.quote(value)}")
            click.echo(f"and stop it with: deephyper-balsam server down --dir {shlex.quote(str(stack.folder))}")
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # half a stop would leave processes behind
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stack.down()
            click.echo(f"Balsam is stopped; `deephyper-balsam server up --dir '{stack.folder}'` brings it back.")
    raise click.exceptions.Exit(code)


def _report(evaluator: BalsamEvaluator, path: Path) -> None:
    """Write the search's report beside its results, or say what it lacks."""
    try:
        write_report(path.parent.name, path, evaluator.gateway)
        click.echo(f"Report:  {path}")
    except InputError as error:
        click.echo(f"No report: {error}")


def _free_name(evaluator: BalsamEvaluator, folder: Path) -> str:
    """Return a name that no search has: a second quickstart is a second search."""
    from deephyper_balsam.record import find_records

    taken = {record.name for record in find_records(evaluator.gateway)}
    count = 1
    while f"{_NAME}-{count}" in taken or (folder / f"{_NAME}-{count}").exists():
        count += 1
    return f"{_NAME}-{count}"
