"""`deephyper-balsam search`: run a search and look at it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import yaml

from deephyper_balsam.cli import EXIT_NO_RESULT
from deephyper_balsam.cli.common import Finite, drive, echo_best, echo_json, echo_table, json_option, run_target
from deephyper_balsam.cli.orders import add, extend, stop
from deephyper_balsam.cli.per_site import PerSite, requests
from deephyper_balsam.cli.report import compare, plot, report
from deephyper_balsam.cli.standing import by_state, echo_standing, standing
from deephyper_balsam.cli.submit import submit_command
from deephyper_balsam.cli.utilization import utilization
from deephyper_balsam.cli.watch import watch
from deephyper_balsam.errors import SettingsError

_REQUIRED = ("problem", "site")
# names of search.yaml and of the options that belong to the method, given on only when they were set
_METHOD_OPTIONS = ("surrogate", "acq_func", "kappa", "xi", "liar_strategy", "initial_design", "num_initial")


@click.group()
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
    "--file", "file", type=click.Path(path_type=Path), help="A YAML file with the same names as these options."
)
@click.option("--problem", help="file.py:problem, package.module:problem, a folder, or a bundled name.")
@click.option(
    "--run", help="file.py:run, package.module:run, or a shell command's YAML. [default: found beside the problem]"
)
@click.option("--site", help="Name of the Balsam site; several with commas between them: theta,perlmutter.")
@click.option("--method", type=click.Choice(["ambs", "random", "ga"]), help="Search method. [default: ambs]")
@click.option("--max-evals", type=_COUNT, help="Evaluations of the whole search. [default: no limit]")
@click.option("--timeout", type=_SECONDS, help="Seconds of the whole search. [default: no limit]")
@click.option("--seed", type=click.IntRange(min=0), help="Makes the search repeatable. [default: drawn and recorded]")
@click.option(
    "--surrogate", type=click.Choice(["RF", "ET", "GBRT", "GP", "auto"]), help="Model of AMBS. [default: auto]"
)
@click.option(
    "--acq-func", type=click.Choice(["LCB", "EI", "PI", "gp_hedge"]), help="What AMBS asks of it. [default: LCB]"
)
@click.option("--kappa", type=_NOT_NEGATIVE, help="Exploration of LCB. [default: 1.0]")
@click.option("--xi", type=_NOT_NEGATIVE, help="Exploration of EI and PI. [default: 0.01]")
@click.option(
    "--liar-strategy",
    type=click.Choice(["believer", "cl_min", "cl_mean", "cl_max"]),
    help="What AMBS takes pending trials for: the model's own prediction, or a constant lie. [default: believer]",
)
@click.option(
    "--initial-design",
    type=click.Choice(["sobol", "lhs", "halton", "random"]),
    help="First points of AMBS. [default: sobol]",
)
@click.option("--num-initial", type=_COUNT, help="How many those are. [default: by the problem and the workers]")
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
@click.option("--log-dir", type=click.Path(path_type=Path), help="Where the search's folder NAME is made. [default: .]")
@click.option(
    "--warm-start",
    type=click.Path(path_type=Path),
    help="A CSV of points to learn first: ours, DeepHyper's, Optuna's or scikit-optimize's. [default: none]",
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
    settings = _settings(file, given)
    made = _build(name, settings)
    if dry_run:
        click.echo(yaml.safe_dump(_plain(settings), sort_keys=False), nl=False)  # as it is, a --file
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
    from deephyper_balsam.allocations import from_record
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_record
    from deephyper_balsam.search import Search

    record = find_record(Gateway(), name)
    begun = from_record(record.settings.get("allocation"), record.sites)
    made = Search.resume(name, log_dir=log_dir or ".", allocation=requests(given, record.sites, begun))
    raise click.exceptions.Exit(drive(made, None, None, takeover=takeover))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def _settings(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, over those of the file."""
    from_file = {} if file is None else _read_file(file, given)
    settings = {**from_file, **{key: value for key, value in given.items() if value is not None}}
    missing = [key for key in _REQUIRED if not settings.get(key)]
    if missing:
        raise SettingsError(f"A search needs {' and '.join('--' + key for key in missing)} (as options or in --file).")
    if "max_evals" not in settings and "timeout" not in settings:
        raise SettingsError("A search needs an end: give --max-evals, --timeout or both.")
    return settings


