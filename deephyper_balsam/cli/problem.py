"""`deephyper-balsam problem`: look at a search space, and try one configuration here."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from deephyper_balsam.cli import EXIT_NO_RESULT
from deephyper_balsam.cli.common import echo_json, json_option, run_target


@click.group()
def problem() -> None:
    """Look at a problem and try it before it costs node-hours.

    \b
    Example:
      deephyper-balsam problem check digits
    """


@problem.command()
@click.argument("target")
@json_option
def show(target: str, as_json: bool) -> None:
    """Show the hyperparameters, conditions and starting points of TARGET.

    \b
    Example:
      deephyper-balsam problem show digits
    """
    from deephyper_balsam.apps import resolve_problem

    found = resolve_problem(target)
    found.check()
    if as_json:
        echo_json(found.to_dict())
    else:
        click.echo(found.describe())


@problem.command()
@click.argument("target")
@click.option("--run", help="The run function. [default: found beside the problem]")
@json_option
def check(target: str, run: str | None, as_json: bool) -> None:
    """Evaluate the default configuration of TARGET here, once, as a node would, and say what came of it.

    \b
    Example:
      deephyper-balsam problem check digits
    """
    from deephyper_balsam.apps import resolve_problem, resolve_run

    found = resolve_problem(target)
    found.check()
    spec = resolve_run(run or run_target(target))
    config = found.starting_points[0] if found.starting_points else found.default_configuration
    outcome = _evaluate_here(spec, config)
    if as_json:
        echo_json({"configuration": config, **outcome})
    else:
        click.echo(found.describe())
        click.echo(f"\nConfiguration tried: {config}")
        click.echo(f"It took {outcome['end'] - outcome['start']:.2f} s.")
        if outcome["objective"] is None:
            click.echo(f"It failed: {outcome['failure']}\n{outcome.get('traceback', '')}".rstrip())
        else:
            click.echo(f"Objective: {outcome['objective']:.6g} (it will be maximised)")
        if outcome["metadata"]:
            click.echo(f"Metadata: {outcome['metadata']}")
    if outcome["objective"] is None:
        raise click.exceptions.Exit(EXIT_NO_RESULT)


def _evaluate_here(spec: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    from deephyper_balsam.worker import RunningJob, evaluate, make_run_function

    with TemporaryDirectory() as folder:
        return evaluate(make_run_function(spec, Path(folder)), RunningJob(0, config))
