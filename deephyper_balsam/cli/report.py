"""`deephyper-balsam search report | plot | compare`: what searches found, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deephyper_balsam.cli.common import echo_json, echo_table, json_option

if TYPE_CHECKING:
    from deephyper_balsam.results.analysis.trials import Trials
    from deephyper_balsam.store.gateway import Gateway

_KINDS = ("progress", "progress-time", "running", "parallel", "importance", "dependence", "panels")
_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("name")
@click.option("-o", "output", type=_FILE, help="Write to this file. [default: NAME/report.html]")
@click.option("--log-dir", type=_FILE, default=".", show_default=True, help="Where the search's folder NAME is.")
def report(name: str, output: Path | None, log_dir: Path) -> None:
    """Write the report of the search NAME: one HTML file with figures, importances and all trials, for any browser.

    \b
    Example:
      deephyper-balsam search report digits-1
    """
    path = output or log_dir / name / "report.html"
    size = write_report(name, path)
    click.echo(f"Report written to {path} ({size / 1e6:.1f} MB)")


def write_report(name: str, path: Path, gateway: Gateway | None = None) -> int:
    """Write the report of a search to a file; its size in bytes."""
    from deephyper_balsam.monitor.node_hours import count_node_hours
    from deephyper_balsam.monitor.timeline import read_timeline
    from deephyper_balsam.results.analysis.drawing import check_drawing
    from deephyper_balsam.results.analysis.report import html
    from deephyper_balsam.results.table import write_whole
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    check_drawing()
    gateway = gateway or Gateway()
    trials = _trials(name, gateway)
    content = html(trials, gateway.now(), count_node_hours(read_timeline(gateway, find_record(gateway, name)))).encode()
    write_whole(path, content)
    return len(content)


@click.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(_KINDS), default="progress", show_default=True, help="What to draw.")
@click.option("-o", "output", type=_FILE, required=True, help="A .pdf, .png or .svg file.")
def plot(name: str, kind: str, output: Path) -> None:
    """Draw one figure of the search NAME, for a paper or a talk.

    progress and progress-time: objective and best so far, against evaluations and against time. running: trials
    running over time. parallel: parallel coordinates. importance: of hyperparameters and of pairs. dependence: the mean
    objective against each hyperparameter, as a forest sees it. panels: the objective against each hyperparameter.

    \b
    Example:
      deephyper-balsam search plot digits-1 --kind importance -o importance.pdf
    """
    from deephyper_balsam.results.analysis.drawing import check_drawing
    from deephyper_balsam.results.analysis.figures import figure

    check_drawing(output)
    _draw(figure(_trials(name), kind), output)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--by",
    type=click.Choice(["evaluations", "time"]),
    default="evaluations",
    show_default=True,
    help="What to hold equal.",
)
@click.option("-o", "output", type=_FILE, help="Draw them to this .pdf, .png or .svg file too. [default: no picture]")
@json_option
def compare(names: tuple[str, ...], by: str, output: Path | None, as_json: bool) -> None:
    """Compare searches: the best each had found by the point that all of them reached, with spread and ranks.

    Searches that differ only in their seed are one line of the table.

    \b
    Example:
      deephyper-balsam search compare ambs-1 ambs-2 random-1 random-2 -o compare.pdf
    """
    from deephyper_balsam.results.analysis.compare import compare_searches, comparison_figure
    from deephyper_balsam.results.analysis.drawing import check_drawing

    if output is not None:
        check_drawing(output)
    found = compare_searches([_trials(name) for name in dict.fromkeys(names)], by)
    for note in found.notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        echo_json(found.to_dict())
    else:
        click.echo(f"After {found.budget_said}:")
        columns = ("searches", "runs", "evaluated", "failed", "best", "median", "lowest", "highest", "rank")
        groups = [{**group, **group.get("loss", {})} for group in found.to_dict()["groups"]]
        rows = [{key: _short(group[key]) for key in columns} for group in groups]
        echo_table(rows, columns, False, "")
    if output is not None:
        _draw(comparison_figure(found), output)


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else value


def _trials(name: str, gateway: Gateway | None = None) -> Trials:
    from deephyper_balsam.results.analysis.trials import Trials
    from deephyper_balsam.results.table import read_table
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.lease import read_leases
    from deephyper_balsam.store.record import find_record

    gateway = gateway or Gateway()
    record = find_record(gateway, name)
    lines, tracebacks = read_table(gateway, record)
    leases = read_leases(gateway, name).get(name, [])
    driven = [
        (lease.driving_since - record.created_at, lease.driving_since - record.created_at + lease.drove_s)
        for lease in leases
        if lease.driving_since is not None
    ]
    return Trials(name, record.settings, lines, record.created_at, tracebacks, driven)


def _draw(spec: dict[str, Any], output: Path) -> None:
    from deephyper_balsam.results.analysis.drawing import draw
    from deephyper_balsam.results.table import write_whole

    write_whole(output, draw(spec, output.suffix.lower()))
    click.echo(f"Figure written to {output}", err=True)
