"""`deephyper-balsam search`: run a search and look at it."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import click
import yaml

from deephyper_balsam.cli import EXIT_NO_RESULT
from deephyper_balsam.cli.common import drive, echo_best, echo_json, echo_table, json_option
from deephyper_balsam.errors import SettingsError

_REQUIRED = ("problem", "site")
# names of search.yaml and of the options that belong to the method, given on only when they were set
_METHOD_OPTIONS = ("surrogate", "acq_func", "kappa", "xi", "liar_strategy", "initial_design")
_STOP_WAIT_S = 60.0


@click.group()
def search() -> None:
    """Run searches and look at them. A search lives in Balsam: every command works from any machine with the login."""


@search.command()
@click.argument("name")
@click.option(
    "--file", "file", type=click.Path(path_type=Path), help="A search.yaml with the same names as these options."
)
@click.option("--problem", help="file.py:problem, package.module:problem, a folder, or a bundled name.")
@click.option("--run", help="file.py:run, package.module:run, a shell command's YAML; default: beside the problem.")
@click.option("--site", help="Name of the Balsam site.")
@click.option("--method", type=click.Choice(["ambs", "random", "ga"]), help="[default: ambs]")
@click.option("--max-evals", type=int, help="Evaluations of the whole search.")
@click.option("--timeout", type=float, help="Seconds of the whole search.")
@click.option("--seed", type=int, help="Makes the search repeatable. [default: drawn and recorded]")
@click.option("--surrogate", type=click.Choice(["RF", "ET", "GBRT", "GP", "auto"]), help="Model of AMBS.")
@click.option("--acq-func", type=click.Choice(["LCB", "EI", "PI", "gp_hedge"]), help="What AMBS asks of the model.")
@click.option("--kappa", type=float, help="Exploration of LCB.")
@click.option("--xi", type=float, help="Exploration of EI and PI.")
@click.option("--liar-strategy", type=click.Choice(["cl_min", "cl_mean", "cl_max"]), help="Constant liar for batches.")
@click.option("--initial-design", type=click.Choice(["sobol", "lhs", "halton", "random"]), help="First points of AMBS.")
@click.option("--num-nodes-per-eval", type=int, help="Nodes of one evaluation. [default: 1]")
@click.option("--ranks-per-node", type=int, help="MPI processes on each node. [default: 1]")
@click.option("--threads-per-rank", type=int, help="Threads of each process. [default: 1]")
@click.option("--gpus-per-rank", type=float, help="GPUs of each process. [default: 0]")
@click.option("--evals-per-node", type=int, help="Evaluations that share a node. [default: 1]")
@click.option("--eval-timeout", type=float, help="Seconds after which an evaluation is ended and has failed.")
@click.option("--nodes", type=int, help="Ask for an allocation of so many nodes, again whenever none is alive.")
@click.option("--wall-time-min", type=int, help="Minutes of the allocation. [default: 60]")
@click.option("--queue", help="Queue of the allocation. [default: local]")
@click.option("--project", help="Project that pays for the allocation. [default: local]")
@click.option("--job-mode", type=click.Choice(["mpi", "serial"]), help="Balsam's launcher mode. [default: mpi]")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Where the search's folder NAME is made. [default: .]")
@click.option("--dry-run", is_flag=True, help="Check everything, print the settings, start nothing.")
def run(name: str, file: Path | None, dry_run: bool, **given: Any) -> None:
    """Search: keep nodes busy with configurations until the budget is used. The same command again goes on with it.

    \b
    Example:
      deephyper-balsam search run digits-1 --problem digits --site local --nodes 1 --evals-per-node 2 --max-evals 30
    """
    settings = _settings(file, given)
    made = _build(name, settings)
    if dry_run:
        click.echo(yaml.safe_dump({"name": name, **settings}, sort_keys=False), nl=False)
        return
    raise click.exceptions.Exit(drive(made, settings.get("max_evals"), settings.get("timeout")))


def _settings(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, over those of the file."""
    from_file: dict[str, Any] = {}
    if file is not None:
        try:
            from_file = yaml.safe_load(file.read_text()) or {}
        except OSError as error:
            raise SettingsError(f"{file} cannot be read: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise SettingsError(f"{file} is no YAML: {error}") from error
        if not isinstance(from_file, dict):
            raise SettingsError(f"{file} must be a mapping of options, but is a {type(from_file).__name__}.")
        unknown = sorted(set(from_file) - set(given))
        if unknown:
            raise SettingsError(f"{file} has unknown keys {unknown}; known are {', '.join(sorted(given))}.")
    settings = {**from_file, **{key: value for key, value in given.items() if value is not None}}
    missing = [key for key in _REQUIRED if key not in settings]
    if missing:
        raise SettingsError(f"A search needs {' and '.join('--' + key for key in missing)} (as options or in --file).")
    if "max_evals" not in settings and "timeout" not in settings:
        raise SettingsError("A search needs an end: give --max-evals, --timeout or both.")
    return settings


def _build(name: str, settings: dict[str, Any]) -> Any:
    from deephyper_balsam.allocations import AllocationRequest
    from deephyper_balsam.apps import command_parameters, resolve_problem
    from deephyper_balsam.evaluators.balsam import BalsamEvaluator
    from deephyper_balsam.gateway import check_name
    from deephyper_balsam.jobs import Resources
    from deephyper_balsam.search import Search

    check_name(name)
    problem = resolve_problem(settings["problem"])
    problem.check()
    needs = _known(Resources, {"num_nodes": settings.get("num_nodes_per_eval"), **settings})
    needs.pop("wall_time_min", None)  # here the allocation's
    allocation = None
    if "nodes" in settings:
        allocation = AllocationRequest(**_known(AllocationRequest, settings))
    evaluator = BalsamEvaluator(
        settings.get("run") or settings["problem"],
        settings["site"],
        resources=Resources(**needs),
        eval_timeout=settings.get("eval_timeout"),
        allocation=allocation,
    )
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
        seed=settings.get("seed"),
        log_dir=settings.get("log_dir", "."),
        **{key: settings[key] for key in _METHOD_OPTIONS if key in settings},
    )


