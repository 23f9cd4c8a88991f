"""`deephyper-balsam problem`: begin one, look at a search space, and try one configuration here."""

from __future__ import annotations

import re
from pathlib import Path

import click

from deephyper_balsam.cli import EXIT_NO_RESULT, Group
from deephyper_balsam.cli.common import echo_json, json_option, run_target
from deephyper_balsam.errors import InputError, TargetError

_TEMPLATES = Path(__file__).parents[1] / "new_problem"


@click.group(cls=Group)
def problem() -> None:
    """Begin a problem, look at it, and try it before it costs node-hours.

    \b
    Example:
      deephyper-balsam problem new mine
      deephyper-balsam problem check digits
    """


@problem.command()
@click.argument("target")
@click.option("--run", help="A shell command's YAML: it may say that smaller is better. [default: beside the problem]")
@json_option
def show(target: str, run: str | None, as_json: bool) -> None:
    """Show the hyperparameters, conditions and starting points of TARGET.

    \b
    Example:
      deephyper-balsam problem show digits
    """
    from deephyper_balsam.store.applications import resolve_command, resolve_problem

    found = resolve_problem(target)
    found.check()
    try:
        spec = resolve_command(run or run_target(target))
    except TargetError:
        if run is not None:
            raise
        spec = None  # there may be no run function yet
    found = found.as_run_by(spec)
    if as_json:
        echo_json(found.to_dict())
    else:
        click.echo(found.describe())


@problem.command()
@click.argument("target")
@click.option("--run", help="The run function. [default: found beside the problem]")
@click.option(
    "--gpus-per-rank", type=click.FloatRange(min=0), default=0.0, show_default=True, help="GPUs that it will ask for."
)
@json_option
def check(target: str, run: str | None, gpus_per_rank: float, as_json: bool) -> None:
    """Evaluate one configuration of TARGET here, as a node would, time it, and warn of what will fail on a node.

    It is the first starting point, or the default configuration. It runs in a process and an empty folder of its own,
    without the current folder on Python's path.

    \b
    Example:
      deephyper-balsam problem check digits
    """
    from deephyper_balsam.common.objective import told, turned
    from deephyper_balsam.node.preflight import run_preflight
    from deephyper_balsam.store.applications import resolve_problem, resolve_run

    found = resolve_problem(target)
    found.check()
    spec = resolve_run(run or run_target(target))
    found = found.as_run_by(spec)
    config = found.starting_points[0] if found.starting_points else found.default_configuration
    tried = run_preflight(spec, config, gpus_per_rank)
    outcome = tried.outcome
    if as_json:
        kept = None if outcome["objective"] is None else turned(outcome["objective"], found.minimize)
        echo_json(
            {
                "configuration": config,
                **outcome,
                **told(kept, found.minimize),
                "findings": tried.findings,
            }
        )
    else:
        click.echo(found.describe())
        click.echo(f"\nA worker calls {spec['target']} with {config}")
        click.echo("in an empty folder of its own. Here")
        click.echo(f"it took {outcome['end'] - outcome['start']:.2f} s.")
        if outcome["objective"] is None:
            click.echo(f"It failed: {outcome['failure']}\n{outcome.get('traceback', '')}".rstrip())
        else:
            click.echo(
                f"Objective: {outcome['objective']:.6g} (it will be {'minimised' if found.minimize else 'maximised'})"
            )
        if outcome["metadata"]:
            click.echo(f"Metadata: {outcome['metadata']}")
        for finding in tried.findings:
            click.echo(f"Warning: {finding}")
    if outcome["objective"] is None:
        raise click.exceptions.Exit(EXIT_NO_RESULT)


@problem.command()
@click.argument("name")
def new(name: str) -> None:
    """Make a folder NAME with a problem, a run function, search.yaml, a test that passes, and a README.

    \b
    Example:
      deephyper-balsam problem new mine
    """
    from deephyper_balsam.results.table import write_whole

    folder = Path(name)
    if not re.fullmatch(r"[A-Za-z]\w{0,59}", folder.name):
        raise InputError(f"{folder.name!r} cannot name a problem: a letter, then letters, digits and '_' are allowed.")
    if folder.exists():
        raise InputError(f"{folder} exists already: give another name. Nothing was changed.")
    for template in sorted(_TEMPLATES.glob("*.txt")):
        text = template.read_text(encoding="utf-8").replace("@NAME@", folder.name)
        write_whole(folder / template.stem, text)
    click.echo(f"Made {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}.")
    click.echo(f"Next: cd {folder} && deephyper-balsam problem check .")
