"""`deephyper-balsam search`: run a search and look at it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import yaml

from deephyper_balsam.cli import EXIT_NO_RESULT, Group
from deephyper_balsam.cli.common import (
    Finite,
    drive,
    echo_best,
    echo_json,
    echo_table,
    json_option,
)
from deephyper_balsam.cli.delete import delete
from deephyper_balsam.cli.methods import method_options
from deephyper_balsam.cli.per_site import PerSite, requests
from deephyper_balsam.cli.report import compare, plot, report
from deephyper_balsam.cli.requests import add, extend, stop
from deephyper_balsam.cli.search_settings import build_search, plain_settings, settings_of
from deephyper_balsam.cli.show import show
from deephyper_balsam.cli.standing import by_state, echo_standing, standing
from deephyper_balsam.cli.streams import echo_data
from deephyper_balsam.cli.submit import submit_command
from deephyper_balsam.cli.utilization import utilization
from deephyper_balsam.cli.watch import watch
from deephyper_balsam.common.wording import by_kind, counted
from deephyper_balsam.errors import SettingsError


@click.group(cls=Group)
def search() -> None:
    """Run searches and look at them. A search lives in Balsam: every command works from any machine with the login.

    \b
    Example:
      deephyper-balsam search run digits-1 --problem digits --site local --nodes 1 --max-evals 30
      deephyper-balsam search status digits-1
    """


_COUNT = click.IntRange(min=1)
_MODE = click.Choice(["mpi", "serial"])


_TAKEOVER = click.option(
    "--takeover", is_flag=True, help="Drive although another driver gave a sign of life lately: it is gone for good."
)
_SECONDS = Finite(min=0, min_open=True)
_NOT_NEGATIVE = Finite(min=0)


@search.command()
@click.argument("name")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    help="A YAML file with the same names as these options; paths in it are relative to it.",
)
@click.option("--problem", help="file.py:problem, package.module:problem, a folder, or a bundled name.")
@click.option(
    "--run", help="file.py:run, package.module:run, or a shell command's YAML. [default: found beside the problem]"
)
@click.option(
    "--minimize", is_flag=True, default=None, help="The run function returns a loss. [default: as the problem says]"
)
@click.option("--site", help="Name of the Balsam site; several with commas between them: theta,perlmutter.")
@click.option("--method", type=click.Choice(["ambs", "random", "ga"]), help="Search method. [default: ambs]")
@click.option("--max-evals", type=_COUNT, help="Evaluations of the whole search. [default: no limit]")
@click.option("--timeout", type=_SECONDS, help="Seconds of the whole search. [default: no limit]")
@click.option("--seed", type=click.IntRange(min=0), help="Makes the search repeatable. [default: drawn and recorded]")
@method_options
@click.option("--num-nodes-per-eval", type=_COUNT, help="Nodes of one evaluation. [default: 1]")
@click.option("--ranks-per-node", type=_COUNT, help="MPI processes on each node. [default: 1]")
@click.option("--threads-per-rank", type=_COUNT, help="Threads of each process. [default: 1]")
@click.option("--gpus-per-rank", type=_NOT_NEGATIVE, help="GPUs of each process. [default: 0]")
@click.option("--evals-per-node", type=_COUNT, help="Evaluations that share a node. [default: 1]")
@click.option(
    "--resources",
    help="file.py:function or package.module:function that returns the Resources of a configuration, in place of the "
    "options above. [default: the same for all]",
)
@click.option(
    "--eval-timeout", type=_SECONDS, help="Seconds after which an evaluation is ended and has failed. [default: none]"
)
@click.option(
    "--nodes",
    type=PerSite(_COUNT),
    help="Ask for allocations of so many nodes, one after the other; with several sites, these options also take "
    "theta=8,perlmutter=4. [default: use those there are]",
)
@click.option("--wall-time-min", type=PerSite(_COUNT), help="Minutes of the allocation. [default: 60]")
@click.option(
    "--max-allocations",
    type=PerSite(_COUNT),
    help="So many allocations at the same time, while there is work. [default: 1]",
)
@click.option("--queue", type=PerSite(click.STRING), help="Queue of the allocation. [default: local]")
@click.option("--project", type=PerSite(click.STRING), help="Project that pays for the allocation. [default: local]")
@click.option("--job-mode", type=PerSite(_MODE), help="Balsam's launcher mode. [default: mpi]")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    help="End when the first so many trials all fail alike; 0: never. [default: 5]",
)
@click.option(
    "--max-cuts",
    type=click.IntRange(min=0),
    help="A trial fails when the end of so many allocations has cut a run of it that had the whole of each; 0: never. "
    "[default: 3]",
)
@click.option(
    "--stopper",
    help="End runs early that record their objective as they go and have no prospect: sha:max=27,min=1,factor=3, "
    "median, epoch:K (all after K), none. [default: none]",
)
@click.option("--log-dir", type=click.Path(path_type=Path), help="Where the search's folder NAME is made. [default: .]")
@click.option(
    "--warm-start",
    type=click.Path(path_type=Path),
    help="A table of points to learn first (CSV, JSON or Parquet): ours, DeepHyper's, Optuna's or scikit-optimize's. "
    "[default: none]",
)
@click.option(
    "--warm-start-direction",
    type=click.Choice(["maximize", "minimize"]),
    help="What was done there to the objective. [default: as usual in such a file; Optuna's does not say]",
)
@_TAKEOVER
@click.option("--dry-run", is_flag=True, help="Check everything, print the settings, start nothing.")
def run(name: str, file: Path | None, takeover: bool, dry_run: bool, **given: Any) -> None:
    """Search: keep nodes busy with configurations until the budget is used. The same command again goes on with it.

    \b
    Example:
      deephyper-balsam search run digits-1 --problem digits --site local --nodes 1 --evals-per-node 2 --max-evals 30
    """
    settings = settings_of(file, given)
    made = build_search(name, settings)
    if dry_run:
        click.echo(yaml.safe_dump(plain_settings(settings), sort_keys=False), nl=False)  # as it is, a --file
        return
    raise click.exceptions.Exit(drive(made, settings.get("max_evals"), settings.get("timeout"), takeover=takeover))


@search.command()
@click.argument("name")
@click.option(
    "--nodes",
    type=PerSite(_COUNT),
    help="Ask for allocations of so many nodes; with several sites, these options also take theta=8,perlmutter=4. "
    "[default: as the search was begun with]",
)
@click.option("--wall-time-min", type=PerSite(_COUNT), help="Minutes of the allocation. [default: as begun]")
@click.option("--queue", type=PerSite(click.STRING), help="Queue of the allocation. [default: as begun]")
@click.option("--project", type=PerSite(click.STRING), help="Project that pays for the allocation. [default: as begun]")
@click.option("--job-mode", type=PerSite(_MODE), help="Balsam's launcher mode. [default: as begun]")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Where the search's folder NAME is made. [default: .]")
@_TAKEOVER
def resume(name: str, log_dir: Path | None, takeover: bool, **given: Any) -> None:
    """Go on with the search NAME, rebuilt from Balsam alone, until the budget that it has now is used.

    It works in an empty folder and on another machine with the same Balsam login. Evaluations that run are collected,
    and nothing is evaluated twice.

    \b
    Example:
      deephyper-balsam search resume digits-1
    """
    from deephyper_balsam.driver.search import Search
    from deephyper_balsam.store.allocation_request import from_record
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    record = find_record(Gateway(), name)
    begun = from_record(record.settings.get("allocation"), record.sites)
    made = Search.resume(name, log_dir=log_dir or ".", allocation=requests(given, record.sites, begun))
    raise click.exceptions.Exit(drive(made, None, None, takeover=takeover))


@search.command()
@json_option
def ls(as_json: bool) -> None:
    """List the searches of this Balsam account.

    \b
    Example:
      deephyper-balsam search ls
    """
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.lease import current_lease, read_leases
    from deephyper_balsam.store.record import find_records

    gateway = Gateway()
    records, leases = find_records(gateway), read_leases(gateway)
    rows = []
    for record in records:
        driver = current_lease(leases.get(record.name, []), gateway.now())
        past = [lease for lease in leases.get(record.name, []) if lease.driving_since is not None and lease != driver]
        rows.append(
            {
                "name": record.name,
                "method": record.settings["method"],
                "problem": record.settings["problem"].get("name"),
                "site": record.settings["site"],
                "begun": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created_at)),
                "driver": None if driver is None else f"{driver.host}:{driver.pid}",
                "last": None if driver is not None or not past else past[-1].why or "lost",
            }
        )
    columns = ("name", "method", "problem", "site", "begun", "driver", "last")
    echo_table(rows, columns, as_json, "There is no search yet.")


@search.command()
@click.argument("name")
@json_option
def status(name: str, as_json: bool) -> None:
    """Say how the search NAME stands: its drivers, now and before, trials by state, failures by reason, the best.

    \b
    Example:
      deephyper-balsam search status digits-1
    """
    from deephyper_balsam.common.objective import minimises
    from deephyper_balsam.driver import code_versions
    from deephyper_balsam.driver.health import read_health
    from deephyper_balsam.monitor.timeline import read_busy
    from deephyper_balsam.results.early import saved
    from deephyper_balsam.results.table import best, lines_of
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record
    from deephyper_balsam.store.snapshots import read_rows

    gateway = Gateway()
    record = find_record(gateway, name)
    rows = read_rows(gateway, name)
    lines, health = lines_of(gateway, record, rows), read_health(gateway, rows)
    states = dict(Counter(line["job_status"] for line in lines))
    at_sites: dict[str, Counter[str]] = {site: Counter() for site in record.sites}
    for line in lines:
        at_sites.setdefault(line["m:site"], Counter())[line["job_status"]] += 1
    failures = dict(Counter(line["m:failure"] for line in lines if line["job_status"] == "FAILED"))
    best_line, minimize = best(lines), minimises(record.settings)
    found = standing(gateway, record, states)
    busy, early = read_busy(gateway, record, rows), saved(lines)
    if as_json:
        trials = {
            "settings": record.settings,
            "states": states,
            "sites": at_sites,
            "failures": failures,
            **health,
            "code_versions": code_versions.count(lines),
            "busy": busy,
            "early": None if early is None else early.to_dict(),
            "best": best_line,
        }
        echo_json({"name": name, **trials, **found})
        return
    click.echo(
        f"Search {name}: {record.settings['method']} on {record.settings['problem'].get('name')} "
        f"at {record.settings['site']}"
    )
    evaluated = states.get("DONE", 0) + states.get("FAILED", 0)
    echo_standing(found, evaluated)
    click.echo("Trials: " + (by_state(states) or "none yet"))
    if busy is not None:
        click.echo(f"Nodes: {busy:.1%} busy with runs (more: deephyper-balsam search utilization {name})")
    if early is not None:
        click.echo(f"Early: {early}")
    for site, at_site in at_sites.items() if len(at_sites) > 1 else ():
        click.echo(f"  at {site}: {by_state(at_site) or 'none'}")
    for reason, count in by_kind(failures.items())[:10]:
        click.echo(f"  failed {count}x: {reason}")
    for words in _health_said(health):
        click.echo(words)
    changed = code_versions.said(code_versions.count(lines))
    if changed:
        click.echo(f"Note: {changed}")
    echo_best(best_line, minimize)


@search.command()
@click.argument("name")
@click.option("-n", "count", type=click.IntRange(min=1), default=1, show_default=True, help="How many of the best.")
@json_option
def best(name: str, count: int, as_json: bool) -> None:
    """Show the best configurations of the search NAME.

    \b
    Example:
      deephyper-balsam search best digits-1 -n 3
    """
    from deephyper_balsam.common.objective import minimises

    _, record, lines = _read(name)
    minimize = minimises(record.settings)
    done = sorted((line for line in lines if line["objective"] is not None), key=lambda line: -line["objective"])[
        :count
    ]
    if as_json:
        echo_json(done)
    else:
        for line in done:
            echo_best(line, minimize)
        if not done:
            echo_best(None, minimize)
    if not done:
        raise click.exceptions.Exit(EXIT_NO_RESULT)


@search.command()
@click.argument("name")
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    help="Write to this .csv, .json or .parquet file instead of the screen.",
)
@click.option("--legacy", is_flag=True, help="The columns of the 2018 DeepHyper.")
@click.option("--deephyper", is_flag=True, help="What DeepHyper reads: ended trials, failures as F_ and why.")
@json_option
def results(name: str, output: Path | None, legacy: bool, deephyper: bool, as_json: bool) -> None:
    """Print the table of the search NAME as CSV, or as a JSON list of rows; or write it to a file.

    \b
    Example:
      deephyper-balsam search results digits-1 -o digits-1.csv
    """
    from deephyper_balsam.results.table import (
        check_export,
        csv_text,
        deephyper_lines,
        export,
        frame_csv,
        legacy_table,
        rows_of,
        table,
        write_whole,
    )

    if legacy and deephyper:
        raise SettingsError("Give --legacy or --deephyper, not both: they are different tables.")
    if output is not None:
        check_export(output)
    _, record, lines = _read(name)
    names = record.settings["problem"]["hyperparameters"]
    if deephyper:
        lines = deephyper_lines(lines)
    is_csv = output is None or output.suffix.lower() == ".csv"
    if is_csv and not as_json and not legacy:  # no pandas: it would be a third of the time
        text, count = csv_text(lines, names), len(lines)
        if output is not None:
            write_whole(output, text)
    else:
        frame = (legacy_table if legacy else table)(lines, names)
        text, count = "" if output else frame_csv(frame), len(frame)
        if as_json:
            echo_json(rows_of(frame))
            return
        if output is not None:
            export(frame, output)
    if output is not None:
        click.echo(f"{counted(count, 'row')} written to {output}")
    else:
        echo_data(text)


for _command in (
    show,
    delete,
    watch,
    stop,
    extend,
    add,
    report,
    plot,
    compare,
    utilization,
    submit_command(run),
):
    search.add_command(_command)


def _health_said(health: dict[str, Any]) -> list[str]:
    from deephyper_balsam.driver.health import too_long_said

    said = [f"  run once more {count}x after: {reason}" for reason, count in by_kind(health["retried_after"].items())]
    if health["cut"]:
        most = sorted(health["cut"].items(), key=lambda entry: -entry[1])[:10]
        said.append(
            "Cut by the end of an allocation, and still to be run: "
            + ", ".join(f"trial {number} ({count}x)" for number, count in most)
        )
    if health["too_long"]:
        said.append(f"Too long: {too_long_said(health['too_long'])}")
    said += [f"Node {host} failed all of {counted(count, 'run')}" for host, count in health["failing_nodes"].items()]
    return said


def _read(name: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    from deephyper_balsam.results.table import read_lines
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    gateway = Gateway()
    record = find_record(gateway, name)
    return gateway, record, read_lines(gateway, record)