def _known(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(kind).parameters
    return {key: value for key, value in settings.items() if key in names and value is not None}


@search.command()
@json_option
def ls(as_json: bool) -> None:
    """List the searches of this Balsam account.

    \b
    Example:
      deephyper-balsam search ls
    """
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_records, read_driver

    gateway = Gateway()
    rows = []
    for record in find_records(gateway):
        driver = read_driver(gateway, record.name)
        alive = driver is not None and driver.is_alive(time.time())
        rows.append(
            {
                "name": record.name,
                "method": record.settings["method"],
                "problem": record.settings["problem"].get("name"),
                "site": record.settings["site"],
                "begun": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created_at)),
                "driver": f"{driver.host}:{driver.pid}" if driver is not None and alive else None,
            }
        )
    echo_table(rows, ("name", "method", "problem", "site", "begun", "driver"), as_json, "There is no search yet.")


@search.command()
@click.argument("name")
@json_option
def status(name: str, as_json: bool) -> None:
    """Say how the search NAME stands: trials by state, the best, failures by reason, who drives it.

    \b
    Example:
      deephyper-balsam search status digits-1
    """
    from deephyper_balsam.record import read_driver
    from deephyper_balsam.results import best

    gateway, record, lines = _read(name)
    driver = read_driver(gateway, name)
    now = time.time()
    alive = driver is not None and driver.is_alive(now)
    states: dict[str, int] = {}
    failures: dict[str, int] = {}
    for line in lines:
        states[line["job_status"]] = states.get(line["job_status"], 0) + 1
        if line["job_status"] == "FAILED":
            failures[line["m:failure"]] = failures.get(line["m:failure"], 0) + 1
    best_line = best(lines)
    if as_json:
        echo_json(
            {
                "name": name,
                "settings": record.settings,
                "states": states,
                "failures": failures,
                "best": best_line,
                "driver": None if driver is None or not alive else {"host": driver.host, "pid": driver.pid},
            }
        )
        return
    click.echo(
        f"Search {name}: {record.settings['method']} on {record.settings['problem'].get('name')} "
        f"at {record.settings['site']}"
    )
    click.echo(
        f"Driver: {driver.host}, process {driver.pid}, last sign of life {now - driver.at:.0f} s ago"
        if driver is not None and alive
        else "Driver: none"
    )
    click.echo("Trials: " + (_by_state(states) or "none yet"))
    for reason, count in sorted(failures.items(), key=lambda entry: -entry[1])[:10]:
        click.echo(f"  failed {count}x: {reason}")
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
@click.option("-o", "output", type=click.Path(path_type=Path), help="Write CSV to this file instead of the screen.")
@click.option("--legacy", is_flag=True, help="The columns of the 2018 DeepHyper.")
@json_option
def results(name: str, output: Path | None, legacy: bool, as_json: bool) -> None:
    """Print the table of the search NAME as CSV, or as a JSON list of rows.

    \b
    Example:
      deephyper-balsam search results digits-1 -o digits-1.csv
    """
    from deephyper_balsam.results import legacy_table, table, write_whole

    _, record, lines = _read(name)
    names = [parameter["name"] for parameter in record.settings["problem"].get("hyperparameters", [])]
    frame = (legacy_table if legacy else table)(lines, names)
    if as_json:
        echo_json([{key: value for key, value in row.items() if value == value} for row in frame.to_dict("records")])
    elif output is not None:
        write_whole(output, frame.to_csv(index=False))
        click.echo(f"{len(frame)} rows written to {output}")
    else:
        click.echo(frame.to_csv(index=False), nl=False)


@search.command()
@click.argument("name")
def stop(name: str) -> None:
    """Stop the search NAME: no new trials, waiting ones withdrawn, running ones end on their own.

    \b
    Example:
      deephyper-balsam search stop digits-1
    """
    from deephyper_balsam.jobs import withdraw_waiting
    from deephyper_balsam.record import ask_to_stop

    gateway, _, _ = _read(name)
    driver = ask_to_stop(gateway, name, time.time())
    if driver is None:
        withdrawn = withdraw_waiting(gateway, name, time.time())
        click.echo(f"Nobody drives {name}; {len(withdrawn)} waiting trials withdrawn.")
        return
    click.echo(f"Asked the driver (process {driver.pid} on {driver.host}) to stop ...")
    deadline = time.monotonic() + _STOP_WAIT_S
    while ask_to_stop(gateway, name, time.time()) is not None:
        if time.monotonic() > deadline:
            click.echo("It has not stopped yet; it will at its next look at Balsam.")
            return
        time.sleep(0.5)
    click.echo("Stopped.")


def _by_state(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def _read(name: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    from deephyper_balsam.gateway import Gateway
    from deephyper_balsam.record import find_record
    from deephyper_balsam.results import read_lines

    gateway = Gateway()
    record = find_record(gateway, name)
    return gateway, record, read_lines(gateway, record)
