"""`deephyper-balsam search utilization`: where the node-hours of a search went."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deephyper_balsam.cli.common import echo_json, echo_table, json_option

if TYPE_CHECKING:
    from deephyper_balsam.monitor.node_hours import NodeHours

_FILE = click.Path(path_type=Path)
_SAID = {
    "useful": "trials with a result",
    "failed": "trials that failed",
    "repeated": "runs that were cut, or ended by the machine, and began again",
    "start-up": "from the allocation's start to its first run",
    "between runs": "results and trials on their way through Balsam, and processes that start",
    "no configuration": "the driver had submitted nothing",
    "no driver": "nobody drove the search",
    "end of allocation": "what waited was not begun any more",
    "drained": "everything was submitted, the last runs went on",
}


@click.command()
@click.argument("name")
@click.option(
    "-o", "output", type=_FILE, help="Draw it over time to this .pdf, .png or .svg file. [default: no picture]"
)
@json_option
def utilization(name: str, output: Path | None, as_json: bool) -> None:
    """Say where the node-hours of the search NAME went: useful, failed, repeated, and idle by cause.

    By Balsam's event log and jobs; also while the search runs.

    \b
    Example:
      deephyper-balsam search utilization digits-1
    """
    from deephyper_balsam.monitor.node_hours import count_node_hours
    from deephyper_balsam.monitor.timeline import read_timeline
    from deephyper_balsam.results.early import saved
    from deephyper_balsam.results.table import read_lines
    from deephyper_balsam.store.gateway import Gateway
    from deephyper_balsam.store.record import find_record

    if output is not None:
        from deephyper_balsam.results.analysis.drawing import check_drawing

        check_drawing(output)
    gateway = Gateway()
    record = find_record(gateway, name)
    hours = count_node_hours(read_timeline(gateway, record))
    early = saved(read_lines(gateway, record)) if record.settings.get("stopper") else None
    if as_json:
        echo_json({**hours.to_dict(), "early": None if early is None else early.to_dict()})
    else:
        _say(name, hours)
        if early is not None:
            click.echo(f"\n{early}.")
    if output is not None:
        from deephyper_balsam.results.analysis.drawing import draw
        from deephyper_balsam.results.analysis.look import spec
        from deephyper_balsam.results.analysis.node_hours import DESCRIPTION, node_hours
        from deephyper_balsam.results.table import write_whole

        write_whole(output, draw(spec(node_hours(hours), DESCRIPTION, width=480), output.suffix.lower()))
        click.echo(f"Figure written to {output}", err=True)


def _say(name: str, hours: NodeHours) -> None:
    if not hours.total:
        click.echo(f"Search {name}: no allocation of it has run yet.")
    else:
        click.echo(
            f"Search {name}: nodes {hours.busy:.1%} busy with runs, {hours.utilization:.1%} with useful ones, in "
            f"{hours.total:.4g} node-hours.\n"
        )
        rows = [
            {"": kind, "node-hours": f"{lasted:.4g}", "share": f"{lasted / hours.total:6.1%}", "what": _SAID[kind]}
            for kind, lasted in hours.by_kind.items()
        ]
        echo_table(rows, ("", "node-hours", "share", "what"), False, "")
        click.echo()
        each = [
            {
                "BatchJob": one["batch_job"],
                "site": one["site"],
                "nodes": one["nodes"],
                "began": time.strftime("%m-%d %H:%M:%S", time.localtime(one["start"])),
                "minutes": f"{60 * one['hours']:.1f}",
                "useful": f"{one['useful'] / one['node_hours']:.1%}" if one["node_hours"] else "",
                "most idle by": max(list(_SAID)[3:], key=lambda cause: float(one[cause])),
            }
            for one in hours.by_allocation
        ]
        columns = ("BatchJob", "site", "nodes", "began", "minutes", "useful", "most idle by")
        echo_table(each, columns, False, "")
    if hours.waited * 60 >= 0.1:
        click.echo(f"\nA driver was at work for {60 * hours.waited:.1f} minutes in which no allocation ran.")