def _read_file(file: Path, known: Iterable[str]) -> dict[str, Any]:
    """Return the options in a file, each checked as on the command line."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must be a mapping of options to values, but is a {type(content).__name__}.")
    unknown = sorted(map(str, set(content) - set(known)))
    if unknown:
        raise SettingsError(f"{file} has unknown keys {unknown}; known are {', '.join(sorted(known))}.")
    options = {option.name: option for option in click.get_current_context().command.params}
    settings = {}
    for key, value in content.items():
        if key == "site" and isinstance(value, list):
            value = ",".join(map(str, value))
        may_differ = isinstance(options[key].type, PerSite) and isinstance(value, dict)
        if isinstance(value, (dict, list)) and not may_differ:
            raise SettingsError(f"{file}: `{key}` must be a single value, but got {value!r}.")
        try:
            if value is not None:  # as text: 3.5 is no whole number, and `yes` none at all
                text = value if may_differ else str(value)
                settings[key] = options[key].type.convert(text, options[key], None)
        except click.BadParameter as error:
            raise SettingsError(f"{file}: `{key}`: {error.message}") from error
    return settings


def _build(name: str, settings: dict[str, Any]) -> Any:
    from deephyper_balsam.apps import command_parameters, resolve_problem
    from deephyper_balsam.evaluators.balsam import BalsamEvaluator
    from deephyper_balsam.gateway import check_name
    from deephyper_balsam.record import site_names
    from deephyper_balsam.search import Search

    check_name(name)
    problem = resolve_problem(settings["problem"])
    problem.check()
    sites = site_names(settings["site"])
    evaluator = BalsamEvaluator(
        settings.get("run") or run_target(settings["problem"]),
        sites,
        resources=_resources(settings),
        eval_timeout=settings.get("eval_timeout"),
        allocation=requests(settings, sites),
    )
    evaluator.needs.of(problem.default_configuration)  # what is wrong with a function is said before anything begins
    if evaluator.spec["kind"] == "command":
        unknown = sorted(command_parameters(evaluator.spec) - set(problem.hyperparameter_names))
        if unknown:
            raise SettingsError(
                f"The command names {unknown}, but the problem's hyperparameters are "
                f"{list(problem.hyperparameter_names)}."
            )
    return Search(
        problem,
        evaluator,
        name,
        settings.get("method", "ambs"),
        warm_start=_warm_start(settings, problem),
        seed=settings.get("seed"),
        log_dir=settings.get("log_dir", "."),
        asked_for=_plain(settings),
        **{key: settings[key] for key in ("max_failures",) if key in settings},
        **{key: settings[key] for key in _METHOD_OPTIONS if key in settings},
    )


def _warm_start(settings: dict[str, Any], problem: Any) -> Any:
    from deephyper_balsam.warm_start import read_warm_start

    if settings.get("warm_start") is None:
        return ()
    found = read_warm_start(Path(settings["warm_start"]), problem, settings.get("warm_start_direction"))
    click.echo(f"Warm start from {settings['warm_start']}: {found}.", err=True)
    return found.points


def _resources(settings: dict[str, Any]) -> Any:
    from deephyper_balsam.jobs import Resources

    known = inspect.signature(Resources).parameters
    given = {"num_nodes": settings.get("num_nodes_per_eval"), **settings, "wall_time_min": None}  # the allocation's
    fixed = {key: value for key, value in given.items() if key in known and value is not None}
    if settings.get("resources") is None:
        return Resources(**fixed)
    if fixed:
        options = ", ".join("--" + key.replace("_", "-").replace("num-nodes", "num-nodes-per-eval") for key in fixed)
        raise SettingsError(f"Give either --resources, which decides for each configuration, or {options}.")
    return settings["resources"]


@search.command()
@json_option
def ls(as_json: bool) -> None:
    """List the searches of this Balsam account.

    \b
    Example:
      deephyper-balsam search ls
    """
    from deephyper_balsam.drivers import at_the_wheel, read_lives
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_records

    gateway = Gateway()
    records, lives = find_records(gateway), read_lives(gateway)
    rows = []
    for record in records:
        driver = at_the_wheel(lives.get(record.name, []), gateway.now())
        past = [life for life in lives.get(record.name, []) if life.driving_since is not None and life != driver]
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
    from deephyper_balsam.archive import read_rows
    from deephyper_balsam.evaluators.health import read_health
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_record
    from deephyper_balsam.results import best, lines_of

    gateway = Gateway()
    record = find_record(gateway, name)
    rows = read_rows(gateway, name)
    lines, health = lines_of(gateway, record, rows), read_health(gateway, rows)
    states: dict[str, int] = {}
    at_sites: dict[str, dict[str, int]] = {site: {} for site in record.sites}
    failures: dict[str, int] = {}
    for line in lines:
        states[line["job_status"]] = states.get(line["job_status"], 0) + 1
        at_site = at_sites.setdefault(line["m:site"], {})
        at_site[line["job_status"]] = at_site.get(line["job_status"], 0) + 1
        if line["job_status"] == "FAILED":
            failures[line["m:failure"]] = failures.get(line["m:failure"], 0) + 1
    best_line = best(lines)
    found = standing(gateway, record)
    if as_json:
        trials = {
            "settings": record.settings,
            "states": states,
            "sites": at_sites,
            "failures": failures,
            **health,
            "best": best_line,
        }
        echo_json({"name": name, **trials, **found})
        return
    click.echo(
        f"Search {name}: {record.settings['method']} on {record.settings['problem'].get('name')} "
        f"at {record.settings['site']}"
    )
    evaluated = states.get("DONE", 0) + states.get("FAILED", 0)
    echo_standing(name, found, evaluated)
    click.echo("Trials: " + (by_state(states) or "none yet"))
    for site, at_site in at_sites.items() if len(at_sites) > 1 else ():
        click.echo(f"  at {site}: {by_state(at_site) or 'none'}")
    for reason, count in sorted(failures.items(), key=lambda entry: -entry[1])[:10]:
        click.echo(f"  failed {count}x: {reason}")
    for words in _health_said(health):
        click.echo(words)
    echo_best(best_line)


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
    _, _, lines = _read(name)
    done = sorted((line for line in lines if line["objective"] is not None), key=lambda line: -line["objective"])[
        :count
    ]
    if as_json:
        echo_json(done)
    else:
        for line in done:
            echo_best(line)
        if not done:
            echo_best(None)
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
    from deephyper_balsam.results import (
        check_export,
        csv_text,
        deephyper_lines,
        export,
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
        text, count = "" if output else frame.to_csv(index=False), len(frame)
        if as_json:
            echo_json(rows_of(frame))
            return
        if output is not None:
            export(frame, output)
    if output is not None:
        click.echo(f"{count} rows written to {output}")
    else:
        click.echo(text, nl=False)


for _command in (watch, stop, extend, add, report, plot, compare, utilization, submit_command(run, _settings, _build)):
    search.add_command(_command)


def _health_said(health: dict[str, Any]) -> list[str]:
    from deephyper_balsam.evaluators.health import too_long_said

    said = [f"  run once more {count}x after: {reason}" for reason, count in health["retried_after"].items()]
    if health["cut"]:
        most = sorted(health["cut"].items(), key=lambda entry: -entry[1])[:10]
        said.append(
            "Cut by the end of an allocation, and still to be run: "
            + ", ".join(f"trial {number} ({count}x)" for number, count in most)
        )
    if health["too_long"]:
        said.append(f"Too long: {too_long_said(health['too_long'])}")
    said += [f"Node {host} failed all {count} runs that it got" for host, count in health["failing_nodes"].items()]
    return said


def _read(name: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_record
    from deephyper_balsam.results import read_lines

    gateway = Gateway()
    record = find_record(gateway, name)
    return gateway, record, read_lines(gateway, record)
