"""`deephyper-balsam quickstart`: a whole search on a Balsam of one's own, from one command."""

from __future__ import annotations

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import drive, run_target
from deephyper_balsam.cli.report import write_report
from deephyper_balsam.common.wording import counted
from deephyper_balsam.errors import InputError

if TYPE_CHECKING:
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.store.allocation_request import AllocationRequest

_NAME, _HERE = "quickstart", "local"
_COUNT = click.IntRange(min=1)


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
@click.option("--workers", type=_COUNT, help="Evaluations at a time on a node. [default: 2 here, 1 on a machine]")
@click.option(
    "--problem", default="digits", show_default=True, help="A bundled application, or what `search run` takes."
)
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Makes the search repeatable.")
@click.option("--keep", is_flag=True, help="Leave Balsam running, to look around with its own commands.")
@click.option(
    "--config", default=_HERE, show_default=True, help="The machine: a name from `site configs`, or a folder."
)
@click.option("-A", "--project", help="Who pays there for the allocation. [default: its only one]")
@click.option("-q", "--queue", help="Its queue there. [default: its only one]")
@click.option("-n", "--nodes", type=_COUNT, default=1, show_default=True, help="Its nodes.")
@click.option("-t", "--wall-time-min", type=_COUNT, help="Its minutes. [default: 120 here, 30 on a machine]")
@click.option(
    "-j", "--job-mode", type=click.Choice(["mpi", "serial"]), default="mpi", show_default=True, help="Launcher mode."
)
def quickstart(folder: Path, method: str, max_evals: int, problem: str, seed: int, keep: bool, **given: Any) -> None:
    """Start a Balsam server, site and launcher in one folder, search a network on real data, stop what was started.

    It does so on this machine; with --config on a supercomputer, from its login node, on nodes of its own. It says how
    to do the same by hand.

    \b
    Example:
      deephyper-balsam quickstart --max-evals 30 --workers 2
      deephyper-balsam quickstart --config perlmutter-gpu -A PROJECT -q debug -n 2 -t 20
    """
    from deephyper_balsam.driver.balsam_session import BalsamEvaluator
    from deephyper_balsam.driver.search import Search
    from deephyper_balsam.server.stack import LocalStack
    from deephyper_balsam.store.applications import resolve_problem, resolve_run
    from deephyper_balsam.trial import Resources

    space = resolve_problem(problem)
    space.check()
    resolve_run(run_target(problem))  # what is wrong with it is said before anything is started
    place = _place(**given)
    stack = LocalStack(folder / "balsam", say=lambda line: click.echo(line, err=True))
    was_running = stack.status().running
    click.echo(f"Starting Balsam in {stack.folder} ...")
    status = stack.up(**place.server)
    by_hand = [_words("server", "up", "--dir", folder / "balsam", *place.server_options)]
    by_hand.append(f'eval "$({_words("server", "env", "--dir", folder / "balsam")})"')
    try:
        site = status.site.name if status.site else _HERE
        click.echo(f"  server {status.url}, site {site}")
        evaluator = BalsamEvaluator(
            run_target(problem),
            site,
            resources=Resources(evals_per_node=place.workers),
            allocation=place.allocation,
            client_path=stack.client_path,
        )
        name = _free_name(evaluator, folder)
        click.echo(
            f"Searching {space.name} with {method}: {counted(max_evals, 'evaluation')}, {place.at_once} at a time "
            f"(search {name})"
        )
        what = ["--problem", problem, "--site", site, "--method", method, "--max-evals", max_evals, "--seed", seed]
        by_hand.append(_words("search", "run", name, *what, *place.search_options, "--log-dir", folder))
        code = drive(Search(space, evaluator, name, method, seed=seed, log_dir=folder), max_evals, None)
        if code == 0:
            _report(evaluator, folder / name / "report.html")
            by_hand.append(_words("search", "report", name, "-o", folder / name / "report.html"))
    finally:
        if keep or was_running:
            click.echo("Balsam goes on running; point its own commands at it with")
            for variable, value in stack.env.items():
                click.echo(f"  export {variable}={shlex.quote(value)}")
            click.echo(f"and stop it with: deephyper-balsam server down --dir {shlex.quote(str(stack.folder))}")
        else:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # half a stop would leave processes behind
            stack.down()
            by_hand.append(_words("server", "down", "--dir", folder / "balsam"))
            again = f"deephyper-balsam server up --dir {shlex.quote(str(stack.folder))}"
            click.echo(f"Balsam is stopped; `{again}` brings it back.")
        click.echo("The same by hand:\n" + "\n".join(f"  {line}" for line in by_hand))
    raise click.exceptions.Exit(code)


@dataclass(frozen=True)
class _Place:
    """Where the evaluations run, as the server, the search and their commands want it said.

    Attributes
    ----------
    server
        What `LocalStack.up` is to know.
    allocation
        What the search asks for.
    workers
        Evaluations at a time on a node.
    """

    server: dict[str, Any]
    allocation: AllocationRequest
    workers: int

    @property
    def at_once(self) -> int:
        return self.workers * self.allocation.nodes

    @property
    def server_options(self) -> list[Any]:
        return [word for key, value in self.server.items() if value is not None for word in (f"--{key}", value)]

    @property
    def search_options(self) -> list[Any]:
        asked = self.allocation
        words = ["--evals-per-node", self.workers, "--nodes", asked.nodes, "--wall-time-min", asked.wall_time_min]
        if self.server:
            words += ["--queue", asked.queue, "--project", asked.project, "--job-mode", asked.job_mode]
        return words


def _place(config: str, nodes: int, workers: int | None, wall_time_min: int | None, **names: Any) -> _Place:
    """Return where the evaluations run.

    Raises
    ------
    InputError
        When the machine does not allow it.
    """
    from deephyper_balsam.store.allocation_request import AllocationRequest

    if config == _HERE:
        if nodes > 1 or names["project"] or names["queue"]:
            raise InputError("-n, -A and -q are for a machine with a batch system: name it with --config.")
        return _Place({}, AllocationRequest(nodes=1, wall_time_min=wall_time_min or 120), workers or 2)
    from deephyper_balsam.cli.submit import check_shape
    from deephyper_balsam.sites.configs import check_config

    asked = {**names, "nodes": nodes, "wall_time_min": wall_time_min or 30}
    site = check_config(config, project=names["project"], queue=names["queue"]).queues_and_projects()
    shape = check_shape(site, {key: value for key, value in asked.items() if value is not None})
    server = {"listen": "auto", "config": config, "project": shape["project"], "queue": shape["queue"]}
    return _Place(server, AllocationRequest(**shape), workers or 1)


def _words(*words: Any) -> str:
    return shlex.join(["deephyper-balsam", *map(str, words)])


def _report(evaluator: BalsamEvaluator, path: Path) -> None:
    """Write the search's report beside its results, or say what it lacks."""
    try:
        write_report(path.parent.name, path, evaluator.gateway)
        click.echo(f"Report:  {path}")
    except InputError as error:
        click.echo(f"No report: {error}")


def _free_name(evaluator: BalsamEvaluator, folder: Path) -> str:
    """Return a name that no search has: a second quickstart is a second search."""
    from deephyper_balsam.store.record import find_records

    taken = {record.name for record in find_records(evaluator.gateway)}
    count = 1
    while f"{_NAME}-{count}" in taken or (folder / f"{_NAME}-{count}").exists():
        count += 1
    return f"{_NAME}-{count}"
